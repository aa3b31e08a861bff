"""``hrwkv import`` and ``hrwkv export``: the published forms of these models, in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from hrwkv.cli.display import Display, count
from hrwkv.cli.recipes import RECIPES, find_recipe
from hrwkv.settings import ImportSettings

IMPORT_EXAMPLES = """
hrwkv import HRWKV7-Reka-Flash3.pth reka/ --like reka-flash-3 --tokenizer reka-tokenizer/
hrwkv import model.pth model/ --rope-theta 8000000 --rms-norm-eps 1e-5
hrwkv import HRWKV7-Qwen3-8B/ qwen/
hrwkv import trainable_only_weights.pth qwen/ --teacher Qwen3-8B/
"""
EXPORT_EXAMPLES = """
hrwkv export run/stage3 model.pth --format rwkv-infer-pth
hrwkv export run/stage3 model/ --format rwkv-infer-safetensors --dtype bfloat16
"""


def import_(
    source: Annotated[
        Path,
        Parameter(help="A .pth file, a directory of safetensors, or a training checkpoint (file or folder)."),
    ],
    out: Annotated[Path, Parameter(help="Directory to write; it must not exist.")],
    /,
    *,
    like: Annotated[
        str | None, Parameter(help="Preset that says what the weights do not: reka-flash-3, or a TOML file.")
    ] = None,
    teacher: Annotated[
        Path | None, Parameter(help="Directory of the teacher, for what a training checkpoint does not hold.")
    ] = None,
    tokenizer: Annotated[
        Path | None, Parameter(help="Directory whose tokenizer and chat template come along.")
    ] = None,
    settings: Annotated[ImportSettings, Parameter(name="*", group="Facts")] = ImportSettings(),  # noqa: B008 (frozen)
) -> None:
    """Take a model of RWKV-Infer, RWKVInside or RADLADS in; what no file says is asked for, never guessed."""
    from hrwkv.convert.importing import import_model
    from hrwkv.convert.presets import presets_of, read_preset

    display = Display()
    preset = read_preset(find_recipe(like)) if like is not None else None
    with display.task("Importing", 1) as task:

        def report(name: str, number: int, total: int) -> None:
            task.advance(number, name, total=total)

        made = import_model(
            source,
            out,
            settings,
            like=preset,
            presets=presets_of(RECIPES),
            teacher=teacher,
            tokenizer=tokenizer,
            report=report,
        )
    config = made.config
    kept = ", ".join(map(str, config.full_layers)) or "none"
    linear, layers = len(config.linear_layers), config.num_hidden_layers
    added = [f"{made.from_teacher} from the teacher"] if made.from_teacher else []
    added += [f"{made.merged} with adapter parts merged"] if made.merged else []
    tensors = ", ".join([f"{count(made.parameters)} parameters in {made.tensors} tensors", *added])
    display.line(
        f"{made.path}: {made.form}, {config.variant}, {linear} of {layers} layers are RWKV-7, "
        f"attention: {kept}; {tensors}"
    )
    theta, eps = config.rope_parameters["rope_theta"], config.rms_norm_eps
    display.line(
        f"rope_theta {theta:g} (said by {made.said_by['rope_parameters']}), "
        f"rms_norm_eps {eps:g} (said by {made.said_by['rms_norm_eps']})"
    )
    if "max_position_embeddings" not in made.said_by:
        display.line(
            f"max_position_embeddings: nobody says it, config.json says {config.max_position_embeddings}; "
            "give --max-position-embeddings"
        )
    if made.left:
        display.line(f"Left behind: {len(made.left)} tensors that carry nothing, named in import.json")
    display.line(f"Next: hrwkv inspect {made.path} --verify, hrwkv chat {made.path}")


def export(
    model: Annotated[Path, Parameter(help="Directory of a hybrid.")],
    out: Annotated[Path, Parameter(help="File or directory to write; it must not exist.")],
    /,
    *,
    form: Annotated[
        Literal["rwkv-infer-pth", "rwkv-infer-safetensors"],
        Parameter(name="--format", help="A flat .pth, or a directory with config.json."),
    ],
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        Parameter(help="Dtype to convert the weights to, for a .pth all in memory at once."),
    ] = None,
) -> None:
    """Write a hybrid as RWKV-Infer reads it; refused where that would compute something else."""
    from hrwkv.convert.exporting import export_model

    display = Display()
    with display.task("Exporting", 1) as task:

        def report(name: str, number: int, total: int) -> None:
            task.advance(number, name, total=total)

        made = export_model(model, out, form=form, dtype=dtype, report=report)
    display.line(f"{made.path}: {made.tensors} tensors, {made.bytes / 1e9:.2f} GB, {form}, with its sha256")
