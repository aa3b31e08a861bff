"""The chunked recurrence in Triton: three kernels in two directions, tied into autograd.

forward = ``prepare`` + ``walk``; backward = ``prepare`` once more, ``walk`` backwards, ``gradients``.
Between the two, the inputs, the state before each chunk and U are kept, in the dtype of the products.
``prepare`` and ``gradients`` run over all chunks and heads at once; ``walk`` has one program a sequence,
head and block of values, and does so little a chunk that long single sequences are fast as well: there is no
second form for them.

bf16 inputs are multiplied in bf16 and summed in fp32; all others in three tf32 products, which keep fp32's
accuracy: fp16 does not hold the scaled keys. Left out: key sizes other than 32, 64, 96, 128
(``hrwkv.kernels.wkv7`` sends those to ``chunk_torch``), derivatives of the gradients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrwkv.kernels.tuning import Config, candidates_of, choose
from hrwkv.kernels.wkv7.chunk_bwd import gradients
from hrwkv.kernels.wkv7.chunk_fwd import prepare, walk

CHUNK = 32
# Chunks that one program of ``prepare`` works through.
PER_PROGRAM = 4
# What tuning may choose from, the first where nothing is known. A warp of AMD is twice as wide: a second one
# computes most of a tile again, as the compiled code shows (benchmarks/compile_kernels.py); no time is known.
PREPARE = candidates_of(
    nvidia=[Config(TK=tile, num_warps=warps) for tile, warps in ((32, 2), (64, 2), (64, 4))],
    amd=[Config(TK=32, num_warps=warps) for warps in (1, 2)],
)
WALK = candidates_of(
    nvidia=[
        *(Config(TK=tile, BV=32, STAGES=2, num_warps=2) for tile in (32, 64)),
        Config(TK=32, BV=64, STAGES=3, num_warps=4),
    ],
    amd=[
        Config(TK=32, BV=32, STAGES=1, num_warps=1),
        Config(TK=32, BV=32, STAGES=1, num_warps=1, waves_per_eu=2),
        Config(TK=32, BV=64, STAGES=1, num_warps=2),
    ],
)
GRADIENTS = candidates_of(
    nvidia=[Config(TK=32, STAGES=stages, num_warps=4) for stages in (1, 3)],  # in fp32 only the first fits
    amd=[
        *(Config(TK=32, STAGES=1, num_warps=warps) for warps in (2, 4)),
        Config(TK=32, STAGES=1, num_warps=2, waves_per_eu=2),
    ],
)
# Chunks times heads from which a choice is worth making: smaller work would be measured as noise, and the
# choice kept for the large.
MIN_TUNED = 8192


@dataclass(frozen=True)
class Plan:
    """Where the chunks lie: ``chunks`` [NT, 2] (first token, number of tokens), ``cu_chunks`` [N + 1],
    int32."""

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    chunks: Tensor
    cu_chunks: Tensor

    @property
    def num_chunks(self) -> int:
        """NT."""
        return len(self.chunks)


def plan(lengths: Sequence[int], cu_seqlens: Tensor) -> Plan:
    """Cut sequences into chunks, on the host, so that nothing waits for the device."""
    sizes = torch.tensor(list(lengths), dtype=torch.int32)
    counts = (sizes + CHUNK - 1) // CHUNK
    ends = counts.cumsum(0, dtype=torch.int32)
    sequence = torch.repeat_interleave(counts)  # [NT]
    at = (torch.arange(len(sequence), dtype=torch.int32) - (ends - counts)[sequence]) * CHUNK
    start = (sizes.cumsum(0, dtype=torch.int32) - sizes)[sequence] + at
    table = torch.cat([torch.stack([start, (sizes[sequence] - at).clamp(max=CHUNK)], 1).flatten(), ends])
    if cu_seqlens.is_cuda:
        table = table.pin_memory().to(cu_seqlens.device, non_blocking=True)
    chunks, ends = table.split([2 * len(sequence), len(sizes)])
    return Plan(tuple(lengths), cu_seqlens, chunks.view(-1, 2), torch.cat([ends.new_zeros(1), ends]))


def wkv7(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over packed sequences; the contract is ``hrwkv.kernels.wkv7.wkv7``'s."""
    dtype = torch.bfloat16 if {x.dtype for x in (r, k, v, a, b)} == {torch.bfloat16} else torch.float32
    inputs = [
        x.contiguous() if x is log_decay else x.to(dtype).contiguous() for x in (r, log_decay, k, v, a, b)
    ]
    # Inside the function gradients are always off, and inputs may need one all the same: it cannot be asked.
    keep = torch.is_grad_enabled()
    o, final = _ChunkedWkv7.apply(*inputs, initial_state, plan(lengths, cu_seqlens), keep)
    return o.to(v.dtype), final


