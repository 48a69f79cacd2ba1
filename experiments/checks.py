"""Whether a configuration is a run that can be trained; if not, which field is wrong, and what was expected of it."""

import math
import re
from typing import Any

import attention
from attention.method import overriding
from experiments.config import Optimizer, Run, layer_methods, redraws, starting_scale, task_of


def check_run(run: Run) -> None:
    """Raises ValueError for the first field that no run can have, naming it, its value and what was expected."""
    model, data, optimizer = run.model, run.data, run.optimizer
    whole = {
        **{f"model.{name}": getattr(model, name) for name in _SIZES},
        "data.batch": data.batch,
        "optimizer.accumulate": optimizer.accumulate,
        **{name: getattr(run, name) for name in ("steps", "evaluate_every", "evaluate_batches", "checkpoint_every")},
    }
    for name, number in whole.items():
        _expect(number >= 1, name, number, "an integer of at least 1")
    _expect(model.width % model.heads == 0, "model.width", model.width, f"a multiple of heads = {model.heads}")
    _expect(model.heads % model.kv_heads == 0, "model.heads", model.heads, f"a multiple of kv_heads = {model.kv_heads}")
    even = {"rotary": model.width // model.heads, "sinusoidal": model.width}.get(model.positions, 0)
    _expect(even % 2 == 0, "model.width", model.width, f"an even size for {model.positions} positions, not {even}")
    _expect(data.batch % optimizer.accumulate == 0, "data.batch", data.batch, f"a multiple of {optimizer.accumulate=}")
    _expect(0 < data.validation_share < 1, "data.validation_share", data.validation_share, "a share between 0 and 1")
    _expect(0 <= run.seed < 2**32, "seed", run.seed, "an integer from 0 to 2**32 - 1")
    _expect(run.temperature > 0, "temperature", run.temperature, "a number greater than 0")
    _expect(run.scale is None or math.isfinite(run.scale), "scale", run.scale, "a finite number")
    later, cap = run.evaluate_temperature, run.soft_cap
    _expect(later is None or later > 0, "evaluate_temperature", later, "a number greater than 0")
    _expect(cap is None or 0 < cap < math.inf, "soft_cap", cap, "a finite number greater than 0")
    attention.yarn_factor(run.stretch)
    starting_scale(run)
    task_of(run)
    _check_optimizer(optimizer, run.steps)
    _check_redraw(run)
    layer_methods(run)
    for expression in run.probes:
        attention.parse_method(expression)


_SIZES = ("layers", "width", "heads", "kv_heads", "mlp_width", "context")


def _check_redraw(run: Run) -> None:
    every, methods = run.redraw_every, layer_methods(run)
    _expect(every >= 0, "redraw_every", every, "an integer of at least 0")
    possible = not every or any(redraws(method) for method in methods)
    used = ", ".join(dict.fromkeys(map(repr, methods)))
    _expect(
        possible, "redraw_every", every, f"0, since no layer's method draws constants: {used}; {overriding('redrawn')}"
    )


def _check_optimizer(optimizer: Optimizer, steps: int) -> None:
    rate, warmup = optimizer.learning_rate, optimizer.warmup_steps
    _expect(0 <= rate < math.inf, "optimizer.learning_rate", rate, "a finite number of at least 0")
    _expect(0 <= warmup < steps, "optimizer.warmup_steps", warmup, f"from 0 to below {steps = }")
    _expect(0 <= optimizer.final_share <= 1, "optimizer.final_share", optimizer.final_share, "a share from 0 to 1")
    _expect(0 <= optimizer.weight_decay < math.inf, "optimizer.weight_decay", optimizer.weight_decay, "at least 0")
    _expect(optimizer.clip_norm > 0, "optimizer.clip_norm", optimizer.clip_norm, "a number greater than 0")
    for name in ("b1", "b2"):
        decay = getattr(optimizer, name)
        _expect(0 <= decay < 1, f"optimizer.{name}", decay, "from 0 to below 1")


def check_name(name: str) -> None:
    """Raises ValueError unless `name` is safe as the name of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or ".." in name or name == ".":
        raise ValueError(f"name is {name!r}: expected letters, digits, '.', '_' and '-', without '..'")


def _expect(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:  # written so that a NaN, for which nothing holds, is refused
        raise ValueError(f"{name} is {value!r}: expected {expected}")
