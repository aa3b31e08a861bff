"""Does every Triton kernel compile for a chip that is not at hand, within its registers and shared memory?

    python benchmarks/compile_kernels.py              # K = 64, bf16, sm_90 and gfx942: a minute of a core
    python benchmarks/compile_kernels.py --all        # sizes, dtypes, forms, candidates: an hour and a half

Compiling needs no GPU: Triton brings both vendors' compilers. The kernels' own launchers run, with small CPU
tensors, and a driver that names another chip ends each launch after the compiler. So what is compiled is what
would run there; on AMD it also depends on whether tensors are beyond 2 GB (``--large``).

- registers: of a thread, AMD's accumulation registers among them.
- spilled: bytes a thread keeps in memory for want of registers.
- shared: bytes a program, at most ``Chip.shared``.
- waves: warps that a multiprocessor holds at once, by registers and shared memory, at most ``Chip.waves``.
- instructions: of the whole code, loops counted once (AMD).

Nothing here is a time. The last line is JSON; the exit status is 1 if a kernel does not compile or fit.
"""

import argparse
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

NUM_TOKENS = 40
# Query heads, KV heads and their group differ from one another and from the sizes.
HEADS, KV_HEADS = 8, 2
# value residual, key residual, key scale, bonus: hxa079.md, section 7
VARIANTS = {
    "hxa079": ("gated", True, "log_log", True),
    "hxa07a": ("none", False, "log_log", False),
    "hxa07c": ("low_rank", False, "decay", False),
    "radlads": ("gated_repeated", False, "decay", False),
}


class Chip(NamedTuple):
    """A multiprocessor (NVIDIA) or compute unit (AMD), from the vendors' tables."""

    target: tuple[str, str | int, int]  # of Triton: backend, architecture, threads a warp
    shared: int  # bytes a program may have
    shared_in_all: int
    registers: int  # that all waves of a lane have together
    register_step: int
    waves: int  # at most, of all programs
    schedulers: int  # that the registers are split among


CHIPS = {
    "sm_90": Chip(("cuda", 90, 32), 232448, 233472, 512, 8, 64, 4),
    "gfx90a": Chip(("hip", "gfx90a", 64), 65536, 65536, 512, 8, 32, 4),  # MI200
    "gfx942": Chip(("hip", "gfx942", 64), 65536, 65536, 512, 8, 32, 4),  # MI300
    "gfx950": Chip(("hip", "gfx950", 64), 163840, 163840, 512, 8, 32, 4),  # MI350
}


class Case(NamedTuple):
    """One call of a launcher, named for the reader."""

    label: str
    function: str  # of this file
    arguments: dict[str, Any]


