"""The trainer on a card: sharded by FSDP2 over one GPU, with the fused operators."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.train_worker import TINY, configure, state_of, train
from train import fsdp
from train.checkpoint import checkpoints, read_state
from train.export import export
from train.fsdp import Trainer
from train.processes import Processes, processes
from train.sharding import copy_shard, local_shards
from train.stages import draw
from univid.model import UNetConfig

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.gpu


@pytest.fixture
def card():
    with processes() as joined:
        assert joined.device.type == "cuda"
        yield joined


def host(joined: Processes) -> Processes:
    """The same process, on the CPU."""
    return dataclasses.replace(joined, device=torch.device("cpu"), mesh=joined.host_mesh)


def like(trainer: Trainer, other: Trainer) -> None:
    """The other one's weights and batches. Each kind of device has random numbers of its own."""
    theirs = dict(local_shards_of(other))
    for shard in local_shards(trainer.model):
        copy_shard(shard.parameter, theirs[shard.name].to(trainer.processes.device))
    for average, shard in zip(trainer.optimizer.average, trainer.optimizer.shards, strict=True):
        average.copy_(shard.local)
    for name, source in trainer.sources.items():
        for part in ("latents", "text", "image"):
            setattr(source, part, getattr(other.sources[name], part).to(trainer.processes.device))


def local_shards_of(trainer: Trainer):
    return ((shard.name, shard.local) for shard in local_shards(trainer.model))


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Of one step, which then does nothing else."""
    trainer.optimizer.step = lambda lr, step: torch.zeros(())
    trainer.train_step()
    return {n: p.grad.full_tensor().cpu() for n, p in trainer.model.named_parameters() if p.grad is not None}


def error(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Of all entries together, in relation to their norm."""
    assert a.keys() == b.keys()
    one, other = (torch.cat([x[name].double().flatten() for name in sorted(x)]) for x in (a, b))
    return ((one - other).norm() / other.norm()).item()


@pytest.fixture
def drawn_on_the_host(monkeypatch):
    def drawn(task, first, latents, *rest):
        own = draw(task, first, latents.cpu(), *rest)
        moved = {
            f.name: x.to(latents.device)
            for f in dataclasses.fields(own)
            if isinstance(x := getattr(own, f.name), torch.Tensor)
        }
        return dataclasses.replace(own, **moved)

    monkeypatch.setattr(fsdp, "draw", drawn)


VIDEOS = ("streams.image.share=0",)


@pytest.mark.parametrize(("dtype", "backend", "limit"), [("float32", "torch", 1e-4), ("bfloat16", None, 0.03)])
def test_gradients_are_those_of_the_cpu(card, tmp_path, monkeypatch, drawn_on_the_host, dtype, backend, limit):
    """Exactly where both compute in float32; as near as bfloat16 is with the fused operators."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    there = Trainer(configure(tmp_path / "cpu", "compute.dtype=float32", *VIDEOS), host(card))
    if backend:
        load = UNetConfig.load
        monkeypatch.setattr(UNetConfig, "load", lambda name: dataclasses.replace(load(name), backend=backend))
    here = Trainer(configure(tmp_path / "card", f"compute.dtype={dtype}", *VIDEOS), card)
    like(here, there)
    assert error(gradients(here), gradients(there)) < limit


def test_steps_are_those_of_the_cpu(card, tmp_path, monkeypatch, drawn_on_the_host):
    """The optimizer's too: clipping, moments, average."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    load = UNetConfig.load
    monkeypatch.setattr(UNetConfig, "load", lambda name: dataclasses.replace(load(name), backend="torch"))
    overrides = ("compute.dtype=float32", "optimizer.eps=1e-4", "optimizer.clip_norm=0.1")
    there = Trainer(configure(tmp_path / "cpu", *overrides), host(card))
    here = Trainer(configure(tmp_path / "card", *overrides), card)
    like(here, there)
    start = {name: x.cpu().clone() for name, x in state_of(here).items()}
    for trainer in (here, there):
        for _ in range(4):
            trainer.train_step()
    ours, theirs = state_of(here), state_of(there)
    for kind in ("model", "ema", "exp_avg"):
        names = [name for name in ours if name.startswith(f"{kind}.")]
        a, b = ({name: x[name].cpu() - start[name] for name in names} for x in (ours, theirs))
        assert error(a, b) < 1e-2, kind


