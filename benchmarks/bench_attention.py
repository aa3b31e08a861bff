"""How near is attention to what the memory and the matrix units of a GPU allow, and which form is fastest?

    python benchmarks/bench_attention.py                        # all parts: about 110 s, half of it compiling
    python benchmarks/bench_attention.py --quick                # K = 96, no flex_attention: about 35 s
    python benchmarks/bench_attention.py --only decode --sweep  # the decode kernel's launch parameters too
    python benchmarks/bench_attention.py --check-only           # equality; also in Triton's interpreter

``decode``: the paged kernel beside a gather of the blocks and PyTorch's attention; its floor is the time to
copy as many bytes as the context's keys and values have. ``store``: new keys and values to their slots beside
index_put; its floor counts them read and written. Both are CUDA graphs that walk over several layers' caches,
in decode larger than a GPU's cache. ``prefill``: later pieces of prompts, and a prompt of 32768 tokens in
pieces, beside PyTorch's kernels over gathered blocks. ``packed``: forms of causal attention over packed
sequences, forward, and forward with backward. The floor of these two is the time of the products (without
what a query may not see) at the rate of one large product. 64 heads, 8 KV heads, bf16. Each form is compared
with the fp64 definition before it is timed, and not timed if it differs. A case that fails is reported and
the others go on. Times are medians; ``ratio`` is against the first form of a shape; the last line is JSON,
and the exit status 1 if anything failed.
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from hrwkv.kernels.attention import naive, paged, paged_attention, sdpa, varlen_attention
from hrwkv.kernels.rates import copy_rate

HEADS, KV_HEADS, BLOCK_SIZE = 64, 8, 64
PARTS = ("decode", "store", "prefill", "packed")
COLUMNS = ("part", "shape", "form", "ms", "ratio", "floor_ms", "of_floor", "error")
TOLERANCE = 2e-2  # of the largest value: bf16 has 8 bits, weights are rounded to it before the second product
LAYER_BYTES = 512 * 2**20  # of the caches that one graph walks over
DECODE = {  # name: (new tokens of each sequence, contexts)
    "N=64 S=4096": ([1] * 64, [4096] * 64),
    "N=1 S=32768": ([1], [32768]),
    "N=8 S=4096": ([1] * 8, [4096] * 8),
    "N=64 S=256..7936": ([1] * 64, [256 + 7680 * n // 63 for n in range(64)]),
    "N=64 S=4096, 4 tokens": ([4] * 64, [4096] * 64),
}
PREFILL = {  # name: (new tokens of each sequence, contexts)
    "4096 of 32768": ([4096], [32768]),
    "2048 of 16384": ([2048], [16384]),
    "2048 in 5 pieces": ([1000, 500, 300, 200, 48], [9000, 500, 4300, 30000, 1048]),
}
PROMPT, PIECES = 32768, (2048, 4096, 8192)
PACKED = {
    "8x4096": [4096] * 8,
    "ragged": [9000, 120, 4096, 7, 2500, 6001, 1300, 5000, 33, 4711],  # 32768 tokens
    "1x32768": [32768],
}
SWEEP = [
    {"_TILE": tile, "_STAGES": stages, "_WARPS": warps, "_PROGRAMS": programs * 132}
    for tile, stages, warps in [(64, 5, 4), (64, 3, 4), (64, 7, 4), (128, 5, 4), (128, 3, 4), (32, 5, 2)]
    for programs in (2, 4, 8)
]
Row = dict[str, Any]


class Paged:
    """Queries and the caches of some layers that share one set of tables."""

    def __init__(
        self, lengths: Sequence[int], contexts: Sequence[int], *, size: int, layers: int, device: torch.device
    ) -> None:
        width = -(-max(contexts) // BLOCK_SIZE)
        shape = (layers, 2, width * len(contexts), BLOCK_SIZE, KV_HEADS, size)
        self.caches = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()
        self.q = torch.randn(sum(lengths), HEADS, size, device=device).bfloat16()
        self.indices: dict[str, Any] = {
            "cu_seqlens": bounds(lengths, device),
            "lengths": tuple(lengths),
            "block_tables": torch.randperm(shape[2], device=device).view(len(contexts), width),
            "context_lens": torch.tensor(contexts, device=device),
        }

    def calls(self, form: Callable[..., Tensor]) -> list[Callable[[], Tensor]]:
        """One call of a form for each layer."""
        return [functools.partial(form, self.q, *layer, **self.indices) for layer in self.caches]

    def error(self, form: Callable[..., Tensor]) -> float:
        """Difference from the definition in fp64 in layer 0, for the first and the last sequence."""
        o = form(self.q, *self.caches[0], **self.indices).split(list(self.indices["lengths"]))
        parts = self.q.split(list(self.indices["lengths"]))
        worst = 0.0
        for n in {0, len(parts) - 1}:
            one = slice(n, n + 1)
            expected = naive.paged_attention(
                parts[n].double(),
                *(self._cache_of(n, cache) for cache in self.caches[0]),
                cu_seqlens=self.indices["cu_seqlens"],
                lengths=(len(parts[n]),),
                block_tables=torch.arange(self.indices["block_tables"].shape[1]).unsqueeze(0),
                context_lens=self.indices["context_lens"][one],
            )
            worst = max(worst, relative_error(o[n], expected))
        return worst

    def _cache_of(self, n: int, cache: Tensor) -> Tensor:
        return cache[self.indices["block_tables"][n]].double()


def bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[N + 1] int32, where packed sequences start and end."""
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; NaN counts as infinite."""
    error = (found.double() - expected).abs().max() / expected.abs().max()
    return float(error.nan_to_num(float("inf")))


def require(error: float) -> float:
    """Refuse to time what is wrong."""
    if error > TOLERANCE:
        raise ArithmeticError(f"relative error {error:.1e}, at most {TOLERANCE:.0e} is allowed: not timed")
    return error


def graph_milliseconds(calls: Sequence[Callable[[], object]], *, replays: int = 15) -> float:
    """Median time of a call, in a CUDA graph of all of them."""
    for call in calls[:2]:  # compiles; the second launch shows what the first one's arguments did not
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    return statistics.median(times)


def eager_milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call that is long against its launch."""
    import triton.testing

    return float(triton.testing.do_bench(call, warmup=20, rep=150, return_mode="median"))


