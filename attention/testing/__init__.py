"""The laws that every method keeps, importable: a method from another package is checked by the same suite.

from attention.testing import check
check(MyMethod(budget=16))
"""

from attention.method import Method
from attention.testing import accuracy, derivatives, structure, visibility  # noqa: F401 (the imports fill LAWS)
from attention.testing.law import LAWS, Violation, laws_for
from attention.testing.oracle import oracle, oracle_gradients


def check(method: Method) -> None:
    """Runs every law that binds a method.

    Raises:
        Violation: an AssertionError whose message names each law that is broken, and how.
    """
    broken = []
    for name in laws_for(method):
        try:
            LAWS[name](method)
        except Violation as violation:
            broken.append(str(violation))
    if broken:
        raise Violation("\n".join(broken))


__all__ = ["LAWS", "Violation", "check", "laws_for", "oracle", "oracle_gradients"]
