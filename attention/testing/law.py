"""What a law is: a named check that every method with certain capabilities must pass."""

import contextlib
import functools
from collections.abc import Callable, Generator

import jax
import numpy as np

from attention.method import Method

LAWS: dict[str, Callable[[Method], None]] = {}
_NEEDS: dict[str, tuple[str, ...]] = {}


class Violation(AssertionError):  # noqa: N818 (it is one, not an error of the program)
    """A method breaks a law. The message names both."""


def law(*needs: str, float64: bool = False):
    """Registers a check as a law for methods with the capabilities `needs`; `float64` runs it under x64."""

    def register(check: Callable[[Method], None]) -> Callable[[Method], None]:
        name = getattr(check, "__name__", repr(check))

        @functools.wraps(check)
        def named(method: Method) -> None:
            try:
                with jax.enable_x64(float64):
                    check(method)
            except Violation as violation:
                raise Violation(f"{name}: {method!r}: {violation}") from None
            except Exception as error:
                raise Violation(f"{name}: {method!r} raised {error!r}") from error

        LAWS[name] = named
        _NEEDS[name] = needs
        return named

    return register


def laws_for(method: Method) -> list[str]:
    """The names of the laws that bind a method, by its capabilities."""
    return [name for name in LAWS if all(getattr(method.capabilities, need) for need in _NEEDS[name])]


_compilations: list[list[str]] = []


@contextlib.contextmanager
def counted_compilations() -> Generator[list[str]]:
    """Collects one entry for each program that XLA compiles, or takes from its cache on disk, in the block."""
    if not _compilations:
        _compilations.append([])  # the listener's own; it cannot be unregistered, so there is one for good
        jax.monitoring.register_event_duration_secs_listener(_note_compilation)
    _compilations.append([])
    try:
        yield _compilations[-1]
    finally:
        _compilations.pop()


def _note_compilation(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event.endswith("backend_compile_duration"):
        _compilations[-1].append(event)


def expect(condition, message: str) -> None:
    """Raises Violation with the message unless the condition holds."""
    if not bool(condition):
        raise Violation(message)


def expect_same(actual, expected, tolerance, message: str) -> None:
    """Raises Violation unless |actual - expected| <= tolerance everywhere; NaN never passes."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    excess = np.abs(actual - expected) - tolerance
    if not np.all(excess <= 0):
        worst = np.nanmax(np.where(np.isnan(excess), np.inf, excess))
        raise Violation(f"{message}: off by {worst:.3g} more than the tolerance")


def expect_bitwise(actual, expected, message: str) -> None:
    """Raises Violation unless two pytrees of arrays are equal bit for bit (a zero's sign apart)."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if not np.array_equal(a, b):
            raise Violation(f"{message}: {np.sum(~(a == b))} of {a.size} numbers differ")