@pytest.fixture
def deterministic(monkeypatch):
    """The same bits from the same step: else gradients are summed in any order, and cuDNN takes what is fastest today."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
def test_activation_checkpointing_changes_no_gradient(card, tmp_path, deterministic, monkeypatch):
    def of_one_step(*overrides: str) -> dict[str, torch.Tensor]:
        trainer = Trainer(configure(tmp_path, *overrides), card)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        return gradients(trainer)

    plain, again = of_one_step(), of_one_step("compute.activation_checkpointing=true")
    assert plain.keys() == again.keys()
    assert not [name for name in plain if not torch.equal(plain[name], again[name])]


def test_compiled_blocks_compute_the_same(card, tmp_path):
    eager = gradients(Trainer(configure(tmp_path, *VIDEOS, "stage=t2v"), card))
    compiled = gradients(Trainer(configure(tmp_path, *VIDEOS, "stage=t2v", "compute.compile=inductor"), card))
    assert error(compiled, eager) < 0.03


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
@pytest.mark.parametrize("more", [(), ("compute.activation_checkpointing=true",)], ids=["plain", "checkpointed"])
def test_replayed_steps_are_plain_ones(card, tmp_path, deterministic, monkeypatch, more):
    """Bit for bit: streams of clips and images, all tasks, two parts a step."""

    def after_some_steps(*overrides: str) -> tuple[Trainer, dict[str, torch.Tensor], list[float]]:
        trainer = Trainer(configure(tmp_path, "stage=joint", "optimizer.accumulate=2", *more, *overrides), card)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        losses = [trainer.train_step().loss for _ in range(24)]
        return trainer, state_of(trainer), torch.stack(losses).tolist()

    _, plain, losses = after_some_steps("compute.cuda_graphs=false")
    trainer, replayed, same = after_some_steps()
    assert len(trainer.backward.kinds) == 6
    assert all(kind.graph is not None for kind in trainer.backward.kinds.values())
    assert same == losses
    assert not [name for name in plain if not torch.equal(plain[name], replayed[name])]


def test_a_step_asks_the_device_nothing(card, tmp_path):
    from train.bench import synchronisations

    trainer = Trainer(configure(tmp_path, *VIDEOS, "stage=t2v"), card)
    for _ in range(2):
        trainer.train_step()
    assert synchronisations(trainer) == 0


@pytest.mark.parametrize("more", [(), ("compute.activation_checkpointing=true",)], ids=["plain", "checkpointed"])
def test_a_run_that_is_resumed_equals_one_that_was_not(card, tmp_path, more):
    whole = train(configure(tmp_path / "whole", "steps=6", *more), card)
    train(configure(tmp_path / "parts", "steps=6", "checkpoints.every=3", *more), card)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000006")  # as if it had been killed after step 3
    resumed = train(configure(tmp_path / "parts", "steps=6", *more), card)
    assert whole.keys() == resumed.keys()
    assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]


def test_a_step_that_is_not_finite_does_nothing_but_count(card, tmp_path):
    trainer = Trainer(configure(tmp_path, *VIDEOS), card)
    trainer.train_step()
    before = state_of(trainer)
    source = trainer.sources["video"]
    latents, source.latents = source.latents, source.latents * torch.nan
    trainer.train_step()
    after = state_of(trainer)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["skipped"]
    source.latents = latents
    trainer.train_step()
    assert not torch.equal(state_of(trainer)["model.unet.conv_in.weight"], after["model.unet.conv_in.weight"])


TWO = {
    "sharded": ["steps=3", "compute.dtype=float32", "optimizer.eps=1e-4"],
    "replicated": ["steps=3", "compute.dtype=float32", "optimizer.eps=1e-4", "compute.replicas=2"],
    "replayed": ["steps=9", "stage=t2v", "streams.image.share=0", "compute.dtype=float32", "optimizer.eps=1e-4"],
}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs needed")
def test_two_cards_equal_one(card, tmp_path, monkeypatch):
    """By NCCL, sharded over both and a copy on each, on the same global batch."""
    (tmp_path / "cases.json").write_text(json.dumps(TWO))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run(
        [*command, "tests/train_worker.py", str(tmp_path)], cwd=ROOT, env=environment, check=True, timeout=120
    )
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for case, overrides in TWO.items():
        alone = [override for override in overrides if "replicas" not in override]
        one = {name: x.cpu() for name, x in train(configure(tmp_path / f"{case}-alone", *alone), card).items()}
        two = torch.load(tmp_path / f"{case}.pt", weights_only=True)
        for kind in ("model", "ema"):
            names = [name for name in one if name.startswith(f"{kind}.")]
            assert error({n: two[n] for n in names}, {n: one[n] for n in names}) < 1e-5, (case, kind)


def test_sigterm_writes_a_checkpoint_that_is_exported(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "train/fsdp.py", *TINY, f"run={run}", "steps=1000000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    log = run / "log.jsonl"
    end = time.monotonic() + 60
    while not (log.is_file() and len(log.read_text().splitlines()) > 3):
        assert process.poll() is None, "the process has ended"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 0
    (last,) = checkpoints(run / "checkpoints")
    assert f"stopped at step {read_state(last)['step']}" in output
    assert {"TFLOP/s", "memory GiB", "MFU"} <= json.loads(log.read_text().splitlines()[-1]).keys()
    assert export(run, tmp_path / "out") == last