def matmul_rate(device: torch.device) -> float:
    """Operations in a millisecond of one bf16 product of 8192 x 8192 matrices."""
    x = torch.randn(8192, 8192, device=device).bfloat16()
    return 2 * 8192**3 / eager_milliseconds(functools.partial(torch.mm, x, x))


def attempt(row: Row, measure: Callable[[], Row]) -> Row:
    """Add what is measured to a row, or why it is not."""
    try:
        return row | measure()
    # Anything may fail in a peer: its compiler, its limits, memory. The other rows are still wanted.
    except Exception as error:
        return row | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def decode_rows(
    options: argparse.Namespace, *, rate: float, sizes: Sequence[int], device: torch.device
) -> Iterator[Row]:
    """The paged kernel, then a gather with PyTorch's attention."""
    for size in sizes:
        for name, (lengths, contexts) in DECODE.items():
            if size != 96 and name != "N=64 S=4096":
                continue
            num_bytes = sum(contexts) * KV_HEADS * size * 2 * 2
            layers = max(1, min(8, LAYER_BYTES // num_bytes))
            case = Paged(lengths, contexts, size=size, layers=layers, device=device)
            floor = num_bytes / rate
            for form, function in (("paged", paged.paged_attention), ("gather + sdpa", sdpa.paged_attention)):
                if options.quick and form != "paged" and name != "N=64 S=4096":
                    continue
                row = {"part": "decode", "shape": f"{name} K={size}", "form": form, "floor_ms": floor}
                yield attempt(row, functools.partial(_decode, case, function))


def _decode(case: Paged, form: Callable[..., Tensor]) -> Row:
    error = require(case.error(form))
    return {"error": error, "ms": graph_milliseconds(case.calls(form))}


def sweep_rows(*, rate: float, device: torch.device) -> Iterator[Row]:
    """The paged kernel with other launch parameters; the first is what it has."""
    for name in ("N=64 S=4096", "N=1 S=32768"):
        lengths, contexts = DECODE[name]
        num_bytes = sum(contexts) * KV_HEADS * 96 * 2 * 2
        layers = max(1, LAYER_BYTES // num_bytes)
        case = Paged(lengths, contexts, size=96, layers=layers, device=device)
        usual = {key: getattr(paged, key) for key in SWEEP[0]}
        for config in [usual, *SWEEP]:
            for key, value in config.items():
                setattr(paged, key, value)
            row = {
                "part": "sweep",
                "shape": f"{name} K=96",
                "form": json.dumps(config),
                "floor_ms": num_bytes / rate,
            }
            yield attempt(row, functools.partial(_decode, case, paged.paged_attention))
        for key, value in usual.items():
            setattr(paged, key, value)


def store_rows(*, rate: float, device: torch.device) -> Iterator[Row]:
    """The store of one token a sequence and of a prefill, K = 96."""
    for tokens in (64, 8192):
        k, v = torch.randn(2, tokens, KV_HEADS, 96, device=device).bfloat16()
        layers = 16
        caches = torch.zeros(layers, 2, 256, BLOCK_SIZE, KV_HEADS, 96, dtype=torch.bfloat16, device=device)
        slots = torch.randperm(256 * BLOCK_SIZE, device=device)[:tokens]
        floor = 4 * k.nbytes / rate
        for form, function in (("paged", paged.store_kv), ("index_put", _index_put)):
            row = {"part": "store", "shape": f"T={tokens} K=96", "form": form, "floor_ms": floor}
            yield attempt(row, functools.partial(_store, function, k, v, caches, slots))


def _index_put(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *, slot_mapping: Tensor) -> None:
    place = (slot_mapping // BLOCK_SIZE, slot_mapping % BLOCK_SIZE)
    k_cache.index_put_(place, k)
    v_cache.index_put_(place, v)


def _store(form: Callable[..., None], k: Tensor, v: Tensor, caches: Tensor, slots: Tensor) -> Row:
    caches.zero_()
    form(k, v, *caches[0], slot_mapping=slots)
    stored = caches[0][:, slots // BLOCK_SIZE, slots % BLOCK_SIZE]
    if not torch.equal(stored, torch.stack((k, v))) or caches[0].count_nonzero() != stored.count_nonzero():
        raise ArithmeticError("the cache does not hold what was stored: not timed")
    calls = [functools.partial(form, k, v, *layer, slot_mapping=slots) for layer in caches]
    return {"error": 0.0, "ms": graph_milliseconds(calls)}


def prefill_rows(
    options: argparse.Namespace, *, rate: float, sizes: Sequence[int], device: torch.device
) -> Iterator[Row]:
    """The package's choice for later pieces, the form with a mask, and cuDNN for one sequence."""
    for size in sizes:
        small_contexts = [150, 70, 333]
        small = Paged([30, 0, 200], small_contexts, size=size, layers=1, device=device)
        for name, (lengths, contexts) in PREFILL.items():
            case = Paged(lengths, contexts, size=size, layers=1, device=device)
            floor = attention_flops(lengths, contexts, size=size) / rate
            forms: dict[str, tuple[Paged, Callable[..., Tensor], Callable[..., Tensor]]] = {
                "chosen": (
                    small,
                    functools.partial(paged_attention, contexts=small_contexts),
                    functools.partial(paged_attention, contexts=contexts),
                ),
                "gather + mask": (small, sdpa.paged_attention, sdpa.paged_attention),
            }
            if len(lengths) == 1:
                one = Paged([200], [333], size=size, layers=1, device=device)
                forms["cuDNN, two parts"] = (one, cudnn_parts, cudnn_parts)
            for form, arguments in forms.items():
                row = {"part": "prefill", "shape": f"{name} K={size}", "form": form, "floor_ms": floor}
                yield attempt(row, functools.partial(_prefill, case, *arguments))
        for length in PIECES if not options.quick else PIECES[:1]:
            row = {"part": "prefill", "shape": f"{PROMPT} in pieces of {length} K={size}", "form": "chosen"}
            row["floor_ms"] = attention_flops([PROMPT], [PROMPT], size=size) / rate
            yield attempt(row, functools.partial(_prompt, length, size=size, device=device))


def attention_flops(lengths: Sequence[int], contexts: Sequence[int], *, size: int) -> float:
    """Operations of both products where a query sees itself and what is before."""
    pairs = zip(lengths, contexts, strict=True)
    return 4 * HEADS * size * sum(length * (context - length / 2) for length, context in pairs)


def _prefill(
    case: Paged, small: Paged, small_form: Callable[..., Tensor], form: Callable[..., Tensor]
) -> Row:
    error = require(small.error(small_form))
    (call,) = case.calls(form)
    return {"error": error, "ms": eager_milliseconds(call)}


def _prompt(length: int, *, size: int, device: torch.device) -> Row:
    """A whole prompt through one layer, piece after piece."""
    case = Paged([PROMPT], [PROMPT], size=size, layers=1, device=device)
    indices = case.indices | {"lengths": (length,), "cu_seqlens": bounds([length], device)}
    steps = []
    for end in range(length, PROMPT + 1, length):
        places = indices | {"context_lens": torch.tensor([end], device=device), "contexts": (end,)}
        queries = case.q[end - length : end]
        steps.append(functools.partial(paged_attention, queries, *case.caches[0], **places))
    return {"ms": eager_milliseconds(lambda: [step() for step in steps])}


def cudnn_parts(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, block_tables: Tensor, context_lens: Tensor, **_: object
) -> Tensor:
    """One sequence's earlier tokens without a mask, the new ones causally, joined by their sums."""
    length = len(q)
    k, v = (x[block_tables[0]].flatten(0, 1)[: int(context_lens)] for x in (k_cache, v_cache))
    q, k, v = (x.unsqueeze(0).transpose(1, 2) for x in (q, k, v))
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    parts = [(k[:, :, :-length], v[:, :, :-length], False), (k[:, :, -length:], v[:, :, -length:], True)]
    (early, early_sum), (late, late_sum) = (
        attend(q, keys, values, None, True, 0.0, causal, False)[:2] for keys, values, causal in parts
    )
    share = (early_sum - late_sum).sigmoid().view(1, HEADS, length, 1)
    return (early * share + late * (1 - share)).to(q.dtype).transpose(1, 2).squeeze(0)


def packed_forms(
    lengths: Sequence[int], *, flex: bool, device: torch.device
) -> dict[str, Callable[..., Tensor]]:
    """Forms of ``(q, k, v) -> o``: the package's choice, then what it could choose from."""
    cu_seqlens, longest, lengths = bounds(lengths, device), max(lengths), tuple(lengths)
    forms: dict[str, Callable[..., Tensor]] = {
        "chosen": functools.partial(varlen_attention, cu_seqlens=cu_seqlens, lengths=lengths),
        "varlen_attn": lambda q, k, v: sdpa._grouped_varlen_attn(  # type: ignore[return-value]
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0)
        ),
        "jagged, repeated": functools.partial(sdpa._attend_jagged, offsets=cu_seqlens, lengths=lengths),
    }
    if min(lengths) == longest:
        forms["sdpa flash"] = functools.partial(_dense, backend=SDPBackend.FLASH_ATTENTION, length=longest)
        forms["sdpa cudnn"] = functools.partial(_dense, backend=SDPBackend.CUDNN_ATTENTION, length=longest)
    if flex:
        forms["flex, compiled"] = _flex(lengths, device)
    return forms


def _dense(q: Tensor, k: Tensor, v: Tensor, *, backend: SDPBackend, length: int) -> Tensor:
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return o.transpose(1, 2).flatten(0, 1)


def _flex(lengths: Sequence[int], device: torch.device) -> Callable[..., Tensor]:
    num = torch.tensor(lengths, device=device)
    document = torch.repeat_interleave(num, output_size=sum(lengths))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[query] == document[key]) & (query >= key)

    torch.compiler.reset()  # or another mask's compiled forms would count against the limit of recompilation
    mask = create_block_mask(visible, None, None, sum(lengths), sum(lengths), device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True).squeeze(0).transpose(0, 1)

    return form


def packed_rows(
    options: argparse.Namespace, *, rate: float, sizes: Sequence[int], device: torch.device
) -> Iterator[Row]:
    """Forward, and forward with backward, of every form."""
    for size in sizes:
        for name, lengths in PACKED.items():
            q, k, v = make_packed(lengths, size=size, device=device)
            flops = 2 * HEADS * size * sum(length**2 for length in lengths)  # two products, half of each
            # It compiles for most of a minute, and knows no lengths: one shape tells enough.
            flex = options.flex or (name == "ragged" and size == 96 and not options.quick)
            few = [32] * 16 if min(lengths) == max(lengths) else [190, 7, 64, 33, 218]
            small = packed_forms(few, flex=flex, device=device)
            errors = {
                form: attempt({}, functools.partial(packed_error, function, few, size=size, device=device))
                for form, function in small.items()
            }
            for form, function in packed_forms(lengths, flex=flex, device=device).items():
                for suffix, run, factor in (("", _forward, 1.0), (" fwd+bwd", _forward_backward, 3.5)):
                    row = {"part": "packed", "shape": f"{name} K={size}{suffix}", "form": form}
                    row["floor_ms"] = factor * flops / rate
                    call = functools.partial(run, function, q, k, v)
                    yield attempt(row, functools.partial(_packed, call, errors[form]))


def make_packed(lengths: Sequence[int], *, size: int, device: torch.device) -> list[Tensor]:
    """Random q, k and v with gradients."""
    shapes = [(sum(lengths), heads, size) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, device=device).bfloat16().requires_grad_() for shape in shapes]


def packed_error(
    form: Callable[..., Tensor], lengths: Sequence[int], *, size: int, device: torch.device
) -> Row:
    """The largest error of a form in o and the gradients against the definition."""
    inputs = make_packed(lengths, size=size, device=device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    define = functools.partial(naive.varlen_attention, cu_seqlens=bounds(lengths, device), lengths=lengths)
    pairs = zip(_forward_backward(form, *inputs), _forward_backward(define, *exact), strict=True)
    return {"error": require(max(relative_error(found, expected) for found, expected in pairs))}


def _forward(form: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        return form(q, k, v)


def _forward_backward(form: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    o = form(q, k, v)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), torch.ones_like(o))]


def _packed(call: Callable[[], object], error: Row) -> Row:
    if "failed" in error:
        raise RuntimeError(error["failed"])
    call()  # what compiles compiles here
    return error | {"ms": eager_milliseconds(call)}


def check(device: torch.device) -> float:
    """The paged kernels and the package's packed attention on small cases; gives the largest error."""
    errors = []
    few = [30, 0, 1, 17]
    chosen = functools.partial(varlen_attention, cu_seqlens=bounds(few, device), lengths=few)
    for size in (64, 96, 128):
        for lengths, contexts in (([1, 1, 1], [700, 64, 5]), ([4, 16, 1], [300, 16, 90])):
            case = Paged(lengths, contexts, size=size, layers=1, device=device)
            errors.append(require(case.error(paged.paged_attention)))
            chosen_paged = functools.partial(paged_attention, contexts=contexts)
            errors.append(require(case.error(chosen_paged)))
        errors.append(packed_error(chosen, few, size=size, device=device)["error"])
    return max(errors)


def report(rows: Iterator[Row]) -> list[Row]:
    """Print rows as they come, with their ratios, and give them back."""
    first: dict[str, float] = {}
    kept = []
    for row in rows:
        if "ms" in row:
            first.setdefault(row["part"] + row["shape"], row["ms"])
            row["ratio"] = row["ms"] / first[row["part"] + row["shape"]]
            row["of_floor"] = row["floor_ms"] / row["ms"]
        cells = [row.get(column, "") for column in COLUMNS]
        texts = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
        print("| " + " | ".join(texts) + f" | {row.get('failed', '')}", flush=True)
        kept.append(row)
    return kept


def main() -> None:
    """Check, measure, print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="K = 96, no flex_attention, fewer peers")
    parser.add_argument("--flex", action="store_true", help="flex_attention at every packed shape")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=None)
    parser.add_argument("--sweep", action="store_true", help="launch parameters of the decode kernel as well")
    parser.add_argument("--check-only", action="store_true", help="compare with the definition, time nothing")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts: Row = {"torch": torch.__version__, "device": str(device), "largest_error": check(device)}
    if options.check_only:
        print(json.dumps(facts))
        return
    rate, flop_rate = copy_rate(device.type) / 1e3, matmul_rate(device)
    facts |= {
        "device": torch.cuda.get_device_name(),
        "copy_TB_s": rate / 1e9,
        "bf16_TFLOP_s": flop_rate / 1e9,
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    sizes = (96,) if options.quick else (96, 128)
    wanted = options.only or PARTS
    rows = []
    if "decode" in wanted:
        rows += report(decode_rows(options, rate=rate, sizes=(*sizes, 64), device=device))
    if options.sweep:
        rows += report(sweep_rows(rate=rate, device=device))
    if "store" in wanted:
        rows += report(store_rows(rate=rate, device=device))
    if "prefill" in wanted:
        rows += report(prefill_rows(options, rate=flop_rate, sizes=(*sizes, 64), device=device))
    if "packed" in wanted:
        rows += report(packed_rows(options, rate=flop_rate, sizes=sizes, device=device))
    print(json.dumps({**facts, "rows": rows}))
    sys.exit(any("failed" in row for row in rows))


if __name__ == "__main__":
    main()
