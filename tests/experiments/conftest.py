"""A run that is small in every direction, on a text of its own."""

import dataclasses

import numpy as np
import pytest

from experiments.config import Data, Model, Optimizer, Run
from experiments.train import train

WORDS = ("def ", "return ", "x", "y", " = ", "(", ")", ":\n", "    ", "lambda ", "0", "1")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of 12,000 words in a fixed order, with structure to learn."""
    path = tmp_path_factory.mktemp("corpus") / "text.py"
    path.write_text("".join(np.random.default_rng(0).choice(WORDS, 12_000)))
    return path


def small(text, folder):
    """Makes a tiny run; keyword arguments replace its fields, and dicts those of its parts."""
    base = Run(
        folder=folder,
        steps=30,
        evaluate_every=10,
        evaluate_batches=2,
        checkpoint_every=7,
        model=Model(layers=1, width=16, heads=4, kv_heads=2, mlp_width=24, context=16),
        data=Data(source=str(text), batch=4, validation_share=0.2),
        optimizer=Optimizer(warmup_steps=3, learning_rate=1e-2),
    )

    def make(**fields):
        parts = {
            name: dataclasses.replace(getattr(base, name), **x) for name, x in fields.items() if isinstance(x, dict)
        }
        return dataclasses.replace(base, **{**fields, **parts})

    return make


@pytest.fixture(scope="session")
def make_small():
    """`small`, for fixtures with a text of their own."""
    return small


@pytest.fixture
def tiny(text, tmp_path):
    """`small` runs in a folder of the test's own."""
    return small(text, tmp_path / "runs")


@pytest.fixture(scope="session")
def reference(text, tmp_path_factory):
    """A tiny run that nothing interrupted, trained once."""
    run = small(text, tmp_path_factory.mktemp("reference") / "runs")(name="reference")
    train(run)
    return run
