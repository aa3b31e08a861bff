"""How near to the memory's rate is one decode step of a mixer on a GPU, and how far from plain torch and fla?

    python benchmarks/bench_decode.py --peers DIR_OF_fla DIR_OF_einops     # 60 s, half of it compiling fla
    python benchmarks/bench_decode.py --quick                              # 15 s without peers
    python benchmarks/bench_decode.py --sweep                              # 60 s: every cut, ours alone

Errors come first: the step against the definition in fp64, and nothing is timed unless all are within BOUNDS.
A time is that of one launch inside a CUDA graph of many, each on another layer's state and weights, so that
together they exceed any L2 cache (``--pool-mb``); the median of replays. Rows are bf16 with 8 KV heads,
log_decay fp32.

- wkv7: the recurrence alone. mixer: everything between the projections and W_o in the same launch.
- torch wkv7, torch mixer: the same by the definitions' torch operators, the path without these kernels.
- fla: fused_recurrent_rwkv7, fp32 states only; it writes the final state to other memory and reads v and a
  already repeated. Its autotuner tries ``--fla-configs`` of its 36 configurations.
- floor: 2 * K * V * H * N * bytes of the state / the copy rate measured here, once however many tokens.
  "of floor" is floor / time. Rows and weights are not counted; they add 2 to 6 %.

The last line is JSON.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hrwkv.kernels.mix import naive as mix_naive
from hrwkv.kernels.mix.naive import Form, Rows, Weights
from hrwkv.kernels.rates import copy_rate
from hrwkv.kernels.wkv7 import naive

FORM = Form("gated", "log_log", 1e-6)
NUM_KV_HEADS = 8
# Norm of the error by norm of the exact tensor: one rounding to bf16 is 2e-3, fp32 1e-7 an operation.
BOUNDS = {torch.bfloat16: 4e-3, torch.float32: 1e-5}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
T = TypeVar("T")
# fmt: off
COLUMNS = (
    "num", "tokens", "heads", "size", "dtype", "floor_ms", "wkv7", "wkv7 of floor", "mixer", "mixer of floor",
    "fla", "fla / wkv7", "torch wkv7", "torch / wkv7", "torch mixer", "torch / mixer",
)
SWEEP_COLUMNS = (
    "num", "size", "dtype", "floor_ms", "BV", "warps", "first", "default", "wkv7", "wkv7 of floor", "mixer",
    "mixer of floor",
)
# fmt: on
Launches = Sequence[Callable[[], object]]  # one a layer


class Case(NamedTuple):
    """One shape: sequences, tokens of each, heads, key size, the state's dtype by name."""

    num: int
    tokens: int
    heads: int
    size: int
    dtype: str

    @property
    def state_bytes(self) -> int:
        """Of one layer's states."""
        return self.num * self.heads * self.size**2 * DTYPES[self.dtype].itemsize


class Layer(NamedTuple):
    """What a step reads in one layer; the recurrence alone reads ``mixed``."""

    rows: Rows
    weights: Weights
    first: tuple[Tensor, Tensor]
    rope: tuple[Tensor, Tensor]
    mixed: tuple[Tensor, ...]
    state: Tensor
    slots: Tensor
    cu_seqlens: Tensor | None


