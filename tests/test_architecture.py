"""The house rules that a machine can hold: floors, sizes, borders, no print, no environment reads.

Most rules are read from the syntax tree (nothing is imported, about a second for the whole repository);
the last test imports every module in a fresh interpreter and looks for side effects. ``PLANTED`` keeps the
checker honest: each rule has a source text that breaks it.
"""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A file may import its own unit and units on lower floors. Never upward, never sideways.
FLOORS = [
    {"settings", "kernels"},
    {"layers"},
    {"model", "data"},
    {"convert", "distill", "eval", "engine"},
    {"server"},
    {"cli", "__init__"},
]
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
# A foreign library is met at its border only: (imported module, files that may name it).
BORDERS = [
    ("torch.distributed", r"hrwkv/distill/parallel/.*"),
    ("deepspeed", r"hrwkv/distill/parallel/.*"),
    ("transformers", r"hrwkv/(?!kernels/|layers/|settings/).*"),
    ("llguidance", r"hrwkv/engine/.*"),
    ("fastapi", r"hrwkv/server/.*"),
    ("uvicorn", r"hrwkv/server/.*"),
    ("cyclopts", r"hrwkv/(cli/.*|settings/.*)"),
    ("rich", r"hrwkv/cli/.*"),
]
# PreTrainedConfig and PreTrainedModel hand unknown keywords upward by contract.
KEYWORD_BORDER = {"hrwkv/model/hf.py", "hrwkv/model/config.py"}
KERNEL_LIBRARIES = {"hrwkv", "torch", "triton"}
# What a whole unit is made of, though it is no base dependency: nothing imports the unit without it.
UNIT_LIBRARIES = {
    "kernels": {"triton"},
    "server": {"fastapi", "starlette", "uvicorn", "pydantic", "pydantic_core", "prometheus_client"},
}
# The one place that reads a variable: an API key's, whose name is a flag.
ENVIRONMENT_READER = "hrwkv/cli/serve.py"
MACHINE_PATH = re.compile(r"(?<![\w.~}])/(?:home|root|work|Users|mnt|media|scratch)/")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".jinja", ".txt", ".json", ".jsonl", ".sh", ".cfg", ".yml", ""}
SHIPPED_MODEL = ROOT / "examples" / "tiny_teacher" / "model"


