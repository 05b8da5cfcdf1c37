"""What a step of training computes, on the CPU: conditions, loss, clipping, and what is computed again."""

import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.distributed.fsdp import FSDPModule

from tests.calls import Seen
from tests.train_worker import configure, state_of
from train.data import Conditioned, Encoder
from train.diffusion import Diffusion
from train.flops import forward_flops
from train.fsdp import Trainer
from train.graphs import StepGraphs
from train.parts import SCHEDULE
from train.processes import processes
from train.sharding import ATTENTION
from train.stages import Draw, reference_frames
from univid.data.batch import Batch

CPU = torch.device("cpu")


@pytest.fixture
def alone():
    with processes(device="cpu") as joined:
        yield joined


# --- conditions and loss --------------------------------------------------------------------------------------------------


def test_a_clips_image_is_its_first_frame_and_a_task_sees_its_conditions():
    clip = SimpleNamespace(image=lambda pixels: pixels, text=lambda captions: torch.tensor([[len(captions[0])]]))
    encoder = Encoder(SimpleNamespace(clip=clip, dtype=torch.float32), CPU, 1)
    frames = torch.randint(256, (2, 3, 4, 6, 3), dtype=torch.uint8)
    batch = Batch(["a", "b"], ["red", "red"], torch.ones(2), frames, latents=torch.zeros(2, 3, 4, 2, 3))
    t2v, i2v, ti2v = (encoder(batch, task) for task in ("t2v", "i2v", "ti2v"))
    first = frames[:, 0].movedim(-1, 1) / 255
    assert t2v.image is None and torch.equal(i2v.image, first) and torch.equal(ti2v.image, first)
    assert t2v.text.max() == ti2v.text.max() == 3 and i2v.text.max() == 0  # the empty prompt


def test_dropped_text_is_the_empty_prompt():
    seen = []
    trainer = SimpleNamespace(
        diffusion=Diffusion(SCHEDULE | {"prediction_type": "v_prediction"}, CPU),
        encoder=SimpleNamespace(empty=lambda clips: torch.full((clips, 5, 2), 7.0)),
        model=lambda x, t, text, image, **choices: seen.append((text, image, choices)) or torch.zeros_like(x),
    )
    latents = torch.randn(3, 2, 4, 2, 2)
    sample = Conditioned(latents, torch.ones(3, 5, 2), torch.ones(3, 4, 2), torch.ones(3))
    dropped, weight = torch.tensor([True, False, True]), torch.tensor([1.0, 0.0, 1.0])
    Trainer.loss(trainer, sample, Draw(torch.zeros(3, dtype=torch.long), latents, dropped, 1.0, weight), {})
    ((text, image, choices),) = seen
    assert text[:, 0, 0].tolist() == [7, 1, 7] and image is sample.image
    assert choices == {"text_weight": 1.0, "image_weight": weight, "fps": sample.fps, "refs": {}}


def test_the_loss_is_in_float32():
    """Also of bfloat16, whose squares and means would be rounded."""
    diffusion = Diffusion(SCHEDULE | {"prediction_type": "v_prediction"}, CPU)
    prediction, target = torch.randn(2, 3, 1000).bfloat16()
    loss = diffusion.loss(prediction, target, torch.zeros(3, dtype=torch.long))
    exact = (prediction.double() - target.double()).square().mean()
    assert loss.dtype == torch.float32 and (loss - exact).abs() <= 1e-6 * exact


def test_every_block_is_sharded_by_itself(alone, tmp_path):
    """So that no more than a few are there whole."""
    trainer = Trainer(configure(tmp_path), alone)
    blocks = list(trainer.model.blocks())
    assert blocks and all(isinstance(module, FSDPModule) for module in (*blocks, trainer.model))