def make_layer(case: Case, *, device: str) -> Layer:
    """Random bf16 rows and weights of the released form (hxa079); states in a random order of slots."""
    heads, kv_heads, size = case.heads, min(NUM_KV_HEADS, case.heads), case.size
    num_tokens = case.num * case.tokens
    rand = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
    rows = Rows(
        r=rand(num_tokens, heads, size),
        k=rand(num_tokens, kv_heads, size),
        v=rand(num_tokens, kv_heads, size),
        decay=2 * rand(num_tokens, heads, size),
        iclr=rand(num_tokens, heads, size),
        gate=rand(num_tokens, heads, size),
        value=rand(num_tokens, kv_heads, size),
        key=rand(num_tokens, kv_heads, size),
    )
    wide, narrow = heads * size, kv_heads * size
    weights = Weights(
        w0=rand(wide),
        a0=rand(wide),
        v0=rand(narrow),
        k0=rand(narrow),
        r_k=rand(wide),
        r_norm=None,
        k_norm=None,
    )
    angles = torch.rand(num_tokens, size // 2, device=device) * 1000
    direction = normalize(rand(num_tokens, kv_heads, size).float(), dim=-1)
    rate = torch.rand(num_tokens, heads, size, device=device)
    b = mix_naive.repeat_heads(direction, heads) * rate
    log_decay = -0.6065 * torch.rand(num_tokens, heads, size, device=device)
    mixed = (rows.r, log_decay, rand(num_tokens, heads, size), rows.v, -direction.bfloat16(), b.bfloat16())
    state = torch.randn(case.num, heads, size, size, device=device).to(DTYPES[case.dtype])
    bound = torch.arange(case.num + 1, device=device, dtype=torch.int32) * case.tokens
    return Layer(
        rows=rows,
        weights=weights,
        first=(rand(num_tokens, kv_heads, size), rand(num_tokens, kv_heads, size)),
        rope=(angles.cos(), angles.sin()),
        mixed=mixed,
        state=state,
        slots=torch.randperm(case.num, device=device).int(),
        cu_seqlens=None if case.tokens == 1 else bound,
    )


def ours_wkv7(layer: Layer, launch: object = None) -> Tensor:
    """The kernel of the recurrence; its file needs Triton, so it is imported here."""
    from hrwkv.kernels.wkv7 import decode

    return decode.wkv7_decode(
        *layer.mixed,
        state=layer.state,
        state_slots=layer.slots,
        cu_seqlens=layer.cu_seqlens,
        launch=launch,
    )


def ours_mixer(layer: Layer, launch: object = None) -> Tensor:
    """The kernel of the whole step."""
    from hrwkv.kernels.wkv7 import decode

    y, _ = decode.mixer_decode(
        layer.rows,
        layer.weights,
        form=FORM,
        rope=layer.rope,
        first=layer.first,
        state=layer.state,
        state_slots=layer.slots,
        cu_seqlens=layer.cu_seqlens,
        launch=launch,
    )
    return y


def torch_wkv7(layer: Layer) -> Tensor:
    """The definition's operators for one token a sequence, or its loop for several."""
    heads = layer.rows.r.shape[1]
    tokens = [mix_naive.repeat_heads(x, heads) for x in layer.mixed]
    return _recur(layer, tokens)


def torch_mixer(layer: Layer) -> Tensor:
    """The definitions of the work by elements and of the recurrence, one after the other."""
    mixed, bonus, _ = mix_naive.mix(layer.rows, layer.weights, form=FORM, rope=layer.rope, first=layer.first)
    heads = layer.rows.r.shape[1]
    o = _recur(layer, [mix_naive.repeat_heads(x, heads) for x in mixed])
    return mix_naive.finish(o, mixed.v, layer.rows.gate, bonus=bonus)


def _recur(layer: Layer, tokens: Sequence[Tensor]) -> Tensor:
    slots = layer.slots.long()
    if layer.cu_seqlens is None:
        return naive.wkv7_decode(*tokens, state=layer.state, state_slots=slots)
    num = len(slots)
    o, final = naive.wkv7(
        *tokens,
        cu_seqlens=layer.cu_seqlens,
        lengths=[len(tokens[0]) // num] * num,
        initial_state=layer.state[slots],
    )
    layer.state[slots] = final.to(layer.state.dtype)
    return o


def fla_step(layer: Layer) -> Callable[[], object]:
    """fla's one-token kernel on the same numbers, its inputs laid out beforehand."""
    from fla.ops.rwkv7 import fused_recurrent_rwkv7

    num, heads = len(layer.slots), layer.rows.r.shape[1]
    tokens = [mix_naive.repeat_heads(x, heads).unflatten(0, (num, -1)).contiguous() for x in layer.mixed]
    return functools.partial(
        fused_recurrent_rwkv7, *tokens, scale=1.0, initial_state=layer.state, output_final_state=True
    )


def double(layer: Layer) -> Layer:
    """The same numbers in fp64, the state a copy; the RoPE tables stay as they are given, fp32."""

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.double()

    return layer._replace(
        rows=Rows._make(map(cast, layer.rows)),
        weights=Weights._make(map(cast, layer.weights)),
        first=tuple(map(cast, layer.first)),
        mixed=tuple(map(cast, layer.mixed)),
        state=layer.state.double(),
    )


def check(case: Case, *, device: str, launch: object = None) -> dict[str, float]:
    """Errors of both kernels by norm; exits if one is out of bounds."""
    found = {}
    for name, ours, expected in (("wkv7", ours_wkv7, torch_wkv7), ("mixer", ours_mixer, torch_mixer)):
        layer = make_layer(case, device=device)
        reference = double(layer)
        y = ours(layer, launch)
        exact = expected(reference)
        for what, x, exact_x in ((name, y, exact), (f"{name} state", layer.state, reference.state)):
            error = ((x.double() - exact_x).norm() / exact_x.norm()).item()
            found[what] = error
            # A NaN is no smaller than anything.
            if not error <= BOUNDS[x.dtype]:
                raise SystemExit(f"{case}: {what} is wrong by {error:.1e}, allowed {BOUNDS[x.dtype]:.0e}")
    return found


def graph_ms(launches: Launches, *, rounds: int, replays: int = 7) -> float:
    """Milliseconds a launch: the median of replays of a graph that holds all launches ``rounds`` times."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launches[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in itertools.chain.from_iterable([launches] * rounds):
            launch()
    times = []
    for _ in range(replays + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    graph.reset()
    return statistics.median(times[1:]) / (rounds * len(launches))


def make_layers(case: Case, *, pool_mb: int, device: str) -> list[Layer]:
    """As many layers as exceed the cache, at least two."""
    num = max(2, -(-pool_mb * 1_000_000 // case.state_bytes))
    return [make_layer(case, device=device) for _ in range(num)]


def attempt(name: str, function: Callable[[], T], failures: list[str]) -> T | None:
    """The function's result; a failure of one case is told and leaves the others."""
    try:
        return function()
    except Exception as error:
        failures.append(f"{name}: {type(error).__name__}: {str(error).strip()[-200:]}")
        torch.cuda.empty_cache()
        return None


def measure(
    case: Case, *, rate: float, pool_mb: int, with_fla: bool, device: str, failures: list[str]
) -> Iterator[dict[str, object]]:
    """Times of one case in milliseconds, their parts of the floor and their ratios: one row."""
    layers = make_layers(case, pool_mb=pool_mb, device=device)
    rounds = -(-38 // len(layers))
    floor = 1e3 * 2 * case.state_bytes / rate
    row: dict[str, object] = {**case._asdict(), "floor_ms": floor}

    def timed(name: str, launches: Callable[[], Launches], rounds: int) -> float | None:
        return attempt(f"{case} {name}", lambda: graph_ms(launches(), rounds=rounds), failures)

    for name, ours, before in (("wkv7", ours_wkv7, torch_wkv7), ("mixer", ours_mixer, torch_mixer)):
        spent = timed(name, lambda ours=ours: [functools.partial(ours, x) for x in layers], rounds)
        row |= {name: spent, f"{name} of floor": spent and floor / spent}
        if case.tokens == 1:  # with several, the definition is a loop on the host
            few = [functools.partial(before, x) for x in layers[:4]]
            slow = timed(f"torch {name}", lambda few=few: few, 1)
            row |= {f"torch {name}": slow, f"torch / {name}": slow and spent and slow / spent}
    if with_fla and case.dtype == "fp32":
        slow = timed("fla", lambda: [fla_step(x) for x in layers], rounds)
        row |= {"fla": slow, "fla / wkv7": slow and row["wkv7"] and slow / row["wkv7"]}
    yield row


def sweep(
    case: Case, *, rate: float, pool_mb: int, with_fla: bool, device: str, failures: list[str]
) -> Iterator[dict[str, object]]:
    """Times of both kernels, one row a cut; * marks what the fused step takes."""
    from hrwkv.kernels.wkv7.decode import choose_launch

    assert not with_fla
    layers = make_layers(case, pool_mb=pool_mb, device=device)
    rounds = -(-38 // len(layers))
    floor = 1e3 * 2 * case.state_bytes / rate
    chosen = choose_launch(
        case.num * case.heads,
        key_size=case.size,
        value_size=case.size,
        num_warps=1,
        state_dtype=DTYPES[case.dtype],
    )
    cuts = itertools.product((16, 32), ((1, True), (1, False), (2, False), (4, False)))
    for block_v, (num_warps, load_first) in cuts:
        launch = chosen._replace(block_v=block_v, num_warps=num_warps, load_first=load_first)
        row: dict[str, object] = {**case._asdict(), "floor_ms": floor, "BV": block_v, "warps": num_warps}
        row["first"] = "*" if load_first else ""
        row["default"] = "*" if launch == chosen else ""
        checked = functools.partial(check, case._replace(num=2), device=device, launch=launch)
        if attempt(f"{case} {launch}", checked, failures) is not None:
            for name, step in (("wkv7", ours_wkv7), ("mixer", ours_mixer)):
                launches = [functools.partial(step, x, launch) for x in layers]
                timing = functools.partial(graph_ms, launches, rounds=rounds)
                spent = attempt(f"{case} {name} {launch}", timing, failures)
                row |= {name: spent, f"{name} of floor": spent and floor / spent}
        yield row


def format_cell(column: str, value: object) -> str:
    """Ratios, parts of the floor and milliseconds each in their way."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if "/" in column:
        return f"{value:.2f}"
    return f"{value:.0%}" if column.endswith("of floor") else f"{value:.4f}"


def prepare_fla(peers: Sequence[str], *, configs: int) -> str:
    """Make fla importable and its autotuning short; says why not, or nothing."""
    sys.path[:0] = peers
    try:
        import fla.ops.rwkv7  # noqa: F401
        from fla_tuning import limit
    except ImportError as error:
        return str(error)
    limit(configs)
    return ""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num", type=int, nargs="+", default=[1, 8, 64, 256], help="sequences")
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--size", type=int, default=96, help="key and value size of the main cases")
    parser.add_argument("--pool-mb", type=int, default=90, help="states that a graph walks, in 10^6 bytes")
    parser.add_argument("--peers", nargs="*", default=[], help="directories to import fla from")
    parser.add_argument("--fla-configs", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="fp32, N = 1 and 64 only")
    parser.add_argument("--sweep", action="store_true", help="every cut of the launch instead")
    return parser.parse_args()


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """The main shapes; beside them other head sizes and several tokens a sequence."""
    nums, dtypes = ([1, 64], ["fp32"]) if options.quick else (options.num, list(DTYPES))
    cases = [Case(num, 1, options.heads, options.size, dtype) for num in nums for dtype in dtypes]
    if not options.quick and not options.sweep:
        cases += [Case(64, 1, options.heads, size, dtype) for size in (64, 128) for dtype in dtypes]
        cases += [Case(num, 4, options.heads, options.size, "fp32") for num in (1, 64)]
    return cases


def main() -> None:
    """Check, measure, print the table and the JSON."""
    options, start, device = parse(), time.perf_counter(), "cuda"
    torch.manual_seed(0)
    cases = choose_cases(options)
    # One check for each kernel that is compiled: a few sequences prove as much as many.
    few = dict.fromkeys(case._replace(num=min(case.num, 5)) for case in cases)
    errors = {str(case): check(case, device=device) for case in few}
    no_fla = "not asked for" if options.sweep else prepare_fla(options.peers, configs=options.fla_configs)
    rate = copy_rate(device)
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_tb_s": rate / 1e12}
    print(f"{facts}, fla: {no_fla or 'found'}")
    columns = SWEEP_COLUMNS if options.sweep else COLUMNS
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    run, rows, failures = sweep if options.sweep else measure, [], []
    for case in cases:
        found = run(
            case, rate=rate, pool_mb=options.pool_mb, with_fla=not no_fla, device=device, failures=failures
        )
        for row in found:
            rows.append(row)
            cells = (format_cell(column, row.get(column)) for column in columns)
            print("| " + " | ".join(cells) + " |", flush=True)
    for failure in failures:
        print("failed:", failure)
    facts |= {"no_fla": no_fla, "seconds": round(time.perf_counter() - start, 1), "failures": failures}
    print(json.dumps({**facts, "errors": errors, "rows": rows}))


if __name__ == "__main__":
    main()