def resident(chip: Chip, registers: int, shared: int, warps: int) -> int:
    """Waves that a multiprocessor holds at once."""
    step = chip.register_step
    by_registers = chip.registers // max(-(-registers // step) * step, step) * chip.schedulers
    programs = min(chip.waves, by_registers) // warps
    if shared:
        reserved = 1024 if chip.target[0] == "cuda" else 0
        programs = min(programs, chip.shared_in_all // (shared + reserved))
    return programs * warps


def measured(kernel: Any, chip: Chip) -> dict[str, int]:
    """What a compiled kernel takes of a chip, and the waves that this leaves room for."""
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    found = {"warps": warps, "shared": shared}
    if chip.target[0] == "hip":
        text = kernel.asm["amdgcn"]
        names = (r"\.vgpr_count:\s*", r"\.private_segment_fixed_size:\s*")
        found["instructions"] = len(re.findall(r"^\t[vs]_|^\t(?:ds|global|buffer|flat|scratch)_", text, re.M))
    else:
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [str(tool), "-res-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names = ("REG:", "STACK:")
    found["registers"], found["spilled"] = (int(re.findall(rf"{name}(\d+)", text)[-1]) for name in names)
    return found | {"waves": resident(chip, found["registers"], shared, warps)}


class Compiler:
    """Stands where Triton looks for a GPU, and compiles what it is told to launch."""

    def __init__(self, name: str, *, large: bool) -> None:
        """Name the chip; ``large`` compiles as for tensors beyond 2 GB."""
        import triton
        from triton.backends.amd.compiler import HIPBackend
        from triton.backends.compiler import GPUTarget
        from triton.runtime.jit import JITFunction

        self.chip = CHIPS[name]
        self.rows: list[dict[str, Any]] = []
        self._target, self._launch = GPUTarget(*self.chip.target), JITFunction.run
        if self.chip.target[0] == "hip":
            torch.version.hip = "offline"  # read when hrwkv's kernels are imported, after this
            HIPBackend.is_within_2gb = staticmethod(lambda argument: not large)
        triton.runtime.driver.set_active(self)
        JITFunction.run = lambda *arguments, **words: self.compile(*arguments, **words)

    def get_current_target(self) -> Any:
        """The chip to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """Any number."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Any number."""
        return 0

    def compile(self, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **words: Any) -> None:
        """Take the place of a launch: keep a row of what was compiled, or of why it was not."""
        if "HALF" in words:  # the launcher's choice for the interpreter, which has CPU tensors as well
            words["HALF"] = arguments[0].dtype != torch.float32
        names = ("TK", "BV", "BK", "STAGES", "num_warps", "maxnreg", "waves_per_eu", "matrix_instr_nonkdim")
        tuned = {name: words[name] for name in names if name in words}
        row: dict[str, Any] = {"kernel": f"{kernel.fn.__module__.split('kernels.')[1]}.{kernel.fn.__name__}"}
        row["config"] = ", ".join(f"{name}={value}" for name, value in tuned.items())
        start = time.perf_counter()
        try:
            compiled = self._launch(kernel, *arguments, grid=grid, warmup=True, **words)
            row |= measured(compiled, self.chip) | {"hash": compiled.metadata.hash}
            if row["shared"] > self.chip.shared:
                row["failed"] = f"{row['shared']} bytes of shared memory, {self.chip.shared} at most"
        # What the compilers raise has no common base.
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
        self.rows.append(row | {"seconds": round(time.perf_counter() - start, 1)})


def tensors(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Leaves that need gradients."""
    return [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def mixer_case(
    variant: str, *, size: int, dtype: torch.dtype, layer_0: bool, qk_norm: bool, rope: bool
) -> dict[str, Any]:
    """Arguments of ``mix`` and ``mixer_decode`` for a layer of this variant."""
    from hrwkv.kernels.mix.naive import Form, Rows, Weights

    value_residual, key_residual, key_scale, bonus = VARIANTS[variant]
    value_heads = KV_HEADS if value_residual == "gated" else HEADS
    gates_value = value_residual in ("gated", "gated_repeated")
    q, kv, value = ((NUM_TOKENS, heads, size) for heads in (HEADS, KV_HEADS, value_heads))
    r, k, v, decay, iclr, gate, own_value, own_key = tensors(dtype, q, kv, kv, q, q, q, value, kv)
    w0, a0, v0, k0, r_k = tensors(dtype, *((n * size,) for n in (HEADS, HEADS, value_heads, KV_HEADS, HEADS)))
    r_norm, k_norm = tensors(dtype, (size,), (size,))
    reads_value = value_residual == "low_rank" or (gates_value and not layer_0)
    return {
        "rows": Rows(
            *(r, k, v, decay, iclr, gate),
            value=own_value if reads_value else None,
            key=own_key if key_residual and not layer_0 else None,
        ),
        "weights": Weights(
            *(w0, a0),
            v0=v0 if gates_value else None,
            k0=k0 if key_residual else None,
            r_k=r_k if bonus else None,
            r_norm=r_norm if qk_norm else None,
            k_norm=k_norm if qk_norm else None,
        ),
        "form": Form(value_residual=value_residual, key_scale=key_scale, norm_eps=1e-6),
        "rope": (torch.zeros(NUM_TOKENS, size // 2), torch.zeros(NUM_TOKENS, size // 2)) if rope else None,
        "first": None if layer_0 else tuple(tensors(dtype, value, kv)),
    }


def backward(*outputs: Tensor | None) -> None:
    """Run the backward pass of everything at once."""
    given = [x for x in outputs if x is not None and x.requires_grad]
    torch.autograd.backward(given, [torch.zeros_like(x) for x in given])


def compile_wkv7(*, size: int, dtype: torch.dtype, log_decay: torch.dtype, candidates: bool) -> None:
    """The chunked recurrence, for inference and for training, with each candidate of tuning."""
    from hrwkv.kernels.wkv7 import chunk_triton

    lists = {name: getattr(chunk_triton, name) for name in ("PREPARE", "WALK", "GRADIENTS")}
    most = max(map(len, lists.values())) if candidates else 1
    q, kv = (NUM_TOKENS, HEADS, size), (NUM_TOKENS, KV_HEADS, size)
    lengths = {"cu_seqlens": torch.tensor([0, NUM_TOKENS]), "lengths": [NUM_TOKENS]}
    for i in range(most):
        # One candidate each; a shorter list, or one that does not divide this size, gives its first again.
        chosen = {
            name: [of[i] if i < len(of) and size % of[i]["TK"] == 0 else of[0]] for name, of in lists.items()
        }
        r, k, v, a, b = tensors(dtype, q, q, kv, kv, q)
        decay, state = *tensors(log_decay, q), torch.zeros(1, HEADS, size, size)
        with mock.patch.multiple(chunk_triton, **chosen):
            with torch.no_grad():
                chunk_triton.wkv7(r, decay, k, v, a, b, initial_state=state, **lengths)
            backward(*chunk_triton.wkv7(r, decay, k, v, a, b, **lengths))


@torch.no_grad()
def compile_decode(*, size: int, dtype: torch.dtype, state_dtype: torch.dtype, block_v: int) -> None:
    """The recurrence of one step alone."""
    from hrwkv.kernels.wkv7 import decode

    q, kv = (NUM_TOKENS, HEADS, size), (NUM_TOKENS, KV_HEADS, size)
    inputs = tensors(dtype, q, q, q, kv, kv, q)
    decode.wkv7_decode(
        *inputs,
        state=torch.zeros(NUM_TOKENS, HEADS, size, size, dtype=state_dtype),
        state_slots=torch.arange(NUM_TOKENS, dtype=torch.int32),
        launch=decode.Launch(block_v=block_v, block_k=32, num_warps=2),
    )


@torch.no_grad()
def compile_mixer_decode(*, state_dtype: torch.dtype, block_v: int, **words: Any) -> None:
    """The mixer's step, alone and of several tokens a sequence."""
    from hrwkv.kernels.wkv7 import decode

    for cu_seqlens in (None, torch.arange(NUM_TOKENS + 1, dtype=torch.int32)):
        decode.mixer_decode(
            **mixer_case(**words),
            state=torch.zeros(NUM_TOKENS, HEADS, words["size"], words["size"], dtype=state_dtype),
            state_slots=torch.arange(NUM_TOKENS, dtype=torch.int32),
            cu_seqlens=cu_seqlens,
            launch=decode.Launch(block_v=block_v, block_k=32, num_warps=1),
        )


def compile_mix(**words: Any) -> None:
    """The mixer's elementwise work before the recurrence."""
    from hrwkv.kernels.mix import fused_mix

    mixed, bonus, first = fused_mix.mix(**mixer_case(**words))
    backward(*mixed, *(() if bonus is None else (bonus,)), *(first or ()))


def compile_finish(*, size: int, dtype: torch.dtype, bonus: bool) -> None:
    """The mixer's elementwise work after the recurrence."""
    from hrwkv.kernels.mix import fused_finish

    q, kv = (NUM_TOKENS, HEADS, size), (NUM_TOKENS, KV_HEADS, size)
    o, v, gate = tensors(dtype, q, kv, q)
    (sums,) = tensors(torch.float32, q[:2])
    backward(fused_finish.finish(o, v, gate, bonus=sums if bonus else None))


@torch.no_grad()
def compile_attention(*, size: int, dtype: torch.dtype, group: int, tokens: int, block_size: int) -> None:
    """Attention to a paged cache, short and split among programs, and the store into it."""
    from hrwkv.kernels.attention import paged

    lengths = [tokens] * 2
    (q,), (cache,) = (
        tensors(dtype, (2 * tokens, group * KV_HEADS, size)),
        tensors(dtype, (64, block_size, KV_HEADS, size)),
    )
    for blocks in (1, 64):
        paged.paged_attention(
            q,
            cache,
            cache,
            cu_seqlens=torch.tensor([0, tokens, 2 * tokens], dtype=torch.int32),
            lengths=lengths,
            block_tables=torch.zeros(2, blocks * 256 // block_size, dtype=torch.int32),
            context_lens=torch.full((2,), tokens, dtype=torch.int32),
        )
    k = cache.view(-1, KV_HEADS, size)[: 2 * tokens]
    paged.store_kv(k, k, cache, cache, slot_mapping=torch.arange(2 * tokens))


def compile_norm(*, width: int, dtype: torch.dtype) -> None:
    """RMSNorm, alone and of a sum, with a trained and with a frozen weight."""
    from hrwkv.kernels.norm import fused

    for trained in (True, False):
        x, delta, weight = tensors(dtype, *[(NUM_TOKENS, width)] * 2, (width,))
        backward(fused.rms_norm(x, weight.requires_grad_(trained), eps=1e-6))
        backward(*fused.add_rms_norm(x, delta, weight=weight, eps=1e-6))


@torch.no_grad()
def compile_swiglu(*, dtype: torch.dtype) -> None:
    """An MLP's gate, both ways."""
    from hrwkv.kernels.swiglu import fused

    grad, gate, up = tensors(dtype, *[(NUM_TOKENS, 512)] * 3)
    fused.swiglu_gradients(grad, fused.swiglu(gate, up), up)


def compile_low_rank(*, dtype: torch.dtype) -> None:
    """Second factors of the low-rank products."""
    from hrwkv.kernels.low_rank import fused

    inner = tensors(dtype, *((NUM_TOKENS, rank) for rank in (96, 64, 320)))
    up = tensors(dtype, *((rank, 512) for rank in (96, 64, 320)))
    fused.expand(inner, up, activations=("tanh", "none", "sigmoid"))


def compile_rope(*, size: int, dtype: torch.dtype) -> None:
    """A teacher's RoPE."""
    from hrwkv.kernels.rope import fused

    (x,) = tensors(dtype, (NUM_TOKENS, HEADS, size))
    fused.rotate(x, torch.zeros(NUM_TOKENS, size // 2), torch.zeros(NUM_TOKENS, size // 2))


@torch.no_grad()
def compile_matmul(*, dtype: torch.dtype) -> None:
    """Rows into 8 bits."""
    from hrwkv.kernels.matmul import fused

    x, gate, up = tensors(dtype, *[(NUM_TOKENS, 512)] * 3)
    columns = torch.ones(512)
    fused.quantise_rows(x)
    values, _ = fused.quantise_rows(x, columns=columns)
    fused.swiglu_rows(gate, up)
    fused.swiglu_gradient_rows(x, gate, up, gate_columns=columns, up_columns=columns)
    fused.transpose(values)


def compile_kl(*, gradient: torch.dtype | None, labels: bool, candidates: bool) -> None:
    """The losses, with each candidate of tuning."""
    from hrwkv.kernels.kl import fused

    for config in fused.CANDIDATES if candidates else fused.CANDIDATES[:1]:
        with mock.patch.object(fused, "CANDIDATES", (config,)):
            fused.distillation_terms(
                torch.zeros(NUM_TOKENS, 1024),
                torch.zeros(NUM_TOKENS, 1024),
                labels=torch.zeros(NUM_TOKENS, dtype=torch.int64) if labels else None,
                kl_scale=1.0,
                ce_scale=1.0,
                gradient_dtype=gradient,
            )


def compile_sampling(*, top_p: bool, min_p: bool) -> None:
    """The edge of top_k and top_p."""
    from hrwkv.kernels.sampling import search

    row = torch.zeros(4, 1)
    search.kept_edge(
        torch.zeros(4, 1024),
        top_k=torch.ones(4, 1, dtype=torch.int64),
        top_p=row if top_p else None,
        log_min_p=row if min_p else None,
    )


def cases(sizes: Sequence[int], dtypes: Sequence[torch.dtype], *, everything: bool) -> Iterator[Case]:
    """Every kernel at each head size and dtype; ``everything``: each form and candidate of it as well."""
    fp32, half = torch.float32, torch.bfloat16
    states, columns = ((fp32, half), (16, 32)) if everything else ((fp32,), (32,))
    for size, dtype in itertools.product(sizes, dtypes):
        label, at = f"K={size} {str(dtype).removeprefix('torch.')}", {"size": size, "dtype": dtype}
        for log_decay in (fp32, half) if everything and dtype == half else (fp32,):
            words = {"log_decay": log_decay, "candidates": everything}
            yield Case(label, "compile_wkv7", at | words)
        for state, block_v in itertools.product(states, columns):
            words = {"state_dtype": state, "block_v": block_v}
            yield Case(f"{label} state {str(state)[6:]}", "compile_decode", at | words)
        forms: list[tuple[str, bool, bool, bool]] = [("hxa079", False, False, True)]
        if everything:
            forms = list(itertools.product(VARIANTS, (False, True), (False, True), (False, True)))
        for variant, layer_0, qk_norm, rope in forms:
            words = {"variant": variant, "layer_0": layer_0, "qk_norm": qk_norm, "rope": rope}
            named = f"{label} {variant}{' first' * layer_0}{' norm' * qk_norm}{' rope' * rope}"
            yield Case(named, "compile_mix", at | words)
            usual = (layer_0, qk_norm, rope) == (False, False, True)
            for state, block_v in itertools.product(states if usual else states[:1], columns):
                more = words | {"state_dtype": state, "block_v": block_v}
                yield Case(f"{named} state {str(state)[6:]}", "compile_mixer_decode", at | more)
        for bonus in (True, False) if everything else (True,):
            yield Case(label, "compile_finish", at | {"bonus": bonus})
        for group, tokens in [(4, 1), (8, 4), (8, 16)] if everything else [(4, 1)]:
            for block_size in (256, 16) if everything else (256,):
                words = {"group": group, "tokens": tokens, "block_size": block_size}
                yield Case(f"{label} group {group} x {tokens}", "compile_attention", at | words)
        yield Case(label, "compile_rope", at)
    if fp32 not in dtypes:  # what AMD's compiler takes and refuses in products differs by dtype
        words = {"size": sizes[0], "dtype": fp32, "log_decay": fp32, "candidates": everything}
        yield Case(f"K={sizes[0]} float32", "compile_wkv7", words)
    for dtype in dtypes:
        label = str(dtype).removeprefix("torch.")
        for width in (64, 4096, 8192, 16384) if everything else (4096,):
            yield Case(f"D={width} {label}", "compile_norm", {"width": width, "dtype": dtype})
        yield Case(label, "compile_swiglu", {"dtype": dtype})
        yield Case(label, "compile_low_rank", {"dtype": dtype})
        yield Case(label, "compile_matmul", {"dtype": dtype})
    for gradient in (fp32, half, None) if everything else (half,):
        for labels in (True, False) if everything else (True,):
            words = {"gradient": gradient, "labels": labels, "candidates": everything}
            yield Case(f"gradient {str(gradient).removeprefix('torch.')}", "compile_kl", words)
    for top_p, min_p in [(True, True), (True, False), (False, False)] if everything else [(True, True)]:
        yield Case("", "compile_sampling", {"top_p": top_p, "min_p": min_p})


_COMPILERS: list[Compiler] = []


def start(chip: str, large: bool) -> None:
    """Make a worker's compiler; what it compiles for cannot change afterwards."""
    _COMPILERS.append(Compiler(chip, large=large))


def work(case: Case) -> list[dict[str, Any]]:
    """Compile one case; rows of what was compiled."""
    (compiler,) = _COMPILERS
    compiler.rows = []
    function: Callable[..., None] = globals()[case.function]
    try:
        function(**case.arguments)
    # A launcher that fails on the way is a finding, and the others go on.
    except Exception as error:
        compiler.rows.append({"kernel": case.function, "failed": f"{type(error).__name__}: {error}"[:300]})
    return [{"case": case.label, **row} for row in compiler.rows]


COLUMNS = (
    *("chip", "kernel", "case", "config", "warps"),
    *("registers", "spilled", "shared", "waves", "instructions"),
)


def show(row: dict[str, Any]) -> None:
    """Print a line of the table."""
    cells = [str(row.get(column, "")) for column in COLUMNS]
    print(f"| {' | '.join(cells)} | {row.get('failed', '')}", flush=True)


def main() -> None:
    """Compile, print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=["sm_90", "gfx942"], choices=CHIPS)
    parser.add_argument("--key-sizes", nargs="+", type=int, default=[64])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], help="bfloat16, float16, float32")
    parser.add_argument("--all", action="store_true", help="every head size, dtype, form and candidate")
    parser.add_argument("--only", default="", help="functions whose name holds this, such as wkv7")
    parser.add_argument("--large", action="store_true", help="AMD: as for tensors beyond 2 GB")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    if options.all:
        options.key_sizes, options.dtypes = [32, 64, 96, 128], ["bfloat16", "float16", "float32"]
    dtypes = [getattr(torch, name) for name in options.dtypes]
    chosen = [
        case
        for case in cases(options.key_sizes, dtypes, everything=options.all)
        if options.only in case.function
    ]
    begin, rows = time.perf_counter(), []
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    for chip in options.chips:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, context, start, (chip, options.large)) as pool:
            seen = set()
            for found in pool.map(work, chosen):
                for row in found:
                    # The same code compiled by two cases is told once.
                    identity = row.pop("hash", (row["kernel"], row["case"], row.get("config")))
                    if identity not in seen:
                        seen.add(identity)
                        rows.append({"chip": chip, **row})
                        show(rows[-1])
    failed = [row for row in rows if "failed" in row]
    report = {"seconds": round(time.perf_counter() - begin), "kernels": len(rows), "failed": len(failed)}
    print(json.dumps(report | {"rows": rows}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