class _ChunkedWkv7(torch.autograd.Function):
    """Keeps the inputs, the state before each chunk and U; the rest is computed again."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        r: Tensor,
        log_decay: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        initial_state: Tensor | None,
        plan: Plan,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        inputs = (r, log_decay, k, v, a, b)
        parts = _prepare(inputs, plan, backward=False)
        keep = keep and any(ctx.needs_input_grad)
        o, final, *kept = _walk(parts, v, plan, initial_state, reverse=False, keep=keep)
        ctx.save_for_backward(*inputs, *kept)
        ctx.plan, ctx.initial_dtype = plan, None if initial_state is None else initial_state.dtype
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        *inputs, states, u = ctx.saved_tensors
        r, log_decay, k, v, a, b = inputs
        heads, plan, do = r.shape[1], ctx.plan, do.contiguous()
        parts = _prepare(inputs, plan, backward=True)
        dv, dinitial, dstates, dy = _walk(parts, do, plan, dfinal, reverse=True, keep=True)
        dr, dlog_decay, dk, db = (torch.empty_like(x) for x in (r, log_decay, k, b))
        da = torch.empty_like(r)

        def run(config: Config) -> None:
            gradients[(heads * plan.num_chunks,)](
                *inputs,
                do,
                u,
                dy,
                states,
                dstates,
                plan.chunks,
                dr,
                dlog_decay,
                dk,
                da,
                db,
                H=heads,
                H_A=a.shape[1],
                H_V=v.shape[1],
                V=v.shape[2],
                TV=32 if v.shape[2] % 64 else 64,
                **_constants(r),
                **config,
            )

        if plan.num_chunks:
            _tuned("wkv7 gradients", r, GRADIENTS, run, size=r.shape[2], work=plan.num_chunks * heads)
        dstate = None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype)
        return dr, dlog_decay, dk, _sum_groups(dv, v), _sum_groups(da, a), db, dstate, None, None


def _sum_groups(grad: Tensor, like: Tensor) -> Tensor:
    """Sum the gradients ``[T, H, K]`` of the query heads that share a head of ``like [T, H_kv, K]``."""
    if grad.shape == like.shape:
        return grad
    return grad.unflatten(1, (like.shape[1], -1)).sum(2)


def _constants(x: Tensor) -> dict[str, Any]:
    """What all kernels are specialised by, beside their launch parameters."""
    half = x.dtype == torch.bfloat16
    precision = "tf32" if half else "tf32x3"
    return {
        "K": x.shape[2],
        "C": CHUNK,
        "DOT": tl.bfloat16 if half else tl.float32,
        # Most of AMD's chips have no tf32; their matrix units multiply fp32 itself.
        "PRECISION": precision if torch.version.hip is None else "ieee",
    }


def _tuned(
    name: str, x: Tensor, candidates: Sequence[Config], run: Callable[[Config], None], *, size: int, work: int
) -> None:
    """Run with the launch parameters that are best for this key size and dtype; work is chunks times
    heads."""
    fitting = [config for config in candidates if size % config["TK"] == 0]
    if work < MIN_TUNED:
        run(fitting[0])
    else:
        run(choose(name, (str(x.dtype), size), fitting, run, device=x.device))


def _prepare(inputs: Sequence[Tensor], plan: Plan, *, backward: bool) -> dict[str, Tensor]:
    """W, R, B', K' [NT, H, C, K], Q, P_rk, P_rb, M where ``backward`` [NT, H, C, C], decays [NT, H, K]."""
    r, log_decay, k, _, a, b = inputs
    heads, size = r.shape[1:]
    wide, square = (plan.num_chunks, heads, CHUNK, size), (plan.num_chunks, heads, CHUNK, CHUNK)
    parts = {name: r.new_empty(wide) for name in ("w", "r", "b", "k")}
    parts |= {name: r.new_empty(square) for name in ("q", "p_rk", "p_rb")}
    parts["m"] = r.new_empty(square if backward else 0)
    parts["decay"] = r.new_empty(plan.num_chunks, heads, size, dtype=torch.float32)

    def run(config: Config) -> None:
        prepare[(heads, -(-plan.num_chunks // PER_PROGRAM))](
            r,
            log_decay,
            k,
            a,
            b,
            plan.chunks,
            *(parts[name] for name in ("w", "r", "b", "k", "q", "p_rk", "p_rb", "m", "decay")),
            plan.num_chunks,
            H=heads,
            H_A=a.shape[1],
            PER=PER_PROGRAM,
            # On AMD a chunk on its way would take shared memory from other programs.
            STAGES=2 if torch.version.hip is None else 1,
            BACKWARD=backward,
            **_constants(r),
            **config,
        )

    if plan.num_chunks:
        _tuned("wkv7 prepare", r, PREPARE, run, size=size, work=plan.num_chunks * heads)
    return parts


def _walk(
    parts: dict[str, Tensor], x: Tensor, plan: Plan, initial: Tensor | None, *, reverse: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """O or dV [T, H, V], the last state [N, H, K, V], all states [NT, H, V, K], and U or dY [NT, H, C, V]."""
    heads, size, value_size = parts["w"].shape[1], parts["w"].shape[3], x.shape[2]
    y = x.new_empty(x.shape[0], heads, value_size)
    final = x.new_empty(len(plan.lengths), heads, size, value_size, dtype=torch.float32)
    kept = parts["w"].new_empty((plan.num_chunks, heads, value_size, size) if keep else 0)
    inner = parts["w"].new_empty((plan.num_chunks, heads, CHUNK, value_size) if keep else 0)

    def run(config: Config) -> None:
        walk[(-(-value_size // config["BV"]) * heads * len(plan.lengths),)](
            *(parts[name] for name in ("bwkr" if reverse else "wbrk")),
            *(parts[name] for name in ("decay", "q", "p_rk", "p_rb", "m")),
            x,
            y,
            inner,
            kept,
            final if initial is None else initial.contiguous(),
            final,
            plan.cu_seqlens,
            plan.cu_chunks,
            H=heads,
            H_X=x.shape[1],
            V=value_size,
            REVERSE=reverse,
            KEEP=keep,
            HAS_INITIAL=initial is not None,
            **(_constants(x) | {"K": size}),
            **config,
        )

    if plan.lengths:
        _tuned("wkv7 walk", x, WALK, run, size=size, work=plan.num_chunks * heads)
    return y, final, kept, inner
