"""The processes of a run: how they find each other, what they sum and agree on, and what a shard is.

Collectives are gloo's on CPUs and NCCL's on GPUs. One process needs no group and no collective.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

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
        with warnings.catch_warnings():
            # FSDP2 says so of the first layer's value and key, which nothing changes in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            # DeepSpeed calls collectives by their older names.
            warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated")
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


def blocks_of(model: HybridModel) -> list[Block]:
    """The blocks, in order."""
    return cast("list[Block]", list(model.model.layers))


@contextlib.contextmanager
def gathered(module: nn.Module, *, then: nn.Module | None = None) -> Iterator[None]:
    """Hold a sharded module's own parameters whole in the ``with`` block (not inner modules').

    then: the module that is asked for next; FSDP2 gathers its parameters meanwhile.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(module, FSDPModule):
            module.unshard()
            stack.callback(module.reshard)
            if isinstance(then, FSDPModule):
                then.unshard(async_op=True)
        elif own := [part for part in module.parameters(recurse=False) if hasattr(part, "ds_id")]:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(own))
        yield


def release(model: nn.Module) -> None:
    """Give up what FSDP2 has gathered: after a forward without backward it would go stale."""
    for module in model.modules():
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


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of a tensor without its sharding; ZeRO-3 keeps it beside an empty one."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def barrier(ranks: Ranks) -> None:
    """Wait for all processes."""
    if ranks.world > 1:
        dist.barrier()


def agree(error: Exception | None, ranks: Ranks) -> None:
    """Raise everywhere what one process met, so that none waits for another that has given up.

    error: what this process caught, or None. Every process must call this. A process without an error of its
    own raises OSError with the words of the first that has one.
    """
    if ranks.world > 1:
        found: list[str | None] = [None] * ranks.world
        dist.all_gather_object(found, None if error is None else str(error))
        if error is None and any(said is not None for said in found):
            raise OSError(next(said for said in found if said is not None))
    if error is not None:
        raise error
