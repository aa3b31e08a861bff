"""The RWKV-7 recurrence in chunks: matrix products in PyTorch, forward and a backward written by hand.

Inside a chunk of C tokens the recurrence becomes products of C x K matrices and one unit-triangular solve
(hxa079.md (18) to (21)), so only the state has to walk, one small step ``S_end = M S + N`` per chunk, with
M and N known for every chunk before the state is.

Chunks are worked on in blocks (``chunk_layout``) that reuse one set of buffers: the work then stays in a
core's cache and touches little fresh memory, whose page faults can cost more than the arithmetic. The
backward walks the blocks in reverse from the states at chunk boundaries, the only thing kept, and computes
the rest again.

Keys that repeat make (I - P)^-1 hard. It is solved by substitution: the product (I + P)(I + P^2).. is wrong
for 32 near-identical keys. Scaled vectors grow with exp(-sum of log_decay) over a chunk: hxa079's bound of
0.607 a token gives e^20 for 32 tokens, far inside fp32. Left out: decays without such a bound (a mean
log_decay below -2.7 a token overflows), and derivatives of the gradients.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrwkv.kernels.wkv7.chunk_layout import Block, Layout, plan

# Tokens per chunk. On a CPU 32 is as fast as 16 at K = 32 and as 64 at K = 128, and slower than neither
# between (benchmarks/wkv7_cpu.py); against 16 it halves the states that are kept.
CHUNK = 32
# Elements of one [C, K] operand of all chunks of a block. On a CPU: about 5 MB of buffers, near the
# second-level cache. On a GPU: enough work for every launch, and a bound on the scratch memory of a long
# prefill.
CPU_BLOCK_ELEMENTS = 2**16
GPU_BLOCK_ELEMENTS = 2**25


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
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over packed sequences; the contract is ``hrwkv.kernels.wkv7.wkv7``'s.

    Args:
        r: ``[T, H, K]``, as ``log_decay``, ``k``, ``a`` and ``b``.
        log_decay: logarithm of the decay.
        k: key.
        v: ``[T, H, V]`` value; fp64 values are computed in fp64, all others in fp32.
        a: minus the normalised key.
        b: normalised key times the in-context learning rate.
        cu_seqlens: unused, ``lengths`` say the same on the host.
        lengths: the N sequence lengths.
        initial_state: ``[N, H, K, V]`` or None.
        chunk: tokens per chunk, at least 2.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    elements = GPU_BLOCK_ELEMENTS if v.is_cuda else CPU_BLOCK_ELEMENTS
    per_chunk = max(chunk * k.shape[1] * max(k.shape[2], v.shape[2]), 1)
    layout = plan(lengths, chunk=chunk, block_chunks=elements // per_chunk, device=v.device)
    if initial_state is None:
        state = v.new_zeros((len(lengths), *k.shape[1:], v.shape[-1]), dtype=dtype)
    else:
        state = layout.sort(initial_state.to(dtype))
    inputs = (r, log_decay, k, v, a, b)
    with torch.autocast(v.device.type, enabled=False):  # half precision would ruin the scaled products
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, state)):
            o, final_state = _ChunkedWkv7.apply(*inputs, state, layout, chunk)
        else:
            o, final_state, _ = _forward(inputs, state, layout=layout, chunk=chunk, keep=False)
    return o, layout.unsort(final_state)


class _ChunkedWkv7(torch.autograd.Function):
    """Ties ``_forward`` and ``_backward`` together; keeps the inputs and the states at chunk boundaries."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        r: Tensor,
        log_decay: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        state: Tensor,
        layout: Layout,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        inputs = (r, log_decay, k, v, a, b)
        o, final_state, kept = _forward(inputs, state, layout=layout, chunk=chunk, keep=True)
        ctx.save_for_backward(*inputs, *kept)
        ctx.layout, ctx.chunk = layout, chunk
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal_state: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        saved = ctx.saved_tensors  # once: under gradient checkpointing a second look is refused
        inputs, kept = saved[:6], saved[6:]
        with torch.autocast(do.device.type, enabled=False):
            grads, dstate = _backward(inputs, kept, do, dfinal_state, layout=ctx.layout, chunk=ctx.chunk)
        return *grads, dstate, None, None


