"""Checkpoints by torch.distributed.checkpoint, written beside the training: at any instant the last one is whole.

A checkpoint is a folder ``step-00001000``: the shards of weights, average and moments, and ``state.json`` with what else it
takes to go on. It is written as ``step-00001000.partial``, and once all ranks have written their part rank 0 adds
``state.json`` and renames it.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.device_mesh import DeviceMesh

from train.config import one_line
from train.optimizer import ShardedAdamW
from train.processes import Processes, host_group
from train.sharding import Shard, local_shards
from univid.data.tensors import read_json

STATE = "state.json"
PARTIAL = ".partial"
COUNTS = "counts"


def checkpoints(folder: Path) -> list[Path]:
    """Those that took their name, the oldest first; :func:`read_state` tells whether something has damaged one since."""
    return sorted(path for path in folder.glob("step-*") if path.name[5:].isdigit())


def step_of(path: Path) -> int:
    """A checkpoint's, by its name."""
    return int(path.name[5:])


class Checkpoints:
    """Writes the state of a training, and reads it back, on as many ranks as there are.

    Args:
        folder: where. keep: how many.
    """

    def __init__(self, folder: Path, model: nn.Module, optimizer: ShardedAdamW, processes: Processes, keep: int = 3):
        self.folder, self.optimizer, self.processes, self.keep = folder, optimizer, processes, keep
        if processes.first:
            for partial in folder.glob(f"*{PARTIAL}"):
                shutil.rmtree(partial)
        self.group: Any = host_group()  # the writing thread's own
        self.shards: dict[str, list[tuple[Shard, Tensor]]] = {
            "model": [(shard, shard.local) for shard in local_shards(model)],
            **optimizer.tensors(),
        }
        self._host: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def latest(self) -> Path | None:
        """Rank 0's answer, on every rank."""
        found = checkpoints(self.folder) if self.processes.first else []
        return self.processes.share(found[-1] if found else None)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Take a copy of everything now, and write it while training goes on.

        Args:
            state: what else to keep, as JSON: the same on all ranks.

        Raises:
            OSError: the last one could not be written.
        """
        self.wait()
        path = self.folder / f"step-{step:08}"
        if path.exists():  # written by the run that this one continues
            return
        tensors = self._copy()
        self._thread = threading.Thread(target=self._write, args=(path, tensors, dict(state)), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the last one is there."""
        self.finish()
        self.check()

    def finish(self, seconds: float | None = None) -> None:
        """Let the writing thread come to its end, for so long at most, whatever comes of it."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None

    def check(self) -> None:
        """Raise what happened to the writing thread, without waiting for it."""
        if self._error is not None:
            error, self._error = self._error, None
            raise OSError(f"checkpoint: cannot write to {self.folder}: {_cause(error)}") from None

    def load(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint into model, average and optimizer; its ``state``. Raises ValueError: it is damaged."""
        tensors = self._copy()
        reader = FileSystemReader(path)
        with whole(path):
            reader.read_metadata()  # PyTorch logs a traceback where it is not there, and goes on without
            dcp.load(tensors, storage_reader=reader, process_group=self.group)
        with torch.no_grad():
            for kind, shards in self.shards.items():
                for shard, local in shards:
                    local.copy_(self._host[f"{kind}.{shard.name}"])
            self.optimizer.set_counts(self._host[COUNTS].to(self.processes.device))
        return read_state(path)

    # --- writing ------------------------------------------------------------------------------------------------------

    def _copy(self) -> dict[str, Any]:
        """This rank's tensors on the host, as parts of the whole ones."""
        mesh: DeviceMesh = self.processes.host_mesh
        tensors: dict[str, Any] = {}
        for kind, shards in self.shards.items():
            for shard, local in shards:
                tensors[f"{kind}.{shard.name}"] = shard.whole(self._to_host(f"{kind}.{shard.name}", local), mesh)
        tensors[COUNTS] = self._to_host(COUNTS, self.optimizer.counts())
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize()
        return tensors

    def _to_host(self, name: str, x: Tensor) -> Tensor:
        if name not in self._host:  # pinned once, used for every checkpoint
            self._host[name] = torch.empty_like(x, device="cpu", pin_memory=x.device.type == "cuda")
        return self._host[name].copy_(x, non_blocking=True)

    def _write(self, path: Path, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        partial = path.with_name(path.name + PARTIAL)
        try:
            finite = self._finite()
            if self.processes.first:
                shutil.rmtree(partial, ignore_errors=True)
                if finite:
                    self._prune()  # before as well: the disk may be full of those that a larger `keep` left
                partial.mkdir(parents=True)
            dist.barrier(group=self.group)
            writer = Writer(partial, thread_count=1)  # what goes wrong in a further thread, it does not tell
            dcp.save(tensors, storage_writer=writer, process_group=self.group)
            dist.barrier(group=self.group)  # all have written
            if self.processes.first:
                (partial / STATE).write_text(json.dumps(state, indent=1) + "\n")
                for written in (partial / STATE, partial):
                    _sync(written)
                os.rename(partial, path)
                _sync(self.folder)
            dist.barrier(group=self.group)  # it has its name, whichever rank ends next
            if self.processes.first and finite:
                self._prune()
        except BaseException as error:
            if self.processes.first:
                shutil.rmtree(partial, ignore_errors=True)  # it would keep the disk full
            self._error = error

    def _finite(self) -> bool:
        """Whether the weights are, on all ranks: a checkpoint of others is no reason to remove a good one."""
        ends = [end for name, x in self._host.items() if name.startswith("model.") and x.numel() for end in x.aminmax()]
        finite = torch.tensor([all(end.isfinite() for end in ends)], dtype=torch.int32)
        dist.all_reduce(finite, dist.ReduceOp.MIN, group=self.group)
        return bool(finite)

    def _prune(self) -> None:
        """Keep the last ones alone."""
        for old in checkpoints(self.folder)[: -self.keep]:
            gone = old.with_name(old.name + PARTIAL)  # never half there under its name
            os.rename(old, gone)
            shutil.rmtree(gone)


class Writer(FileSystemWriter):
    """One that says what the system said: of an error on its way to the other ranks only its own text is left."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            causes = [error]
            while (before := causes[-1].__cause__ or causes[-1].__context__) is not None:
                causes.append(before)  # type: ignore[arg-type]
            raise next((cause for cause in causes if isinstance(cause, OSError)), error) from None


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """What torch.distributed.checkpoint finds damaged, in one line."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        raise ValueError(
            f"run: the checkpoint {path} is damaged ({_cause(error)}); without that folder the one before it is the last"
        ) from None


def read_state(path: Path) -> dict[str, Any]:
    """Raises ValueError: it is damaged."""
    with whole(path):
        state = read_json(path / STATE)
    if missing := {"step", "sources", "stage", "unet"} - state.keys():
        raise ValueError(f"run: the checkpoint {path} is damaged ({STATE} has no {', '.join(sorted(missing))})")
    return state


def check_architecture(path: Path, identity: Mapping[str, Any]) -> None:
    """Raise ValueError where a checkpoint is of another stage or model; it names what differs.

    What the checkpoint does not say is not compared.
    """
    state = read_state(path)
    identity = json.loads(json.dumps(identity))  # tuples are lists there
    for key, here in identity.items():
        there = state.get(key, here)
        if there == here:
            continue
        if isinstance(here, dict) and isinstance(there, dict):
            name = next(name for name in (*here, *there) if here.get(name) != there.get(name))
            key, here, there = f"{key}.{name}", here.get(name), there.get(name)
        raise ValueError(f"run: {path} has {key} = {there!r}, this configuration {here!r}; another run's folder needed")


def _sync(path: Path) -> None:
    """A file is on disk once it and its folder are, a rename once its folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: BaseException) -> str:
    """One line, of the first rank that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return one_line(error)
