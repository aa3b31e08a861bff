"""What does a decode step launch on a GPU, and how long does each kernel take?

    python benchmarks/profile_decode.py                        # 1 and 256 sequences, 20 s, 8 GB
    python benchmarks/profile_decode.py --sequences 64 --linear 6 --attention 1
    python benchmarks/profile_decode.py --device cpu --size 192 --sequences 3  # no figures

A model of Reka-Flash-3's width with a few layers and random weights in bf16, with a state in bf16, as an
engine runs it: fused projections, one CUDA graph of embedding, layers, head, and the greedy choice after it.
Contexts are 100 tokens. Kernels are counted by torch.profiler over some replays; on a CPU operations are.
A layer's are those of the step over the number of layers, so what surrounds the layers is in them.

share is the time of a kernel by that of all; floor the weights and states read once, states written once, at
the measured copy rate. The last line is JSON.
"""

import argparse
import collections
import json
import statistics
import time
from collections.abc import Callable

import torch
from timing import facts
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hrwkv.engine.decode_graphs import FIELDS, decode
from hrwkv.engine.request import SamplingParams
from hrwkv.engine.sampling import SamplingBatch, SequenceSampling, sample
from hrwkv.model.cache import HybridCache
from hrwkv.model.config import FULL, LINEAR, HybridConfig
from hrwkv.model.modeling import HybridModel

CONTEXT, BLOCK_SIZE = 100, 128
RANKS = {"decay_rank": 320, "iclr_rank": 128, "value_rank": 96, "key_rank": 96, "gate_rank": 384}
REPLAYS = 5
COLUMNS = ("sequences", "calls", "us a call", "us a step", "share", "kernel")
Row = dict[str, object]


def make_model(options: argparse.Namespace) -> HybridModel:
    """Linear layers, then attention layers; activations stay of order 1."""
    kinds = [LINEAR] * options.linear + [FULL] * options.attention
    heads = options.size // 96
    config = HybridConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.size,
        intermediate_size=19648 * options.size // 6144,
        num_hidden_layers=len(kinds),
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 8, 1),
        head_dim=96,
        layer_types=kinds,
        attention_rope=False,
        rope_parameters={"rope_type": "default", "rope_theta": 8e6},
        **RANKS,
    )
    with torch.device("meta"):
        model = HybridModel(config).bfloat16()
    model.to_empty(device=options.device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5)
    model.eval().requires_grad_(requires_grad=False)
    model.fuse_projections()
    return model


def make_step(model: HybridModel, num: int, device: str) -> Callable[[], Tensor]:
    """The step of so many sequences and the choice of their next tokens."""
    cache = HybridCache.allocate(
        model.config,
        slots=num,
        blocks=num,
        block_size=BLOCK_SIZE,
        device=device,
        dtype=torch.bfloat16,
        state_dtype=torch.bfloat16,
    )
    row = torch.arange(num, device=device)
    same = torch.zeros_like(row)
    inputs = torch.stack([row, same + CONTEXT, row * BLOCK_SIZE + CONTEXT, row, same + CONTEXT + 1, row])
    assert len(inputs) == FIELDS
    tables, last_tokens = row.unsqueeze(1), same
    members = [SequenceSampling(SamplingParams(temperature=0), 0, 1)] * num
    greedy = SamplingBatch.build(members, vocab_size=model.config.vocab_size, device=device)

    def forward() -> Tensor:
        return decode(model, cache, inputs, tables=tables, last_tokens=last_tokens)

    run = forward if device == "cpu" else recorded(forward)
    return lambda: sample(run(), greedy, positions=inputs[1]).tokens


def recorded(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same as a CUDA graph; its result is valid until the next run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def step_us(step: Callable[[], Tensor], device: str) -> float:
    """Median microseconds of a step, one after the other as an engine launches them."""
    seconds = []
    for _ in range(20 if device == "cuda" else 1):
        begin = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(seconds)


def kernels(step: Callable[[], Tensor], device: str) -> list[tuple[str, float, float]]:
    """Name, calls a step and microseconds a step, the longest first."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(REPLAYS):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    calls: collections.Counter[str] = collections.Counter()
    spent: collections.Counter[str] = collections.Counter()
    for event in profiler.events():
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        if on_device == (device == "cuda"):
            calls[event.name] += 1
            spent[event.name] += event.device_time if on_device else event.self_cpu_time_total
    return [(name, calls[name] / REPLAYS, us / REPLAYS) for name, us in spent.most_common()]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--linear", type=int, default=4, help="RWKV-7 layers")
    parser.add_argument("--attention", type=int, default=1, help="attention layers")
    parser.add_argument("--size", type=int, default=6144, help="the model's width")
    parser.add_argument("--vocabulary", type=int, default=100352)
    parser.add_argument("--rows", type=int, default=25, help="kernels that are shown")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    """Measure, print the tables and the JSON."""
    options, start = parse(), time.perf_counter()
    torch.manual_seed(0)
    about = facts(options.device)
    rate = float(about["copy_tb_s"]) * 1e12
    print(about)
    model = make_model(options)
    weights = sum(x.nbytes for x in model.parameters()) - model.model.embed_tokens.weight.nbytes
    state = 2 * 2 * options.linear * (options.size // 96) * 96**2
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    steps: list[Row] = []
    for num in options.sequences:
        step = make_step(model, num, options.device)
        step()
        found = kernels(step, options.device)
        total, launches = sum(us for *_, us in found), sum(calls for _, calls, _ in found)
        for kernel, calls, us in found[: options.rows]:
            cells = (num, f"{calls:g}", f"{us / calls:.2f}", f"{us:.1f}", f"{us / total:.1%}", kernel[:90])
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        steps.append(
            {
                "sequences": num,
                "launches": launches,
                "launches a layer": launches / (options.linear + options.attention),
                "kernels_us": total,
                "step_us": step_us(step, options.device),
                "floor_us": 1e6 * (weights + num * state) / rate,
                "kernels": found,
            }
        )
        print({name: value for name, value in steps[-1].items() if name != "kernels"}, flush=True)
    print(json.dumps({**about, "seconds": round(time.perf_counter() - start, 1), "steps": steps}))


if __name__ == "__main__":
    main()