class _Scratch:
    """Constant matrices, and buffers by name that are allocated for the largest block and then reused."""

    def __init__(self, *, chunk: int, num_chunks: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_chunks, self.dtype, self.device = num_chunks, dtype, device
        self.buffers: dict[str, Tensor] = {}
        ones = torch.ones(chunk, chunk, dtype=dtype, device=device)
        lower, strict = ones.tril(), ones.tril(-1)
        self.identity = lower - strict
        self.mask = torch.cat([torch.cat([strict, strict], dim=1), torch.cat([lower, lower], dim=1)])
        self.signed_mask = self.mask.clone()
        self.signed_mask[:chunk, :chunk].neg_()
        # Gradient of log_decay at t: from a at later tokens only, from r, b and k at t and later.
        self.sum_left = torch.cat([strict.mT, lower.mT], dim=1)
        self.sum_right = -torch.cat([lower.mT, lower.mT], dim=1)

    def take(self, name: str, *shape: int) -> Tensor:
        """Give the buffer ``name``; from block to block only the first size may change."""
        if name not in self.buffers:
            self.buffers[name] = torch.empty(
                (self.num_chunks, *shape[1:]), dtype=self.dtype, device=self.device
            )
        return self.buffers[name][: shape[0]]


class _Chunks:
    """The matrices of a block's n = steps * sequences * heads chunks, hxa079.md (18) and (19).

    ``left [n, 2C, K]`` holds A^ over R^, ``right [n, 2C, K]`` holds B^ over K^ and ``scores [n, 2C, 2C]``
    the masked left right^T, that is -P and Q over X and Y. ``solved [n, C, C]`` is (I - P)^-1 and ``key_map
    [n, C, K]`` is (I - P)^-1 A^. ``values [n, 2C, V]`` holds U over V once ``solve_values`` has run.
    ``decay [n, C, K]`` is exp(G), with G the sum of log_decay up to a token.
    """

    def __init__(self, inputs: Sequence[Tensor], *, block: Block, scratch: _Scratch) -> None:
        r, log_decay, k, v, a, b = inputs
        size, (_, heads, key_size) = block.chunk, r.shape
        self.lead = (block.num_steps, block.num, heads)
        self.size, self.n, self.scratch = size, block.num_steps * block.num * heads, scratch
        self.width = block.num * heads  # chunks of one step
        self.decay = scratch.take("decay", self.n, size, key_size)
        self.left = scratch.take("left", self.n, 2 * size, key_size)
        self.right = scratch.take("right", self.n, 2 * size, key_size)
        self.values = scratch.take("values", self.n, 2 * size, v.shape[2])

        decay, left, right = (self.split(x) for x in (self.decay, self.left, self.right))
        torch.cumsum(block.read(log_decay, zero_padding=True), dim=-2, dtype=decay.dtype, out=decay)
        decay.exp_()
        a = block.read(a)
        left[..., 0, :] = a[..., 0, :]  # a reads the state before the decay, so it lags by one token
        torch.mul(a[..., 1:, :], decay[..., :-1, :], out=left[..., 1:size, :])
        torch.mul(block.read(r), decay, out=left[..., size:, :])
        torch.div(block.read(b, zero_padding=True), decay, out=right[..., :size, :])
        torch.div(block.read(k, zero_padding=True), decay, out=right[..., size:, :])
        self.split(self.values)[..., size:, :] = block.read(v)
        self._solve_keys()

    def _solve_keys(self) -> None:
        size, n, take = self.size, self.n, self.scratch.take
        self.scores = torch.bmm(self.left, self.right.mT, out=take("scores", n, 2 * size, 2 * size))
        self.scores.mul_(self.scratch.signed_mask)
        self.solved = torch.linalg.solve_triangular(
            take("corner", n, size, size).copy_(self.scores[:, :size, :size]),
            self.scratch.identity.expand(n, -1, -1),
            upper=False,
            unitriangular=True,
            out=take("solved", n, size, size).mT,  # the solver works by columns
        )
        key_map = take("key_map", n, size, self.left.shape[-1])
        self.key_map = torch.bmm(self.solved, self.left[:, :size], out=key_map)

    def split(self, x: Tensor) -> Tensor:
        """View ``[n, ...]`` as ``[steps, sequences, heads, ...]``."""
        return x.unflatten(0, self.lead)

    def solve_values(self, starts: Tensor | None) -> None:
        """Fill U = (I - P)^-1 (A^ S + Q V), (19), for start states S ``[n, K, V]``; S = 0 for None."""
        size, shape = self.size, (self.n, self.size, self.values.shape[-1])
        mixed = self.scratch.take("mixed", *shape)
        torch.bmm(self.scores[:, :size, size:], self.values[:, size:], out=mixed)
        if starts is not None:
            mixed.baddbmm_(self.left[:, :size], starts)
        self.values[:, :size] = torch.bmm(self.solved, mixed, out=self.scratch.take("u", *shape))

    def output_map(self) -> Tensor:
        """Give E = R^ + X (I - P)^-1 A^ ``[n, C, K]``: the outputs' share of the start state, (20)."""
        out = self.scratch.take("output_map", self.n, self.size, self.left.shape[-1])
        corner = self.scores[:, self.size :, : self.size]
        return torch.baddbmm(self.left[:, self.size :], corner, self.key_map, out=out)

    def state_map(self, diagonal: Tensor) -> Tensor:
        """Give diag + B^T (I - P)^-1 A^ ``[n, K, K]``: the end state's share of the start state, (21)."""
        key_size = self.left.shape[-1]
        out = self.scratch.take("state_map", self.n, key_size, key_size)
        torch.bmm(self.right[:, : self.size].mT, self.key_map, out=out)
        out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
        return out


def _make_scratch(layout: Layout, *, chunk: int, heads: int, like: Tensor) -> _Scratch:
    # One step more than the largest block, for its states: one at either end of every chunk.
    num_chunks = max(((block.num_steps + 1) * block.num * heads for block in layout.blocks), default=0)
    return _Scratch(chunk=chunk, num_chunks=num_chunks, dtype=like.dtype, device=like.device)


def _forward(
    inputs: Sequence[Tensor], state: Tensor, *, layout: Layout, chunk: int, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Give the outputs, the final states and, with ``keep``, every block's states at chunk boundaries."""
    v = inputs[3]
    scratch = _make_scratch(layout, chunk=chunk, heads=v.shape[1], like=state)
    out, walking, kept = layout.empty(v), state.flatten(0, 1).clone(), []
    for block in layout.blocks:
        chunks = _Chunks(inputs, block=block, scratch=scratch)
        shape = (chunks.n + chunks.width, *walking.shape[1:])
        states = walking.new_empty(shape) if keep else scratch.take("states", *shape)
        _walk(chunks, states, walking=walking)
        o = scratch.take("mixed", chunks.n, chunk, v.shape[2])
        torch.bmm(chunks.scores[:, chunk:], chunks.values, out=o)
        o.baddbmm_(chunks.output_map(), states[: -chunks.width])
        target = block.target(out)
        target.copy_(chunks.split(o))
        block.commit(out, target)
        if keep:
            kept.append(states)
    return layout.finish(out), walking.view(state.shape), kept


def _walk(chunks: _Chunks, states: Tensor, *, walking: Tensor) -> None:
    """Fill ``states [n + width, K, V]`` step by step from ``walking``, leave the last ones there; (21)."""
    width = chunks.width
    chunks.solve_values(None)
    ending = chunks.decay[:, -1]  # [n, K]
    chunks.right.mul_(ending.unsqueeze(1))
    state_map = chunks.state_map(ending)
    states[:width] = walking[:width]
    torch.bmm(chunks.right.mT, chunks.values, out=states[width:])
    for at in range(0, chunks.n, width):
        states[at + width : at + 2 * width].baddbmm_(state_map[at : at + width], states[at : at + width])
    walking[:width] = states[-width:]


def _backward(
    inputs: Sequence[Tensor],
    kept: Sequence[Tensor],
    do: Tensor,
    dfinal_state: Tensor,
    *,
    layout: Layout,
    chunk: int,
) -> tuple[list[Tensor], Tensor]:
    """Give the gradients of the six inputs and of the initial state, hxa079.md (22)."""
    scratch = _make_scratch(layout, chunk=chunk, heads=do.shape[1], like=dfinal_state)
    walking = dfinal_state.flatten(0, 1).clone()
    grads = [layout.empty(x) for x in inputs]
    for block, states in zip(reversed(layout.blocks), reversed(kept), strict=True):
        chunks = _Chunks(inputs, block=block, scratch=scratch)
        chunks.solve_values(states[: -chunks.width])
        outer = scratch.take("outer", *chunks.values.shape)  # dU' over dO, [n, 2C, V]
        chunks.split(outer)[..., chunk:, :] = block.read(do, zero_padding=True)
        dends, dending = _walk_back(chunks, states, outer[:, chunk:], walking=walking)
        targets = [block.target(x) for x in grads]
        _chunk_grads(chunks, states[: -chunks.width], outer, dends=dends, dending=dending, targets=targets)
        for out, target in zip(grads, targets, strict=True):
            block.commit(out, target)
    return [layout.finish(x) for x in grads], walking.view(dfinal_state.shape)


def _walk_back(chunks: _Chunks, states: Tensor, do: Tensor, *, walking: Tensor) -> tuple[Tensor, Tensor]:
    """Carry the state's gradient from the block's end to its start.

    Returns:
        ``[n, K, V]`` gradient of ``S + B^T U + K^T V``, and ``[n, K]`` gradient of the chunk's total log
        decay.
    """
    width, (n, _, key_size), value_size = chunks.width, chunks.left.shape, do.shape[2]
    dstarts = chunks.scratch.take("dstarts", n, key_size, value_size)
    torch.bmm(chunks.output_map().mT, do, out=dstarts)
    state_map = chunks.state_map(torch.ones((), dtype=do.dtype, device=do.device))
    ending = chunks.decay[:, -1]
    dends = chunks.scratch.take("dends", n, key_size, value_size)
    dstate = walking[:width]
    for at in range(n - width, -1, -width):
        here = slice(at, at + width)
        torch.mul(dstate, ending[here].unsqueeze(-1), out=dends[here])
        dstate = dstarts[here].baddbmm_(state_map[here].mT, dends[here])
    walking[:width] = dstate
    # The end state is the decayed sum, so its product with the undecayed gradient is that of (22) times the
    # decay.
    dending = torch.mul(states[width:], dends, out=dstarts).sum(-1).div_(ending)
    return dends, dending


def _chunk_grads(
    chunks: _Chunks,
    starts: Tensor,
    outer: Tensor,
    *,
    dends: Tensor,
    dending: Tensor,
    targets: Sequence[Tensor],
) -> None:
    """Write the gradients of r, log_decay, k, v, a and b of a block into ``targets``; uses the buffers up."""
    n, size, key_size = chunks.n, chunks.size, chunks.left.shape[2]
    left, right, scores, values, take = (
        chunks.left,
        chunks.right,
        chunks.scores,
        chunks.values,
        chunks.scratch.take,
    )
    passed = torch.bmm(right, dends, out=take("passed", *values.shape))
    mixed = take("mixed", n, size, values.shape[2])
    torch.baddbmm(passed[:, :size], scores[:, size:, :size].mT, outer[:, size:], out=mixed)
    outer[:, :size] = torch.bmm(chunks.solved.mT, mixed, out=take("u", *mixed.shape))
    dv = torch.baddbmm(passed[:, size:], scores[:, :, size:].mT, outer, out=mixed)
    dscores = torch.bmm(outer, values.mT, out=scores).mul_(chunks.scratch.mask)
    dleft = torch.bmm(outer, starts.mT, out=take("dleft", *left.shape)).baddbmm_(dscores, right)
    dright = torch.bmm(values, dends.mT, out=take("dright", *right.shape)).baddbmm_(dscores.mT, left)

    dr, dlog_decay, dk, dvalue, da, db = targets
    decay, split_left, split_right = (chunks.split(x) for x in (chunks.decay, dleft, dright))
    torch.mul(split_left[..., size:, :], decay, out=dr)
    torch.div(split_right[..., size:, :], decay, out=dk)
    torch.div(split_right[..., :size, :], decay, out=db)
    da[..., 0, :] = split_left[..., 0, :]
    torch.mul(split_left[..., 1:size, :], decay[..., :-1, :], out=da[..., 1:, :])
    dvalue.copy_(chunks.split(dv))

    # Each scaled vector is exp(+-G) times its input, so x^ dx^ is its share of dG; dG sums up to d log_decay.
    summed = take("key_map", n, size, key_size)
    torch.bmm(chunks.scratch.sum_left.expand(n, -1, -1), left.mul_(dleft), out=summed)
    summed.baddbmm_(chunks.scratch.sum_right.expand(n, -1, -1), right.mul_(dright))
    torch.add(chunks.split(summed), chunks.split(dending).unsqueeze(-2), out=dlog_decay)
