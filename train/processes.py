"""The processes of a run: started by torchrun, or one alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

PATIENCE = timedelta(days=7)  # of hosts: rank 0 may index or copy for hours; that a rank is lost, gloo tells at once


@dataclass
class Processes:
    """This process and the others.

    ``mesh`` is of the shards, ("replicate", "shard") with several replicas; ``host_mesh`` the same for tensors on the host.
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    host_mesh: DeviceMesh
    host_group: Any  # gloo's, of all processes: agreement among hosts, which waits for no device
    _flag: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int32))
    _agreeing: Any = None
    _signalled: bool = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def shard_group(self) -> Any:
        """The ranks that together hold one copy of everything."""
        return self.mesh.get_group(self.mesh.ndim - 1)

    def stopping(self) -> bool:
        """Whether any rank had been signalled by its last call: the same answer everywhere.

        One step late, so that no host waits for another one's answer to this call.
        """
        agreed = False
        if self._agreeing is not None:
            self._agreeing.wait()
            agreed = bool(self._flag.item())
        self._flag.fill_(int(self._signalled))
        self._agreeing = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self.host_group, async_op=True)
        return agreed

    def stop(self) -> None:
        """As if this rank had been signalled."""
        self._signalled = True

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Rank 0 does what is inside while the others wait, then they."""
        if not self.first:
            self.barrier()
        try:
            yield
        finally:
            if self.first:
                self.barrier()

    def barrier(self) -> None:
        dist.barrier(group=self.host_group)

    def share(self, value: Any) -> Any:
        """Rank 0's value."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def first_sees(self, check: Callable[[], object]) -> None:
        """Rank 0 does what may fail; every rank raises the ValueError or OSError that came of it."""
        failure: Exception | None = None
        if self.first:
            try:
                check()
            except (ValueError, OSError) as error:
                failure = error
        if (failure := self.share(failure)) is not None:
            raise failure

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over all ranks of a tensor on the device, written over it."""
        dist.all_reduce(x)
        return x.div_(self.world_size)


def mesh_of(kind: str, world_size: int, replicas: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(kind, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicas, world_size // replicas), mesh_dim_names=("replicate", "shard"))


def host_group() -> Any:
    """Of all processes, for what waits for hosts."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def lost_peer(error: BaseException) -> bool:
    """Whether it says that another rank has ended."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "peer" in str(error))


def device_kind() -> str:
    """Where this machine's processes compute: "cuda" if there is a GPU for each of them, else "cpu"."""
    return "cuda" if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)) else "cpu"


@contextmanager
def processes(replicas: int = 0, device: str | None = None) -> Iterator[Processes]:
    """Join the others, each on a GPU of its own where there are GPUs.

    Args:
        replicas: copies of the shards; 0: one a node. device: "cpu" or "cuda", by default what is there.

    Raises:
        ValueError: replicas that do not divide the number of processes.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    replicas = replicas or world_size // local_size
    if world_size % replicas:
        raise ValueError(f"compute.replicas: got {replicas}, needs a divisor of {world_size} processes")
    kind = device or device_kind()
    here = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(here)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    alone: dict[str, Any] = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **alone, device_id=here if kind == "cuda" else None)
    mesh = mesh_of(kind, world_size, replicas)
    host_mesh = mesh_of("cpu", world_size, replicas) if kind == "cuda" else mesh
    joined = Processes(rank, world_size, here, mesh, host_mesh, host_group())

    def signalled(number: int, frame: FrameType | None) -> None:
        joined._signalled = True

    before = signal.signal(signal.SIGTERM, signalled)
    whole = False
    try:
        yield joined
        if joined._agreeing is not None:
            joined._agreeing.wait()
        whole = True
    finally:
        signal.signal(signal.SIGTERM, before)
        if whole or world_size == 1:  # else it would wait for ranks that may be gone
            dist.destroy_process_group()
