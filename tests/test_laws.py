"""Every registered method keeps every law that its capabilities bind it to."""

import pytest

from attention.method import METHODS
from attention.testing import LAWS, laws_for

EXAMPLES = [method for cls in METHODS.values() for method in cls.examples()]


@pytest.mark.parametrize(
    ("method", "name"),
    [
        pytest.param(method, name, id=f"{method!r}-{name}", marks=pytest.mark.xdist_group(repr(method)))
        for method in EXAMPLES
        for name in laws_for(method)
    ],
)
def test_law(method, name):
    LAWS[name](method)
