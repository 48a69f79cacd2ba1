"""A method from outside is a method like ours: in the registry, the laws, the command line and the documents."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import attention

ROOT = Path(__file__).parent.parent

STRANGER = '''
"""A method that another distribution brings: plain attention over the mean of neighbouring keys."""
import dataclasses
import jax.numpy as jnp
import attention
from attention import Capabilities, Cost, Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stranger(Method):
    """Attends to every key alike."""

    strength: float = 1.0
    capabilities = Capabilities()

    def attend(self, inputs):
        B, K, G, T, H = inputs.query.shape
        mean = inputs.value.astype(inputs.query.dtype).mean(2)[:, :, None, None]
        return jnp.broadcast_to(mean, (B, K, G, T, mean.shape[-1]))

    def cost(self, T, S, *, num_heads, head_dim, is_causal=False):
        return Cost(float(num_heads * (T + S) * head_dim), 4.0 * num_heads * (T + S) * head_dim)
'''


@pytest.fixture
def plugin(tmp_path):
    """An installed distribution with an entry point, as a folder on the path."""
    (tmp_path / "stranger.py").write_text(STRANGER)
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attention.methods]\nstranger = stranger:Stranger\n")
    return tmp_path


def python(*arguments, plugin):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(plugin), str(ROOT)]), "COLUMNS": "120"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_entry_point_is_a_method(plugin):
    program = "import attention as a; print(list(a.METHODS)); print(a.make_method('stranger', strength=2.0))"
    names, made = python("-c", program, plugin=plugin).splitlines()
    assert "stranger" in names
    assert made == "Stranger(strength=2.0)"


def test_the_laws_run_over_a_strangers_method(plugin):
    collected = python("-m", "pytest", "tests/test_laws.py", "--collect-only", "-k", "Stranger", plugin=plugin)
    assert "test_law[Stranger(strength=1.0)-vmap_equals_loop]" in collected


def test_a_broken_plugin_warns_and_leaves_the_rest(plugin):
    (plugin / "stranger.py").write_text("raise RuntimeError('no such day')")
    program = "import warnings, attention\nwith warnings.catch_warnings(record=True) as w:\n"
    program += "    warnings.simplefilter('always'); print(list(attention.METHODS), w[0].message)"
    printed = python("-c", program, plugin=plugin)
    assert "exact" in printed
    assert "no such day" in printed


@pytest.mark.parametrize("expression", ["exact", "Exact", "Exact()", " Exact( ) "])
def test_an_expression_makes_a_method(expression):
    assert attention.parse_method(expression) == attention.Exact()


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("exakt", "did you mean 'exact'"),
        ("Exact(chunk=3)", "unknown field of Exact 'chunk'"),
        ("Exact(3)", "expected a name"),
        ("__import__('os').system('true')", "expected a name"),
        ("Exact(**{})", "expected a name"),
        ("1 +", "expected a name"),
    ],
)
def test_a_bad_expression_is_refused(expression, message):
    with pytest.raises(ValueError, match=message):
        attention.parse_method(expression)


def test_two_classes_cannot_share_a_name():
    with pytest.raises(ValueError, match="would replace attention"):
        type("Exact", (attention.Method,), {"__module__": "elsewhere"})


def test_a_missing_name_is_a_key_error():
    with pytest.raises(KeyError, match="did you mean 'exact'"):
        attention.METHODS["exat"]


@pytest.mark.parametrize("name", [name for name, kind in attention.METHODS.items() if kind.capabilities.decoding])
def test_decoding_refuses_an_option_that_its_state_could_not_keep(name):
    """Segments of the tokens before are not in any state: they are no option, and not one that is dropped."""
    method, tokens = attention.METHODS[name](), jnp.zeros((1, 1, 1, 8))
    state = method.init_state(1, 1, 8, 4, jnp.float32, num_heads=1)
    segments = {"query_segment_ids": jnp.zeros((1, 1), int), "key_value_segment_ids": jnp.zeros((1, 1), int)}
    with pytest.raises(TypeError, match="unexpected keyword argument 'query_segment_ids'"):
        method.extend(state, tokens, tokens, tokens, **segments)
