"""Several processes as one: the only place that names ``torch.distributed`` and DeepSpeed.

What the rest of ``distill`` needs, and all that it needs:

    with joined(settings.device) as ranks:                  # this process among all, its device
        teacher = open_model(path, ranks, dtype=bfloat16)   # sharded (FSDP2), no gradients
        student = open_model(path, ranks, dtype=bfloat16, trains=predicate, kind="fsdp2")
        engine = start(student, optimiser, ranks, kind="fsdp2", ...)
        for number, inputs in enumerate(micro_batches):
            with engine.micro_batch(last=number == len(micro_batches) - 1):
                engine.backward(loss)                       # any number of times; loss: this process's part
        norm = engine.step(clip)                            # clip, update, clear; or engine.discard()
        for name, weight in engine.weights(): ...           # fp32, whole, one at a time; all take part
        engine.save_moments(folder); engine.load_moments(folder)

One process runs the same lines without sharding, whatever ``kind`` says. Kinds: ``fsdp2`` is torch's own;
``zero1``, ``zero2`` and ``zero3`` are DeepSpeed's, whose student is sharded by it and whose teacher stays
with FSDP2. Checkpoints hold weights and moments by parameter name, so any kind on any number of processes
goes on from what any other wrote. The other functions are for those who look into a sharded model. Left out:
tensor and pipeline parallelism, offload.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from hrwkv.distill.parallel.engine import Engine, Kind, ReadState
from hrwkv.distill.parallel.fsdp import ShardedEngine, open_sharded
from hrwkv.distill.parallel.ranks import (
    Ranks,
    agree,
    barrier,
    blocks_of,
    gathered,
    joined,
    local,
    release,
    total,
    whole,
    whole_shape,
)
from hrwkv.distill.parallel.zero import ZeroEngine, open_partitioned
from hrwkv.model.checkpoint import Fitting, load_model
from hrwkv.model.modeling import HybridModel

__all__ = [
    "Engine",
    "Kind",
    "Ranks",
    "agree",
    "barrier",
    "blocks_of",
    "gathered",
    "joined",
    "local",
    "open_model",
    "release",
    "start",
    "total",
    "whole",
    "whole_shape",
]


def open_model(
    path: Path,
    ranks: Ranks,
    *,
    dtype: torch.dtype,
    trains: Callable[[str], bool] | None = None,
    kind: Kind = "fsdp2",
    fitting: Fitting | None = None,
) -> HybridModel:
    """A model on this process's device, in evaluation mode; of several processes each holds its part.

    dtype: what it computes in. trains: whether the parameter of a name gets gradients and an fp32 master;
    None says no for all, which makes a teacher. kind: of the engine that will train it. fitting: gives a
    model that is not sharded other parts as it is read. Raises what ``load_model`` raises.
    """
    if ranks.world == 1:
        kept = dtype if trains is None else torch.float32
        model = load_model(path, dtype=kept, device=ranks.device, fitting=fitting)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains is not None and trains(name))
        return model
    if kind == "fsdp2" or trains is None:
        return open_sharded(path, ranks, dtype=dtype, trains=trains or _never)
    return open_partitioned(path, ranks, stage=_stage(kind), dtype=dtype, trains=trains)


def start(
    student: HybridModel,
    optimiser: torch.optim.Optimizer,
    ranks: Ranks,
    *,
    kind: Kind,
    dtype: torch.dtype,
    path: Path,
    read_state: ReadState,
    reduce_always: bool = False,
) -> Engine:
    """An engine for a student that ``open_model`` opened from ``path`` with the same ``kind`` and ``dtype``.

    read_state: ``optimiser_state``. reduce_always: reduce the gradients of each micro-batch, which needs less
    memory and more traffic; zero2 and zero3 always do, zero1 never does.
    """
    if kind == "fsdp2" or ranks.world == 1:
        return ShardedEngine(student, optimiser, ranks, read_state=read_state, reduce_always=reduce_always)
    return ZeroEngine(student, optimiser, ranks, stage=_stage(kind), dtype=dtype, path=path)


def _stage(kind: Kind) -> int:
    return int(kind.removeprefix("zero"))


def _never(name: str) -> bool:
    return False
