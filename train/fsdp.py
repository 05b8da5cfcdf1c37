"""Train UniVid: ``torchrun train/fsdp.py [train/configs/NAME.toml] [key=value ...]``, on one process or many.

Without arguments: the small model on generated shapes, on the GPUs that are there, else on the CPU, in smaller batches.
The same command again goes on from the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder that holds univid/ and train/

import torch
from safetensors import SafetensorError
from torch._dynamo.exc import FailOnRecompileLimitHit

from train.checkpoint import Checkpoints, check_architecture
from train.config import CONFIGS, Config, asks_for_help, load, need, one_line
from train.data import Conditioned, Encoder, as_opened, check_streams, kind_of, open_source
from train.diffusion import Diffusion
from train.export import check_out, pipeline_of, write_history
from train.flops import forward_flops
from train.graphs import StepGraphs
from train.log import Logs, Meter, Step, writing
from train.optimizer import ShardedAdamW, learning_rate
from train.parts import Parts
from train.processes import Processes, device_kind, lost_peer, processes
from train.sharding import Denoiser, checkpoint_activations, compile_blocks, materialise, shard
from train.stages import STAGES, Draw, Frames, draw, plan, reference_frames
from train.validation import averaged, check_validation, validate
from univid.checkpoint import MODELS, is_pipeline
from univid.data.files import beside
from univid.data.locks import alone
from univid.model import UNetConfig
from univid.model.config import CONFIGS as UNETS

# Of shapes.toml's batches a step takes 70 s on 2 cores, and torchrun kills 30 s after a SIGTERM.
ON_CPU = ("streams.video.batch_size=4", "streams.image.batch_size=16")


@dataclass(frozen=True)
class Inputs:
    """All that a step's loss is made of, beside the weights."""

    sample: Conditioned
    own: Draw
    refs: Frames


