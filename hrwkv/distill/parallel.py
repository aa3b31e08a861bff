"""Several processes as one: the only file that names ``torch.distributed``.

One process needs nothing of it; under torchrun every process holds a shard of both models (FSDP2) and takes
its rows of the same global batch, so that n processes give the losses and gradients of one. The collectives
are gloo's on CPUs and NCCL's on GPUs. Checkpoints are torch's distributed ones, which may be read with
another number of processes. Left out: tensor and pipeline parallelism, CPU offload; each process reads a
whole model into its memory before it keeps its shard.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from hrwkv.layers.batch import TokenBatch
from hrwkv.model.modeling import Block, HybridModel


@dataclass(frozen=True)
class Ranks:
    """This process among all: its number, how many there are, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """True for the process that writes logs and models."""
        return self.rank == 0


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """This process's place among those that torchrun started, if it started any, and its device.

    device: ``auto``, ``cpu`` or ``cuda``. Raises ValueError where ``cuda`` is asked for and there is none. A
    group that somebody else has already started is used and left alone.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no GPU: use device auto or cpu")
    kind = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    starts_group = dist.is_torchelastic_launched() and not dist.is_initialized()
    if starts_group:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield _ranks(kind)
    finally:
        if starts_group:
            dist.destroy_process_group()


def _ranks(kind: str) -> Ranks:
    if not dist.is_initialized():
        return Ranks(0, 1, torch.device(kind))
    if kind == "cpu":
        return Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    device = torch.device("cuda", dist.get_node_local_rank())
    torch.cuda.set_device(device)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def place(model: HybridModel, ranks: Ranks) -> None:
    """Move a model to this process's device; with several processes keep only this one's shard of it.

    Each mixer is a group of its own, so that stage 1 gathers no MLP of the student.
    """
    if ranks.world == 1:
        model.to(ranks.device)
        return
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in blocks_of(model):
        fully_shard(block.self_attn, mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # FSDP takes the module that is called first for the root, and stage 1 calls blocks: so call the root
    # once.
    with torch.no_grad():
        model(
            torch.zeros(1, dtype=torch.int64, device=ranks.device),
            TokenBatch.from_lengths([1], device=ranks.device),
        )
    release(model)


def blocks_of(model: HybridModel) -> list[Block]:
    """The blocks, in order."""
    return cast("list[Block]", list(model.model.layers))


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Hold a sharded module's own parameters whole in the ``with`` block (not inner modules')."""
    if isinstance(module, FSDPModule):
        module.unshard()
    try:
        yield
    finally:
        release(module)


def release(module: nn.Module) -> None:
    """Give up a module's gathered parameters: after a forward without backward they would go stale."""
    if isinstance(module, FSDPModule):
        module.reshard()


def total(value: Tensor, ranks: Ranks) -> Tensor:
    """The sum over all processes of a tensor without gradient."""
    if ranks.world == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its sharding; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def barrier(ranks: Ranks) -> None:
    """Wait for all processes."""
    if ranks.world > 1:
        dist.barrier()


@contextlib.contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Turn a distributed checkpoint's error, no Exception and one line per process, into an OSError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it says what no_dist says
        try:
            yield
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise OSError(f"{what}: {reason}") from error


def save_state(state: dict[str, Any], folder: Path, ranks: Ranks) -> None:
    """Write named tensors, each process its shards, into a folder that does not exist yet."""
    with _one_line_errors(f"cannot write the checkpoint {folder}"):
        save(state, checkpoint_id=folder, no_dist=ranks.world == 1)


def load_state(state: dict[str, Any], folder: Path, ranks: Ranks) -> None:
    """Fill the tensors of ``state`` in place from a folder that ``save_state`` wrote."""
    with _one_line_errors(f"cannot read the checkpoint {folder}, remove it to use the one before"):
        load(state, checkpoint_id=folder, no_dist=ranks.world == 1)
