"""What several commands open: a device, and a model with its tokenizer. Nothing is looked up on a hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hrwkv.model.hf import HybridForCausalLM
    from hrwkv.model.modeling import HybridModel


def choose_device(name: str) -> str:
    """``auto`` is a GPU where there is one. Raises ValueError for ``cuda`` without one."""
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device is 'cuda', but torch sees no GPU: use --device cpu or auto")
    return "cuda" if available and name == "auto" else name.replace("auto", "cpu")


def open_model(path: Path, *, device: str, dtype: str) -> HybridModel:
    """A student or a teacher from its directory. Raises ValueError if it cannot be read."""
    import torch

    device = choose_device(device)
    if dtype == "bfloat16" and device == "cpu":
        raise ValueError(
            "dtype is 'bfloat16' on a CPU, where it is up to 100 times slower: use float32 there"
        )
    from hrwkv.model.checkpoint import load_model

    return load_model(path, dtype=getattr(torch, dtype), device=device)


def open_writer(path: Path, *, device: str, dtype: str) -> tuple[HybridForCausalLM, Any]:
    """Model and tokenizer of a directory, ready to generate. Raises ValueError if either cannot be read."""
    import torch

    from hrwkv.model.generate import open_directory

    return open_directory(path, dtype=getattr(torch, dtype), device=choose_device(device))


def open_tokenizer(path: Path) -> Any:
    """The tokenizer of a model directory. Raises ValueError if there is none or it cannot be read."""
    from transformers import AutoTokenizer

    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(
            f"{path} has no tokenizer.json: copy the tokenizer of the model it was made from there"
        )
    return AutoTokenizer.from_pretrained(path, local_files_only=True)