class Trainer:
    """All of a run: model, optimizer, data, checkpoints."""

    def __init__(self, config: Config, processes: Processes, started: float | None = None):
        """``started``: of the command, by the performance counter."""
        self.started = time.perf_counter() if started is None else started
        self.config, self.processes, self.stage = config, processes, STAGES[config.stage]
        device = processes.device
        on_gpu = device.type == "cuda"
        torch.backends.cudnn.benchmark = True  # shapes are few
        dtypes = {"auto": torch.bfloat16 if on_gpu else torch.float32, "bfloat16": torch.bfloat16}
        self.dtype = dtypes.get(config.compute.dtype, torch.float32)
        self.parts = Parts(config.model, self.dtype, device)
        unet = self.parts.unet()
        used = {name: stream for name, stream in config.streams.items() if stream.share > 0}
        trial = all(stream.source == "random" for stream in used.values())
        self.encoder = Encoder(self.parts, device, unet.context_dim, trial)
        check_streams(used, unet, self.encoder.factor)
        processes.first_sees(partial(self.check_outputs, unet))
        rendered = any(stream.source == "shapes" for stream in used.values())
        if rendered or config.validation.every or (self.parts.folder is not None and not trial):
            self.parts.check_fits(unet)
        whole = self.parts.whole()
        unet = whole.unet.config

        with torch.device("meta"):
            self.model = Denoiser(unet).train()
        self.stage.choose(self.model)
        if config.compute.activation_checkpointing:
            checkpoint_activations(self.model)
        if config.compute.compile != "none":
            kinds = sum(len(stream.buckets) for stream in used.values())
            compile_blocks(self.model, config.compute.compile, kinds * len(self.stage.tasks))
        shard(self.model, processes.mesh, self.dtype)
        materialise(self.model, device, whole, config.seed)
        del whole

        self.diffusion = Diffusion(self.parts.scheduler, device, config.optimizer.min_snr)
        self.optimizer = ShardedAdamW(self.model, config.optimizer, processes.shard_group)
        self.backward: Callable[[Inputs], torch.Tensor] = self.plain_backward
        if on_gpu and config.compute.cuda_graphs and config.compute.compile == "none":
            self.backward = StepGraphs(self.plain_backward, self.optimizer.shards, processes.mesh)
        self.sources = {
            name: open_source(name, stream, unet, self.encoder, processes, config.seed) for name, stream in used.items()
        }
        self.unused: dict[str, Any] = {}  # where streams stopped that have no share now
        opened = {name: as_opened(stream, self.sources[name]) for name, stream in used.items()}
        self.config = config = dataclasses.replace(config, streams=config.streams | opened)
        self.meter = Meter(config, processes, self.dtype)
        self.step = 0

        self.identity = {
            "stage": config.stage,
            "unet": dataclasses.asdict(dataclasses.replace(unet, backend=None)),
            "streams": {name: kind_of(stream).__name__ for name, stream in config.streams.items()},
            "encoders": None if trial else self.parts.fingerprint,
            "schedule": self.diffusion.schedule,
        }
        self.checkpoints = Checkpoints(
            Path(config.run) / "checkpoints", self.model, self.optimizer, processes, config.checkpoints.keep
        )
        if (last := self.checkpoints.latest()) is not None:
            check_architecture(last, self.identity)
            state = self.checkpoints.load(last)
            self.step = state["step"]
            self.unused = {name: of for name, of in state["sources"].items() if name not in self.sources}
            for name, source in self.sources.items():
                if name in state["sources"]:  # else it had no share so far
                    source.load_state_dict(state["sources"][name])
        self.logs = Logs(config, processes, self.step)

    def check_outputs(self, unet: UNetConfig) -> None:
        """What would fail at the first validation, or in the end, is said before the first step."""
        if self.config.validation.every:
            check_validation(self.config, unet, self.parts)
        if self.config.export:
            check_out(Path(self.config.export))

    # --- a step -------------------------------------------------------------------------------------------------------

    def train_step(self) -> Step:
        """One step of the optimizer. The device is only ever told what to do, never asked."""
        config = self.config.optimizer
        choice = plan(self.stage, self.config.streams, self.config.seed, self.step)
        loss, keys, flops, waited = torch.zeros((), device=self.processes.device), [], 0, 0.0
        for part in range(config.accumulate):
            before = time.perf_counter()
            batch = self.sources[choice.stream].next()
            waited += time.perf_counter() - before
            sample = self.encoder(batch, choice.task)
            place = (part * self.processes.world_size + self.processes.rank) * len(batch.keys)
            own = draw(choice.task, place, sample.latents, self.diffusion.steps, self.config.seed, self.step)
            refs = reference_frames(self.model.unet, sample.latents.shape[1], choice.generator, own.t.device)
            loss += self.backward(Inputs(sample, own, refs))
            keys += batch.keys
            flops += 3 * len(batch.keys) * forward_flops(self.model.unet.config, sample)
        lr = learning_rate(config, self.step, self.config.steps)
        norm = self.optimizer.step(lr, self.step)
        self.step += 1
        return Step(choice.task, keys, loss, norm, len(keys), flops, lr, waited)

    def plain_backward(self, inputs: Inputs) -> torch.Tensor:
        """Add a part's gradients to the parameters'; its share of the step's loss."""
        loss = self.loss(inputs.sample, inputs.own, inputs.refs) / self.config.optimizer.accumulate
        loss.backward()
        return loss.detach()

    def loss(self, sample: Conditioned, own: Draw, refs: Frames) -> torch.Tensor:
        """The diffusion loss of a batch whose samples each have drawn their noise, and which conditions they see."""
        x, target = self.diffusion.noisy(sample.latents, own.noise, own.t)
        text = torch.where(own.empty_text[:, None, None], self.encoder.empty(len(own.t)), sample.text)
        weights = {"text_weight": own.text_weight, "image_weight": own.image_weight}
        prediction = self.model(x, own.t, text, sample.image, **weights, fps=sample.fps, refs=refs)
        return self.diffusion.loss(prediction, target, own.t)

    # --- a run --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last step, or until a SIGTERM; what there is then is in a checkpoint.

        Where something fails, the checkpoint that is being written is finished before it is said.
        """
        self.introduce()
        try:
            stopped = self.train()
        except BaseException as error:
            if not lost_peer(error):  # without it none can be finished
                self.checkpoints.finish(60)
            raise
        self.close()
        if self.config.export:
            self.export(Path(self.config.export))
        if self.processes.first:
            print(f"{'stopped' if stopped else 'finished'} at step {self.step}", flush=True)

    def train(self) -> bool:
        """All steps, and what is logged, saved and drawn between them; whether a SIGTERM has ended them."""
        config = self.config
        first, stopped = self.step + 1, False
        while self.step < config.steps and not stopped:
            self.meter.steps.append(self.train_step())
            if config.seconds and time.perf_counter() - self.started > config.seconds:
                self.processes.stop()
            stopped = self.processes.stopping()
            last = stopped or self.step == config.steps
            if last or self.step % config.log.every == 0 or self.step == first:
                self.logs.write(self.step, self.meter.report(self.optimizer.skipped) | self.broken())
            if last or self.step % config.checkpoints.every == 0:
                self.save()
            if config.validation.every and not stopped and self.step % config.validation.every == 0:
                self.validate()
            self.checkpoints.check()
        self.checkpoints.wait()
        return stopped

    def close(self) -> None:
        """Forget the graphs: NCCL takes no communicator apart that one of them uses."""
        self.backward = self.plain_backward

    @property
    def device_name(self) -> str:
        device = self.processes.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"

    def broken(self) -> dict[str, float]:
        """Clips that could not be read, on all ranks, if there are any; each has been named when it was met."""
        count = sum(self.processes.gather(sum(source.skipped for source in self.sources.values())))
        return {"broken clips": count} if count else {}

    def introduce(self) -> None:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        ranks = self.processes.world_size
        if self.processes.first:
            print(
                f"{self.config.run}: stage {self.config.stage}, {trained / 1e6:.1f}M of {count / 1e6:.1f}M parameters, "
                f"{ranks} x {self.device_name}, {self.dtype}, from step {self.step} to {self.config.steps}",
                flush=True,
            )

    def export(self, out: Path) -> None:
        """Write the averaged weights and the frozen parts on rank 0, while the others wait."""
        whole = averaged(self, torch.float32)
        if whole is not None:
            parts = Parts(self.config.model, torch.float32, torch.device("cpu"))
            pipeline_of(whole.cpu(), self.config.stage, parts, self.config.streams).save_pretrained(out)
            seconds = round(time.perf_counter() - self.started)
            piece = {"steps": self.step, "seconds": seconds, "ranks": self.processes.world_size, "on": self.device_name}
            write_history(out, self.config, piece)
            print(f"{out}: averaged weights of step {self.step}", flush=True)
        self.processes.barrier()

    def validate(self) -> None:
        before = time.perf_counter()
        self.checkpoints.wait()  # is there, whatever becomes of the clips
        validate(self)
        self.meter.pause(time.perf_counter() - before)

    def save(self) -> None:
        before = time.perf_counter()
        sources = self.unused | {name: source.state_dict() for name, source in self.sources.items()}
        self.checkpoints.save(self.step, {"step": self.step, "sources": sources, **self.identity})
        self.meter.pause(time.perf_counter() - before)


def main(arguments: Sequence[str]) -> int:
    started = time.perf_counter()
    if asks_for_help(arguments, __doc__, Config):
        return 0
    path: str | Path | None = CONFIGS / "shapes.toml"
    small: Sequence[str] = ()
    if arguments and "=" not in arguments[0]:
        path, *arguments = arguments
    elif device_kind() == "cpu":
        small = ON_CPU
    try:
        config = load(Config, path, [*small, *arguments])
        check_beside(config, [argument.partition("=")[0] for argument in arguments])
        with processes(config.compute.replicas) as joined:
            if small and joined.first:
                print(f"no GPU for each process: {', '.join(small)}, unless told otherwise", flush=True)
            with first_alone(Path(config.run), joined):
                trainer = Trainer(config, joined, started)
                if joined.first:
                    write_config(trainer.config)
                trainer.run()
    except (ValueError, OSError, RuntimeError, SafetensorError, FailOnRecompileLimitHit) as error:
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        lost = "another rank has ended: " if lost_peer(error) else ""
        print(f"{rank}{lost}{type(error).__name__}: {one_line(error)}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the run goes on from its last checkpoint", file=sys.stderr, flush=True)
        return 130
    return 0


def check_beside(config: Config, typed: Sequence[str]) -> None:
    """Raises ValueError: an argument that others make void. A file may have it, for runs without."""
    model = config.model
    first = "sd21" if model.sd21 else "start"
    for name in ("start", "unet", "frozen"):
        got = getattr(model, name)
        void = got and getattr(model, first) and name != first and f"model.{name}" in typed
        need(f"model.{name}", got, not void, f"no model.{first} beside it, which has its own")
    clip = model.clip and "model.clip" in typed
    need("model.clip", model.clip, bool(model.sd21) or not clip, "model.sd21 beside it; other folders have their own")
    for key, stream in ((f"streams.{name}", stream) for name, stream in config.streams.items()):
        for side in ("height", "width"):
            void = stream.sizes and f"{key}.{side}" in typed
            need(f"{key}.{side}", getattr(stream, side), not void, f"no {key}.sizes beside it, which say both")


@contextmanager
def first_alone(run: Path, joined: Processes) -> Iterator[None]:
    """One command at a time in a run's folder: the lock is rank 0's."""
    with ExitStack() as held:
        joined.first_sees(lambda: held.enter_context(alone("run", run)))
        yield


def write_config(config: Config) -> None:
    """``config.json``, without which no checkpoint can be exported: whole, or as it was; from any folder."""
    table = dataclasses.asdict(config)
    table["model"] = {name: _from_anywhere(name, value) for name, value in table["model"].items()}
    text = json.dumps(table, indent=1) + "\n"
    with writing(Path(config.run)):
        beside(Path(config.run) / "config.json", lambda partial: partial.write_text(text))


def _from_anywhere(field: str, value: str) -> str:
    """A path, which may stand after a name and a colon, as an absolute one; the names of what ships as they are."""
    models = {path.name for path in MODELS.iterdir() if not is_pipeline(Path(path.name))}
    shipped = {path.stem for path in UNETS.glob("*.toml")} if field == "unet" else models
    name, colon, path = ("", "", value) if Path(value).exists() else value.rpartition(":")
    return f"{name}{colon}{Path(path).absolute()}" if path and path not in shipped and Path(path).exists() else value


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if status:
        os._exit(status)  # taking the processes' groups apart would wait for ranks that may be gone
