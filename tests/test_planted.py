"""Methods with one planted mistake each: the laws catch every one of them, by name."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from attention import Cost, Exact, Method
from attention.testing import LAWS, Violation, check


def planted(cls):
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def without(inputs, **fields):
    return dataclasses.replace(inputs, mask=dataclasses.replace(inputs.mask, **fields))


@planted
class NotCausal(Exact, register=False):
    def attend(self, inputs):
        return super().attend(without(inputs, causal=False))


@planted
class NormalisedByTheFuture(Exact, register=False):
    """Right but for rounding: rescales by the largest key of the whole sequence, as some Performers do."""

    def attend(self, inputs):
        largest = jnp.max(jnp.abs(inputs.key), axis=(2, 3), keepdims=True)
        query = inputs.query * largest[:, :, None]
        return super().attend(dataclasses.replace(inputs, query=query, key=inputs.key / largest))


@planted
class LeaksPadding(Exact, register=False):
    def attend(self, inputs):
        return super().attend(without(inputs, key_lengths=None))


@planted
class MeanForEmptyRows(Exact, register=False):
    def attend(self, inputs):
        seen = inputs.mask.tile(0, inputs.mask.num_queries, 0, inputs.mask.num_keys).any(-1, keepdims=True)
        return jnp.where(seen, super().attend(inputs), inputs.value.mean(2)[:, :, None, None, :])


@planted
class FalseCertificate(Exact, register=False):
    def certify(self, inputs):
        output, certificate = super().certify(inputs)
        return output * 1.01, certificate


@planted
class InventedCertificate(Exact, register=False):
    """Declares no bound, and gives one."""

    capabilities = dataclasses.replace(Exact.capabilities, certificate="none")


@planted
class FalseProbability(Exact, register=False):
    """Fails at every draw, where one in twenty may."""

    capabilities = dataclasses.replace(Exact.capabilities, certificate="probabilistic")

    def certify(self, inputs):
        output, certificate = super().certify(inputs)
        return output * 1.01, dataclasses.replace(certificate, kind="probabilistic", confidence=0.95)


@planted
class CertainProbability(Exact, register=False):
    """Calls a bound probable and states no probability of failure."""

    capabilities = dataclasses.replace(Exact.capabilities, certificate="probabilistic")

    def certify(self, inputs):
        output, certificate = super().certify(inputs)
        return output, dataclasses.replace(certificate, kind="probabilistic")


@planted
class Recompiles(Exact, register=False):
    def __eq__(self, other):
        return False

    def __hash__(self):
        return 0


@planted
class MixesTheBatch(Exact, register=False):
    def attend(self, inputs):
        return super().attend(inputs) + 1e-3 * inputs.value.mean((0, 2), keepdims=True)[:, :, None]


@planted
class TilesGroupedHeads(Exact, register=False):
    """Head n reads key head n % K, where n // G is right."""

    def attend(self, inputs):
        B, K, G, T, H = inputs.query.shape
        query = jnp.swapaxes(inputs.query.reshape(B, G, K, T, H), 1, 2)
        output = super().attend(dataclasses.replace(inputs, query=query))
        return jnp.swapaxes(output, 1, 2).reshape(B, K, G, T, -1)


@planted
class HalfPrecision(Exact, register=False):
    def attend(self, inputs):
        rounded = inputs.query.astype(inputs.key.dtype).astype(inputs.query.dtype)
        return super().attend(dataclasses.replace(inputs, query=rounded))


@planted
class ForgetsTheCache(Exact, register=False):
    def extend(self, state, query, key, value, **options):
        return super().extend(state, query[:, ::-1], key, value, **options)


@planted
class GradientStopped(Exact, register=False):
    def attend(self, inputs):
        return super().attend(dataclasses.replace(inputs, key=jax.lax.stop_gradient(inputs.key)))


@planted
class WrongSecondDerivative(Exact, register=False):
    """Values and first derivatives are right."""

    def attend(self, inputs):
        return super().attend(dataclasses.replace(inputs, key=once_differentiable(inputs.key)))


@jax.custom_jvp
def once_differentiable(x):
    return x


@once_differentiable.defjvp
def _tangent(primals, tangents):
    (x,), (tangent,) = primals, tangents
    return x, tangent * (1 + x - jax.lax.stop_gradient(x))


