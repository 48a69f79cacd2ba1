"""Named sweeps: one Python module each under `configs/`."""

import dataclasses
import importlib
import pkgutil

import configs
from attention.registry import unknown
from experiments.axes import Axes
from experiments.config import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a preset's module defines under the name `sweep`.

    Attributes:
        base: what all points have in common.
        axes: what sets them apart.
    """

    base: Run
    axes: Axes


def preset_names() -> list[str]:
    """The modules in `configs/`."""
    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__) if not module.ispkg)


def load_preset(name: str) -> tuple[Sweep, str]:
    """A preset's sweep and the docstring of its module.

    Raises:
        ValueError: there is no such preset, or its module defines no `sweep`; the message gives the nearest name.
    """
    if name not in preset_names():
        raise ValueError(unknown("preset", name, preset_names()))
    module = importlib.import_module(f"configs.{name}")
    sweep = getattr(module, "sweep", None)
    if not isinstance(sweep, Sweep):
        raise ValueError(f"configs/{name}.py defines no `sweep`: expected sweep = Sweep(base=Run(...), axes=...)")
    return sweep, (module.__doc__ or "").strip()
