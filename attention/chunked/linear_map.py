"""A linear map whose transpose is written by hand, and which can still be differentiated and mapped in every way.

`jax.custom_vjp` gives a function a backward pass and takes forward mode from it. Here the derivative of a function is
a linear map, given twice: by a definition, from which JAX can derive all that it needs, and by a transpose of one's
own, which is what reverse mode then runs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Arrays = list[jax.Array]
Function = Callable[[Arrays, Arrays], Arrays]


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """A function of constants and a vector, lists of arrays, that is linear in the vector.

    Attributes:
        definition: the function, in operations that JAX can transpose and differentiate.
        transpose: constants and a cotangent of the result to a cotangent of the vector, in any operations.
        fast: the same function as `definition`, in any operations; None for `definition` itself.
    """

    definition: Function
    transpose: Function | None
    fast: Function | None = None

    def transposed(self, vector: tuple[jax.ShapeDtypeStruct, ...]) -> "LinearMap":
        """The transpose, whose definition JAX derives from ours; `vector` is what our vector looks like."""

        def definition(constants: Arrays, cotangent: Arrays) -> Arrays:
            return jax.linear_transpose(functools.partial(self.definition, constants), list(vector))(cotangent)[0]

        return LinearMap(definition, transpose=self.fast, fast=self.transpose)

    def mapped(self, constants: tuple, size: int) -> "LinearMap":
        """The map of `size` problems, stacked in front; `constants` are the axes along which theirs are stacked."""

        over = functools.partial(jax.vmap, in_axes=(list(constants), 0), axis_size=size)
        return LinearMap(over(self.definition), *(f and over(f) for f in (self.transpose, self.fast)))


def apply(linear: LinearMap, constants: Any, vector: Any, like: Any) -> Any:
    """The map of `vector` at `constants`, both pytrees, whose result has the structure and the shapes of `like`.

    The functions of `linear` receive and return the leaves.
    """
    constants, vector = jax.tree.leaves(constants), jax.tree.leaves(vector)
    leaves, structure = jax.tree.flatten(like)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    found = _primitive.bind(*constants, *vector, linear=linear, split=len(constants), like=shapes)
    return jax.tree.unflatten(structure, found)


_primitive = Primitive("attention_linear_map")
_primitive.multiple_results = True


@_primitive.def_impl
def _run(*arrays, linear: LinearMap, split: int, like):
    del like
    return (linear.fast or linear.definition)(list(arrays[:split]), list(arrays[split:]))


@_primitive.def_abstract_eval
def _shapes(*arrays, linear: LinearMap, split: int, like):
    del arrays, linear, split
    return [ShapedArray(x.shape, x.dtype) for x in like]


mlir.register_lowering(_primitive, mlir.lower_fun(_run, multiple_results=True))


def _derivative(primals, tangents, *, linear: LinearMap, split: int, like):
    constants, vector = list(primals[:split]), primals[split:]
    found = _primitive.bind(*primals, linear=linear, split=split, like=like)
    moved = [jnp.zeros(x.shape, x.dtype) for x in like]
    if any(not isinstance(t, ad.Zero) for t in tangents[split:]):
        change = map(ad.instantiate_zeros, tangents[split:])
        moved = _primitive.bind(*constants, *change, linear=linear, split=split, like=like)
    moving = [n for n, t in enumerate(tangents[:split]) if not isinstance(t, ad.Zero)]
    if moving:

        def at(some):
            return linear.definition(
                [*(dict(enumerate(constants)) | dict(zip(moving, some, strict=True))).values()], list(vector)
            )

        change = jax.jvp(at, ([constants[n] for n in moving],), ([tangents[n] for n in moving],))[1]
        moved = [a + b for a, b in zip(moved, change, strict=True)]
    return found, moved


def _transpose(cotangents, *arrays, linear: LinearMap, split: int, like):
    cotangents = map(ad.instantiate_zeros, cotangents)
    vector = tuple(jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in arrays[split:])
    transposed = linear.transposed(vector)
    found = _primitive.bind(*arrays[:split], *cotangents, linear=transposed, split=split, like=vector)
    return [*(None,) * split, *found]


def _mapped(arrays, axes, *, linear: LinearMap, split: int, like):
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    vector = [batching.bdim_at_front(x, axis, size) for x, axis in zip(arrays[split:], axes[split:], strict=True)]
    like = tuple(jax.ShapeDtypeStruct((size, *x.shape), x.dtype) for x in like)
    linear = linear.mapped(tuple(axes[:split]), size)
    found = _primitive.bind(*arrays[:split], *vector, linear=linear, split=split, like=like)
    return found, [0] * len(found)


ad.primitive_jvps[_primitive] = _derivative
ad.primitive_transposes[_primitive] = _transpose
batching.primitive_batchers[_primitive] = _mapped