@pytest.mark.parametrize(("replicas", "shape"), [(0, (2, 2)), (1, (4,)), (4, (4, 1))])
def test_replicas_are_one_a_node(monkeypatch, replicas, shape):
    """Two nodes of two: by default the shards lie inside a node."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    seen = []
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    monkeypatch.setattr("train.processes.host_group", lambda: None)
    monkeypatch.setattr("train.processes.init_device_mesh", lambda _, shape, **names: seen.append((shape, names)))
    with processes(replicas, "cpu"):
        pass
    names = ("shard",) if len(shape) == 1 else ("replicate", "shard")
    assert seen == [(shape, {"mesh_dim_names": names})]


def test_waiting_for_data_is_counted(alone, tmp_path):
    trainer = Trainer(configure(tmp_path), alone)
    for source in trainer.sources.values():
        source.next = lambda next=source.next: (time.sleep(0.2), next())[1]
    assert 0.2 <= trainer.train_step().waited < 5


def test_reference_frames_are_drawn_anew_in_training(alone, tmp_path):
    unet = Trainer(configure(tmp_path), alone).model.unet.train()
    drawn = {
        tuple(refs[1].table.flatten().tolist())
        for seed in range(20)
        for refs in [reference_frames(unet, 4, torch.Generator().manual_seed(seed), CPU)]
    }
    assert len(drawn) > 1


def test_min_snr_weights_are_the_configurations(alone, tmp_path):
    plain, weighted = (
        Trainer(configure(tmp_path, f"optimizer.min_snr={gamma}"), alone).diffusion.weight for gamma in (0, 5)
    )
    assert (plain == 1).all() and not (weighted == 1).any()


def test_gradients_are_clipped_to_a_norm(alone, tmp_path):
    for limit in (1e9, 0.01):
        trainer = Trainer(configure(tmp_path, f"optimizer.clip_norm={limit}", "optimizer.beta1=0"), alone)
        norm = trainer.train_step().norm.item()
        moments = torch.cat([moment.flatten() for _, moment in trainer.optimizer.tensors()["exp_avg"]])
        assert norm > 0.01 and moments.norm().item() == pytest.approx(min(norm, limit), rel=1e-4)


# --- what is computed, and how often --------------------------------------------------------------------------------------


def test_what_is_computed_again_is_all_but_attention_and_not_counted(alone, tmp_path):
    counts, flops = [], []
    for on in ("false", "true"):
        config = configure(tmp_path, f"compute.activation_checkpointing={on}", "streams.image.share=0", "stage=t2v")
        trainer = Trainer(config, alone)
        with Seen() as seen:
            flops.append(trainer.train_step().flops)
        counts.append(Counter(seen.names))
    plain, again = counts
    attention = [name for name in ATTENTION if plain[name]]
    assert len(attention) == 3 and all(again[name] == plain[name] for name in attention)
    assert again["geglu"] == 2 * plain["geglu"] > 0
    source = trainer.sources["video"]
    sample = Conditioned(source.latents, source.text, None, source.fps)
    assert flops == [3 * len(source.fps) * forward_flops(trainer.model.unet.config, sample)] * 2


def test_more_graphs_than_there_are_shapes_end_the_run(alone, tmp_path, monkeypatch):
    limits = torch._dynamo.config
    for name in ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit"):
        monkeypatch.setattr(limits, name, getattr(limits, name))  # is put back
    torch._dynamo.reset()
    trainer = Trainer(configure(tmp_path, "compute.compile=eager", "steps=20"), alone)
    limits.recompile_limit = 1
    with pytest.raises(FailOnRecompileLimitHit):
        trainer.run()
    torch._dynamo.reset()


# --- steps that are replayed ----------------------------------------------------------------------------------------------


class Replayed(StepGraphs):
    """Stands for CUDA graphs on the CPU: a replay computes anew, from what it was captured on."""

    def __init__(self, function, shards, mesh):
        self.function, self.shards, self.mesh = function, shards, mesh
        self.kinds, self.gradients = {}, []

    def _run(self, inputs):
        return self.function(inputs)

    def _capture(self, kind):
        kind.loss = torch.zeros(())
        kind.graph = SimpleNamespace(replay=lambda: kind.loss.copy_(self.function(kind.inputs)))


def test_replays_see_the_inputs_of_their_step(alone, tmp_path):
    """All that differs from step to step is in tensors that are handed over: conditions, noise, reference frames."""

    def after_some_steps(replayed: bool):
        trainer = Trainer(configure(tmp_path, "stage=joint", "optimizer.accumulate=2"), alone)
        if replayed:
            trainer.backward = Replayed(trainer.plain_backward, trainer.optimizer.shards, alone.mesh)
        losses = [trainer.train_step().loss.item() for _ in range(16)]
        return trainer, state_of(trainer), losses

    _, plain, losses = after_some_steps(False)
    trainer, replayed, same = after_some_steps(True)
    assert len(trainer.backward.kinds) == 6 and any(kind.graph for kind in trainer.backward.kinds.values())
    assert same == losses
    assert not [name for name in plain if not torch.equal(plain[name], replayed[name])]
