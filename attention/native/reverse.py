"""What has a derivative in reverse mode alone, and says so: of itself JAX raises a bare TypeError, at the kernel."""

from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from attention.method import UnsupportedError


def reverse_only(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x, whose tangent can be transposed, but raises `UnsupportedError` where it is computed, compiled or mapped."""
    return _same.bind(x)


def _refuse(*_):
    raise UnsupportedError("Fused(implementation='native') has no derivatives in forward mode: Chunked() has them")


def _shape(x: ShapedArray) -> ShapedArray:
    return x


def _derivative(primals, tangents):
    (tangent,) = tangents
    return _same.bind(*primals), tangent if isinstance(tangent, ad.Zero) else _refused.bind(tangent)


# Primitives of our own, since vmap would map a rule of `custom_jvp` together with its function.
_same, _refused = Primitive("attention_lab_same"), Primitive("attention_lab_refused")
_same.def_impl(lambda x: x)
_same.def_abstract_eval(_shape)
mlir.register_lowering(_same, lambda _, x: [x])
batching.defvectorized(_same)
ad.primitive_jvps[_same] = _derivative
_refused.def_impl(_refuse)
_refused.def_abstract_eval(_shape)
mlir.register_lowering(_refused, _refuse)
batching.primitive_batchers[_refused] = _refuse
ad.primitive_transposes[_refused] = lambda cotangent, _: [cotangent]