def repository_files() -> Iterator[Path]:
    """Text files of the repository in a stable order, without caches and the shipped model."""
    for path in sorted(ROOT.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.suffix in TEXT_SUFFIXES:
            yield path
    for folder in ("hrwkv", "tests", "benchmarks", "examples", "recipes", "docs", ".ci"):
        for path in sorted((ROOT / folder).rglob("*")):
            ours = "__pycache__" not in path.parts and SHIPPED_MODEL not in path.parents
            if path.is_file() and ours and path.suffix in TEXT_SUFFIXES:
                yield path


FILES = {str(path.relative_to(ROOT)): path for path in repository_files()}
PYTHON = {name: path for name, path in FILES.items() if name.endswith(".py")}
MODULES = {name: path for name, path in PYTHON.items() if name.startswith("hrwkv/")}


def unit_of(name: str) -> str:
    return name.split("/")[1].removesuffix(".py")


def imported_modules(name: str, tree: ast.AST) -> list[tuple[int, str]]:
    """Every module that the file names, lazy and relative imports included, as (line, dotted name)."""
    package = tuple(name.split("/")[:-1])
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            head = list(package[: len(package) - node.level + 1]) if node.level else []
            base = ".".join(head + ([node.module] if node.module else []))
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def module_level_imports(tree: ast.Module) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """Every import that runs with the file (not those inside functions), with its root package."""
    queue: list[ast.AST] = list(tree.body)
    while queue:
        node = queue.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((node, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node, node.module.split(".")[0]
        queue += ast.iter_child_nodes(node)


def base_packages() -> set[str]:
    """Importable names of the base dependencies in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in project["dependencies"]}


BASE_PACKAGES = base_packages()


def import_faults(name: str, tree: ast.Module) -> Iterator[str]:
    unit = unit_of(name)
    if unit not in FLOOR_OF:
        yield f"1: unit {unit!r} has no floor: give it one in FLOORS"
    for line, module in imported_modules(name, tree):
        root, *rest = module.split(".")
        other = rest[0] if rest else "__init__"
        if root == "hrwkv" and other != unit and FLOOR_OF.get(other, 99) >= FLOOR_OF.get(unit, -1):
            yield f"{line}: {unit} imports {other}, which is not on a lower floor"
        for border, allowed in BORDERS:
            if f"{module}.".startswith(f"{border}.") and not re.fullmatch(allowed, name):
                yield f"{line}: names {border}, which only {allowed} may"
        if unit == "kernels" and root not in KERNEL_LIBRARIES | sys.stdlib_module_names:
            yield f"{line}: a kernel imports {root}; kernels know torch and triton only"
    own = UNIT_LIBRARIES.get(unit, set())
    allowed_roots = {"hrwkv", *sys.stdlib_module_names, *BASE_PACKAGES, *own}
    for node, root in module_level_imports(tree):
        if root not in allowed_roots:
            yield f"{node.lineno}: imports {root}, not a base dependency; import it where it is used"


def is_swallowed(node: ast.ExceptHandler) -> bool:
    """True for a handler that does nothing at all with what it caught."""
    return all(isinstance(line, ast.Pass | ast.Continue) for line in node.body)


def code_faults(name: str, tree: ast.Module) -> Iterator[str]:
    in_package = name.startswith("hrwkv/")
    for node in ast.walk(tree):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called == "print" and in_package and unit_of(name) != "cli":
            yield f"{node.lineno}: print(); use logging.getLogger(__name__)"
        reads = isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
        if reads and name != ENVIRONMENT_READER:
            yield f"{node.lineno}: reads the environment; make it an argument or a config field"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{node.lineno}: bare except; name the exception"
        if isinstance(node, ast.ExceptHandler) and is_swallowed(node):
            yield f"{node.lineno}: swallowed exception; handle it, or say contextlib.suppress and why"
        if isinstance(node, ast.Global):
            yield f"{node.lineno}: global; pass the value as an argument"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from function_faults(name, node)


def function_faults(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if lines > MAX_FUNCTION_LINES and not name.startswith("hrwkv/kernels/"):
        yield f"{node.lineno}: {node.name} has {lines} lines, the limit is {MAX_FUNCTION_LINES}: split it"
    if node.args.kwarg is None or not name.startswith("hrwkv/") or name in KEYWORD_BORDER:
        return
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and any(
            word.arg is None and ast.unparse(word.value) == node.args.kwarg.arg for word in call.keywords
        ):
            yield f"{call.lineno}: {node.name} passes **{node.args.kwarg.arg} through; name the arguments"


def faults_of(name: str, source: str) -> list[str]:
    """Every broken rule of one file, each starting with its line. ``name`` is relative to the repository."""
    faults = [
        f"{number}: names a place on one machine: {line.strip()[:60]}"
        for number, line in enumerate(source.splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    if name.endswith((".py", ".md", ".toml")) and not source.isascii():
        first = next(n for n, line in enumerate(source.splitlines(), start=1) if not line.isascii())
        faults.append(f"{first}: not ASCII")
    if name.endswith(".py"):
        tree = ast.parse(source)
        faults += code_faults(name, tree)
        if name.startswith("hrwkv/"):
            faults += import_faults(name, tree)
        if len(source.splitlines()) >= MAX_FILE_LINES:
            faults.append(f"1: {len(source.splitlines())} lines, the limit is {MAX_FILE_LINES}: split it")
    return faults


@pytest.mark.parametrize("name", FILES)
def test_file_keeps_the_rules(name: str) -> None:
    # This file holds the forbidden words itself, in PLANTED and in the pattern; its code is still checked.
    source = FILES[name].read_text()
    if FILES[name] == Path(__file__):
        source = source.split("\nPLANTED = ")[0].replace(MACHINE_PATH.pattern, "")
    faults = faults_of(name, source)
    assert not faults, "\n" + "\n".join(f"{name}:{fault}" for fault in faults)


PLANTED = {
    "upward": ("hrwkv/layers/x.py", "from hrwkv.model import config", "not on a lower floor"),
    "sideways": ("hrwkv/distill/x.py", "import hrwkv.convert.transfer", "not on a lower floor"),
    "relative": ("hrwkv/model/x.py", "from ..engine import runner", "not on a lower floor"),
    "lazy": ("hrwkv/data/x.py", "def f():\n    from hrwkv import cli", "not on a lower floor"),
    "package-root": ("hrwkv/eval/x.py", "import hrwkv", "not on a lower floor"),
    "no-floor": ("hrwkv/utils/x.py", "x = 1", "has no floor"),
    "border": ("hrwkv/eval/x.py", "import torch.distributed as dist", "names torch.distributed"),
    "layer-transformers": ("hrwkv/layers/x.py", "from transformers import AutoConfig", "names transformers"),
    "kernel-numpy": ("hrwkv/kernels/x.py", "def f():\n    import numpy", "kernels know torch"),
    "extra-at-import": ("hrwkv/eval/x.py", "import lm_eval", "not a base dependency"),
    "print": ("hrwkv/engine/x.py", "print(1)", "print()"),
    "environment": ("benchmarks/x.py", "import os\nos.getenv('A')", "environment"),
    "bare-except": ("hrwkv/model/x.py", "try:\n    x = 1\nexcept:\n    x = 2", "bare except"),
    "swallowed": ("hrwkv/model/x.py", "try:\n    x = 1\nexcept OSError:\n    pass", "swallowed"),
    "global": ("hrwkv/model/x.py", "def f():\n    global x\n    x = 1", "global"),
    "pass-through": ("hrwkv/model/x.py", "def f(**rest):\n    return dict(**rest)", "passes **rest"),
    "long-function": ("tests/x.py", "def f():\n" + "    x = 1\n" * 80, "81 lines"),
    "long-file": ("tests/x.py", "x = 1\n" * 500, "500 lines"),
    "machine-path": ("docs/x.md", "see /home/me/runs", "one machine"),
    "not-ascii": ("docs/x.md", "na\u00efve", "not ASCII"),
}


@pytest.mark.parametrize("rule", PLANTED)
def test_planted_fault_is_found(rule: str) -> None:
    name, source, expected = PLANTED[rule]
    assert [fault for fault in faults_of(name, source) if expected in fault]


LEGAL = {
    "own-unit-relative": ("hrwkv/model/x.py", "from .config import HybridConfig"),
    "downward": ("hrwkv/convert/x.py", "from hrwkv.model.checkpoint import ShardReader"),
    "lazy-extra": ("hrwkv/eval/x.py", "def f():\n    import lm_eval\n    return lm_eval"),
    "cli-print": ("hrwkv/cli/x.py", "print(1)"),
    "key-variable": ("hrwkv/cli/serve.py", "import os\nkey = os.environ.get(name)"),
    "server-extra": ("hrwkv/server/x.py", "import uvicorn"),
    "border-keywords": ("hrwkv/model/hf.py", "def f(**rest):\n    return dict(**rest)"),
    "relative-path": ("docs/x.md", "see ../work/x, a/home/b and https://example.org/home/"),
    "limits": ("tests/x.py", "def f():\n" + "    x = 1\n" * 79 + "x = 1\n" * 419),
}


@pytest.mark.parametrize("case", LEGAL)
def test_legal_source_has_no_faults(case: str) -> None:
    assert faults_of(*LEGAL[case]) == []


# What a library does when imported is its own affair, so libraries come first, by the statements in use.
IMPORT_EVERYTHING = """
import importlib, json, logging, os, random, sys, threading
import numpy, torch, transformers
root, libraries, modules = json.loads(sys.argv[1])
sys.path.insert(0, root)
for statement in libraries:
    exec(statement)
def facts():
    return {
        "dtype": torch.get_default_dtype(), "threads": torch.get_num_threads(),
        "python threads": threading.active_count(), "grad": torch.is_grad_enabled(),
        "torch rng": torch.get_rng_state().tolist(), "numpy rng": numpy.random.get_state()[1].tolist(),
        "rng": random.getstate(), "log handlers": logging.getLogger().handlers[:],
        "log level": logging.getLogger().level, "cuda": torch.cuda.is_initialized(),
        "working directory": os.getcwd(), "files": os.listdir("."), "environment": dict(os.environ),
    }
before = facts()
for name in modules:
    importlib.import_module(name)
after = facts()
changed = [key for key in before if before[key] != after[key]]
sys.exit(f"importing hrwkv changed: {', '.join(changed)}" if changed else 0)
"""


def dotted(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_importing_every_module_changes_nothing(tmp_path: Path) -> None:
    libraries, modules = set(), []
    for name, path in MODULES.items():
        found = list(module_level_imports(ast.parse(path.read_text())))
        # __main__ runs by its nature; a Triton kernel file can be imported only where Triton is.
        if name.endswith("__main__.py") or any(root == "triton" for _, root in found):
            continue
        modules.append(dotted(name))
        libraries |= {ast.unparse(node) for node, root in found if root not in {"hrwkv", "__future__"}}
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING, json.dumps([str(ROOT), sorted(libraries), modules])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert run.stderr == ""
