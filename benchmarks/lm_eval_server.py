"""Does lm-eval find the same scores through ``hrwkv serve`` as with the model in its own process?

    pip install -c constraints.txt -e '.[serve,eval]' 'lm-eval[api]'
    python benchmarks/lm_eval_server.py                # the tiny teacher made a hybrid, on the CPU: a minute
    python benchmarks/lm_eval_server.py --model DIR    # any model that hrwkv serves

Two local tasks of each kind that lm-eval has, made of the standard library's own sources: which of four lines
follows (loglikelihood), the perplexity of whole files' beginnings (loglikelihood_rolling), and the next line
in greedy decoding (generate_until). Once with lm-eval's ``local-completions`` and its remote tokenizer, which
needs nothing but the server's address, and once with its ``HFLM`` over ``HybridForCausalLM``. Exit code 1 if
a score differs by more than BOUND of itself, or a greedy answer at all. The last line is JSON.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from load_server import MODEL, server
from transformers import AutoModelForCausalLM, AutoTokenizer

import hrwkv.model.hf  # noqa: F401 (tells Transformers of the architecture)
from hrwkv.cli.display import Display

# Batches of different shapes add in different orders: fp32 over some thousand terms.
BOUND = 1e-5
TASKS = {
    "choice": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_target": "{{text}}"},
    "generate": {
        "output_type": "generate_until",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "temperature": 0},
    },
}
METRICS = {
    "choice": ("acc", "acc_norm"),
    "rolling": ("word_perplexity", "bits_per_byte"),
    "generate": ("exact_match",),
}


def make_documents(num: int, *, seed: int) -> dict[str, list[dict[str, Any]]]:
    """So many documents for each task, of the standard library of this Python."""
    rng = random.Random(seed)
    files = sorted(Path(json.__file__).parents[1].glob("*.py"))
    texts = [text for text in (path.read_text(encoding="utf-8") for path in files) if len(text) > 2000]
    lines = [line for text in texts for line in text.splitlines() if 20 < len(line) < 60]
    documents: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS}
    for number in range(num):
        text = texts[number % len(texts)]
        start = rng.randrange(len(text) - 1000)
        head, _, rest = text[start : start + 1000].partition("\n")
        before, following = rest[:200], rest[200:].split("\n")[0] or "pass"
        choices, gold = rng.sample(lines, 3), rng.randrange(4)
        choices.insert(gold, following)
        documents["choice"].append({"text": before, "choices": choices, "gold": gold})
        documents["rolling"].append({"text": f"{head}\n{rest[:600]}"})
        documents["generate"].append({"text": before, "target": following})
    return documents


def write_tasks(folder: Path, num: int, *, seed: int) -> None:
    """Tasks and their documents as lm-eval reads them; JSON is YAML."""
    for name, documents in make_documents(num, seed=seed).items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
        task = {"task": f"hrwkv_{name}", "dataset_path": "json", "test_split": "test"}
        task |= {"dataset_kwargs": {"data_files": {"test": str(data)}}, "doc_to_text": "{{text}}"}
        task |= {"metric_list": [{"metric": metric} for metric in METRICS[name]], "metadata": {"version": 1}}
        if name == "rolling":
            task["doc_to_text"] = ""
        (folder / f"{name}.yaml").write_text(json.dumps(task | TASKS[name]), encoding="utf-8")


def evaluate(folder: Path, model: Any, **options: Any) -> tuple[dict[str, float], list[str]]:
    """Scores by task and metric, and the greedy answers."""
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=[f"hrwkv_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        **options,
    )
    scores = {
        f"{name} {metric}": float(results["results"][f"hrwkv_{name}"][f"{metric},none"])
        for name, metrics in METRICS.items()
        for metric in metrics
    }
    samples = sorted(results["samples"]["hrwkv_generate"], key=lambda sample: sample["doc_id"])
    return scores, [sample["resps"][0][0] for sample in samples]


def main() -> None:
    """Evaluate twice, compare, and print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="directory; default: the tiny teacher made a hybrid")
    parser.add_argument("--documents", type=int, default=60, help="of each task")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, display = Path(name), Display()
        if options.model is None:
            options.model = folder / "hybrid"
            convert = [sys.executable, "-m", "hrwkv.cli", "convert", str(MODEL), str(options.model)]
            subprocess.run([*convert, "--keep-attention", "1"], check=True)
        write_tasks(folder, options.documents, seed=options.seed)
        with server(options, folder / "log") as (_, url):
            arguments = {"model": options.model.name, "base_url": f"{url}/v1/completions"}
            arguments |= {"tokenizer_backend": "remote", "num_concurrent": 8, "max_length": 512}
            remote, remote_answers = evaluate(folder, "local-completions", model_args=arguments, batch_size=4)
        model = HFLM(
            pretrained=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
            tokenizer=AutoTokenizer.from_pretrained(options.model),
            max_length=512,
            batch_size=4,
            device="cpu",
        )
        local, local_answers = evaluate(folder, model)
    rows = [[name, f"{remote[name]:.6f}", f"{local[name]:.6f}"] for name in remote]
    display.table("lm-eval's scores", ["score", "through the server", "in its process"], rows)
    different = [name for name in remote if abs(remote[name] - local[name]) > BOUND * abs(local[name])]
    answers = sum(map(str.__ne__, remote_answers, local_answers))
    display.line(f"greedy answers that differ: {answers} of {len(local_answers)}")
    report = {"server": remote, "process": local, "different": different, "answers_different": answers}
    print(json.dumps(report | {"lm_eval": lm_eval.__version__, "documents": options.documents}))
    if different or answers:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
