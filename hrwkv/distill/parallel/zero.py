"""DeepSpeed's ZeRO, stages 1 to 3: what is cut of optimiser, gradients and parameters.

Masters and moments are fp32 and flat inside; here they go in and out by parameter name and whole, so that a
checkpoint fits any engine. DeepSpeed is imported where it is used. The accumulation is ours: a step is what
``step`` is called for, after any number of backward passes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hrwkv.distill.parallel.engine import Engine
from hrwkv.distill.parallel.ranks import Ranks, blocks_of, whole_shape
from hrwkv.distill.parallel.states import load_state, save_state
from hrwkv.model.checkpoint import open_weights
from hrwkv.model.modeling import HybridModel

# Stage 3 keeps smaller parameters whole on each process. Among them must be the norms over a head, whose
# weights the mixer reads without calling them, so that DeepSpeed would not gather them.
WHOLE_BELOW = 1000
# Parameters whose moments are read at once.
MOMENTS_AT_ONCE = 32
MOMENTS = ("exp_avg", "exp_avg_sq")


def library() -> Any:
    """DeepSpeed. Raises ValueError where it is not installed."""
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            "parallel is zero1, zero2 or zero3, which DeepSpeed does, but that is not installed: "
            "pip install 'hrwkv[train]', or use parallel fsdp2"
        ) from error
    return deepspeed


def zero_config(stage: int, *, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration; sums of gradients are fp32 whatever the parameters are."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 1.0,  # replaced at each step
        # Without the second, stage 1 counts the gradients of an earlier backward pass of the step again.
        "bf16": {"enabled": dtype == torch.bfloat16, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": stage == 2,  # the only one that allows it with an accumulation of our own
            "contiguous_gradients": True,
            "stage3_param_persistence_threshold": WHOLE_BELOW,
            "memory_efficient_linear": False,  # it replaces torch's own function, for the teacher as well
        },
    }


def open_partitioned(
    path: Path, ranks: Ranks, *, stage: int, dtype: torch.dtype, trains: Callable[[str], bool]
) -> HybridModel:
    """A student for ``ZeroEngine``, in evaluation mode; with stage 3 one block at a time is whole."""
    deepspeed = library()
    config, reader, names = open_weights(path)
    with torch.device("meta"):
        model = HybridModel(config)
    model.load_state_dict({name: reader.read(name) for name in names}, strict=False, assign=True)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))
    for part in [*blocks_of(model), model]:
        part.to(ranks.device, dtype)
        if stage == 3:
            deepspeed.zero.Init(module=part, config_dict_or_path=zero_config(stage, dtype=dtype))
    return model.eval()


class ZeroEngine(Engine):
    """A DeepSpeed engine around student and optimiser; its collectives are DeepSpeed's."""

    def __init__(
        self,
        student: HybridModel,
        optimiser: torch.optim.Optimizer,
        ranks: Ranks,
        *,
        stage: int,
        dtype: torch.dtype,
        path: Path,
    ) -> None:
        """path: where the student was opened; in bfloat16 the masters are read from there once more."""
        deepspeed = library()
        super().__init__(student, optimiser, ranks)
        deepspeed.utils.logger.setLevel(logging.WARNING)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how much memory it takes
            self._deepspeed, *_ = deepspeed.initialize(
                model=student,
                optimizer=optimiser,
                config=zero_config(stage, dtype=dtype),
                dist_init_required=False,
            )
        self._zero = self._deepspeed.optimizer
        self._fragments = deepspeed.utils
        self._first_micro_step = getattr(self._zero, "micro_step_id", 0)
        self._make_moments()
        if dtype != torch.float32:
            _, reader, _ = open_weights(path)
            for name, parameter in self._trained():
                self._fragments.safe_set_full_fp32_param(parameter, reader.read(name).float())

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Stage 1 reduces in ``step``, stages 2 and 3 after each backward pass."""
        self._zero.clear_backward_seen_flag()  # DeepSpeed's own forward, which we do not call, does so
        yield

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed's gradient is the mean over processes, the loss is their sum."""
        self._deepspeed.backward(loss * self.ranks.world)

    def step(self, max_norm: float) -> Tensor:
        """A gradient that is not finite is dropped, and its norm is infinite."""
        self._zero.clip_grad = max_norm
        self._deepspeed.step()
        dropped = getattr(self._zero, "overflow", False)
        norm = math.inf if dropped else self._deepspeed.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.ranks.device)

    def discard(self) -> None:
        """As DeepSpeed does where a norm is not finite; ``step`` itself does so for what is not."""
        self._zero.zero_grad()
        for partitions in ("averaged_gradients", "all_grad_tensors"):
            kept = getattr(self._zero, partitions, {})
            for group in kept:
                kept[group] = None
        self._zero.clear_backward_seen_flag()
        if hasattr(self._zero, "micro_step_id"):
            self._zero.micro_step_id = self._first_micro_step

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, own) for name, own in self.student.named_parameters() if own.requires_grad)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The fp32 masters."""
        for name, parameter in self._trained():
            yield name, self._fragments.safe_get_full_fp32_param(parameter)

    def save_moments(self, folder: Path) -> None:
        """Processes take turns in keeping a parameter's whole moments on the host; each writes its own."""
        step = next(iter(self.optimiser.state.values()))["step"]
        state: dict[str, dict[str, Tensor]] = {}
        for number, (name, parameter) in enumerate(self._trained()):
            read = self._fragments.safe_get_full_optimizer_state
            moments = {moment: read(parameter, moment) for moment in MOMENTS}
            if number % self.ranks.world == self.ranks.rank:
                state[name] = {moment: value.cpu() for moment, value in moments.items()} | {"step": step}
        save_state(state, folder, self.ranks)

    def load_moments(self, folder: Path) -> None:
        """Each process reads whole moments, a few parameters at a time, and keeps its part of them."""
        step = torch.zeros((), dtype=torch.float32)
        trained = list(self._trained())
        for start in range(0, len(trained), MOMENTS_AT_ONCE):
            part = trained[start : start + MOMENTS_AT_ONCE]
            state = {
                name: {moment: torch.empty(whole_shape(parameter)) for moment in MOMENTS} | {"step": step}
                for name, parameter in part
            }
            load_state(state, folder, self.ranks, alone=True)
            for name, parameter in part:
                for moment in MOMENTS:
                    value = state[name][moment].to(self.ranks.device)
                    self._fragments.safe_set_full_optimizer_state(parameter, value, moment)
        for values in self.optimiser.state.values():
            values["step"].copy_(step)

    def _make_moments(self) -> None:
        """Give the flat masters the moments that AdamW's first step would, and names to their parts.

        DeepSpeed would name those of the first parameter group alone, as it steps group by group.
        """
        stage_three = getattr(self._zero, "fp32_partitioned_groups_flat", None)
        masters = stage_three or [own for group in self.optimiser.param_groups for own in group["params"]]
        for master in masters:
            moments = {moment: torch.zeros_like(master) for moment in MOMENTS}
            self.optimiser.state[master] = {"step": torch.zeros((), device=master.device), **moments}
        if stage_three is None:
            self._zero._lazy_init_hp_params_optimizer_state()
