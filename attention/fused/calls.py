"""What a choice among kernels depends on: facts about a call that are known before it runs."""

import dataclasses
from importlib.util import find_spec

import jax
import jax.numpy as jnp

from attention.inputs import Inputs
from attention.native import build


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call, as far as a kernel cares.

    Attributes:
        backend: "cpu", "gpu" or "tpu".
        generation: the compute capability of an NVIDIA GPU; 0 elsewhere.
        dtype: that of keys and values, unless the query has float64.
        head_size: the larger of H and E.
        queries, keys: T and S.
        asks: of "causal", "window", "lengths", "segments", "mask", "offset" (a causal position that is not the
            index), "bias", "soft cap", "residual", "certificate".
        tokamax: whether it is installed.
        native: why the kernel in C cannot be had here; empty where it can, and where nothing asks for it.
    """

    backend: str
    generation: float
    dtype: str
    head_size: int
    queries: int
    keys: int
    asks: frozenset[str]
    tokamax: bool
    native: str = ""


def described(inputs: Inputs, *asks: str) -> Call:
    """The call that `inputs` make, and what is asked of it besides an output."""
    mask = inputs.mask
    one = mask.num_queries == 1 and mask.window is None  # where causality is a length
    present = {
        "causal": mask.causal and mask.offset is None,
        "window": mask.window is not None,
        "lengths": mask.query_lengths is not None or mask.key_lengths is not None or (mask.offset is not None and one),
        "segments": mask.query_segments is not None,
        "mask": mask.dense is not None,
        "offset": mask.offset is not None and not one,
        "bias": inputs.bias is not None,
        "soft cap": inputs.soft_cap is not None,
    }
    backend = jax.default_backend()
    dtype = jnp.dtype(inputs.query.dtype if inputs.query.dtype == jnp.float64 else inputs.key.dtype).name
    return Call(
        backend=backend,
        generation=_generation(),
        dtype=dtype,
        head_size=max(inputs.query.shape[-1], inputs.value.shape[-1]),
        queries=mask.num_queries,
        keys=mask.num_keys,
        asks=frozenset(asks) | {name for name, asked in present.items() if asked},
        tokamax=find_spec("tokamax") is not None,
        native=build.fault() if backend == "cpu" and dtype != "float64" else "",
    )


def _generation() -> float:
    """The compute capability of the first device, 0 where it has none."""
    try:
        return float(getattr(jax.devices()[0], "compute_capability", 0))
    except ValueError:
        return 0.0  # AMD's are names