@planted
class IgnoresBias(Exact, register=False):
    def attend(self, inputs):
        return super().attend(dataclasses.replace(inputs, bias=None))


@planted
class IgnoresTheCap(Exact, register=False):
    def attend(self, inputs):
        return super().attend(dataclasses.replace(inputs, soft_cap=None))


@planted
class WiderWindow(Exact, register=False):
    def attend(self, inputs):
        window = inputs.mask.window
        return super().attend(without(inputs, window=window and (window[0] + 1, window[1])))


@planted
class LeaksSegments(Exact, register=False):
    def attend(self, inputs):
        return super().attend(without(inputs, query_segments=None, key_segments=None))


@planted
class LeaksHiddenKeys(Exact, register=False):
    def attend(self, inputs):
        return super().attend(without(inputs, dense=None))


@planted
class ReadsTheWholeCache(Exact, register=False):
    def extend(self, state, query, key, value, **options):
        state, output = super().extend(state, query, key, value, **options)
        return state, output + 0 * state.value.sum()


@planted
class SeesOneAhead(Exact, register=False):
    """Wrong only where keys stand apart from queries: aligns to the end by one key too many."""

    def attend(self, inputs):
        offset = inputs.mask.offset
        return super().attend(without(inputs, offset=offset if offset is None else offset + 1))


@planted
class NeedsConcreteNumbers(Exact, register=False):
    """Compiles beta in, so that another temperature is another program."""

    def attend(self, inputs):
        return super().attend(inputs) if float(inputs.beta) else inputs.value


CAUGHT_BY = {
    NotCausal: "the_future_does_not_exist",
    NormalisedByTheFuture: "the_future_does_not_exist",
    LeaksPadding: "padding_equals_truncation",
    MeanForEmptyRows: "rows_that_see_nothing_are_zero",
    FalseCertificate: "certificates_hold",
    InventedCertificate: "certificates_hold",
    FalseProbability: "certificates_hold",
    CertainProbability: "certificates_hold",
    Recompiles: "a_second_eager_call_does_not_recompile",
    MixesTheBatch: "batch_elements_are_independent",
    TilesGroupedHeads: "grouped_heads_equal_repeated_heads",
    HalfPrecision: "low_precision_is_rounding",
    ForgetsTheCache: "extend_over_any_split_equals_the_whole",
    GradientStopped: "gradients_equal_finite_differences",
    WrongSecondDerivative: "gradients_equal_finite_differences",
    IgnoresBias: "exact_limit_equals_the_oracle",
    IgnoresTheCap: "exact_limit_equals_the_oracle",
    WiderWindow: "exact_limit_equals_the_oracle",
    LeaksSegments: "packed_segments_equal_segments_alone",
    LeaksHiddenKeys: "hidden_keys_do_not_exist",
    ReadsTheWholeCache: "unused_cache_does_not_exist",
    SeesOneAhead: "the_future_does_not_exist_when_aligned_to_the_end",
    NeedsConcreteNumbers: "new_values_do_not_recompile",
}


@pytest.mark.parametrize(("cls", "name"), CAUGHT_BY.items(), ids=lambda x: getattr(x, "__name__", None))
def test_planted_mistake_is_caught_by_name(cls: type[Method], name: str):
    with pytest.raises(Violation, match=rf"{name}: {cls.__name__}"):
        LAWS[name](cls())


@planted
class FirstHeadForAll(Method, register=False):
    """Wrong in several ways, and capable of little, so that all laws that bind it run in a moment."""

    def attend(self, inputs):
        mean = inputs.value.astype(inputs.query.dtype).mean((0, 2))[None, :1, None, None]
        return jnp.broadcast_to(mean, (*inputs.query.shape[:-1], mean.shape[-1]))

    def cost(self, T, S, *, num_heads, head_dim, is_causal=False):
        return Cost(0.0, 0.0)


def test_check_names_every_broken_law():
    with pytest.raises(Violation) as caught:
        check(FirstHeadForAll())
    for name in ("batch_elements_are_independent", "heads_are_independent", "cost_grows_with_length"):
        assert f"{name}: FirstHeadForAll()" in str(caught.value)
