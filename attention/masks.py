"""Which keys each query sees: one description, read a tile at a time or as a whole."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


def _static(**kwargs):
    return dataclasses.field(metadata={"static": True}, **kwargs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """The conjunction of every masking argument of `attention.dot_product_attention`.

    Query i stands at position p = i + offset. It sees key j where all of these hold: j <= p if `causal`;
    p - left <= j <= p + right if there is a `window`; i and j are within their sequence's lengths; their
    segments are equal; `dense[..., i, j]`.

    Attributes:
        num_queries, num_keys: T and S.
        causal: whether keys after p are hidden.
        window: (left, right) or None.
        offset: `B`, the position of the first query; None for 0.
        query_lengths, key_lengths: `B`, or None.
        query_segments, key_segments: `B T` and `B S`, or None.
        dense: boolean, five axes, each full or of size 1, broadcastable to `B K G T S`; or None.
    """

    num_queries: int = _static()
    num_keys: int = _static()
    causal: bool = _static(default=False)
    window: tuple[int, int] | None = _static(default=None)
    offset: Int[Array, " b"] | None = None
    query_lengths: Int[Array, " b"] | None = None
    key_lengths: Int[Array, " b"] | None = None
    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    dense: Bool[Array, "b k g t s"] | None = None

    def tile(self, row, rows: int, col, cols: int) -> Bool[Array, "b k g rows cols"]:
        """Visibility of keys [col, col + cols) from queries [row, row + rows); the starts may be traced.

        The span must lie inside the sequence: as everywhere in XLA, a slice beyond the end is moved back.
        Axes on which the mask does not depend have size 1.
        """
        return self._visible(row, rows, col, cols, (3, 4))

    def at(self, queries: Int[Array, " rows"], keys: Int[Array, " cols"]) -> Bool[Array, "b k g rows cols"]:
        """Visibility of any keys from any queries; an index that does not exist stands for the nearest that does."""
        i, j = queries.clip(0, self.num_queries - 1), keys.clip(0, self.num_keys - 1)

        def pick(x, at, axis):
            return None if x is None else jnp.take(x, at, axis=axis, mode="clip")

        dense = self.dense
        if dense is not None:
            dense = dense if dense.shape[3] == 1 else pick(dense, i, 3)
            dense = dense if dense.shape[4] == 1 else pick(dense, j, 4)
        segments = {"query_segments": pick(self.query_segments, i, 1), "key_segments": pick(self.key_segments, j, 1)}
        picked = dataclasses.replace(self, dense=dense, **segments)
        return picked._among(i.reshape(1, 1, 1, -1, 1), j.reshape(1, 1, 1, 1, -1), 0, i.size, 0, j.size, (3, 4))

    def tile_by_key(self, row, rows: int, col, cols: int) -> Bool[Array, "b k cols g rows"]:
        """`tile`, with the keys in front of the query heads and the queries."""
        return self._visible(row, rows, col, cols, (4, 2))

    def _visible(self, row, rows: int, col, cols: int, axes: tuple[int, int]):
        """A tile with its queries and its keys along the given two of five axes."""
        i, j = (
            _spread((start + jnp.arange(n))[None], axis)
            for start, n, axis in zip((row, col), (rows, cols), axes, strict=True)
        )
        return self._among(i, j, row, rows, col, cols, axes)

    def _among(self, i, j, row, rows: int, col, cols: int, axes: tuple[int, int]):
        """Visibility of keys j from queries i, which stand from `col` and from `row` on in segments and `dense`."""
        first, last = self._band(i)
        visible = (j >= first) & (j <= last)
        if self.query_lengths is not None:
            visible = visible & (i < _column(self.query_lengths))
        if self.key_lengths is not None:
            visible = visible & (j < _column(self.key_lengths))
        if self.query_segments is not None and self.key_segments is not None:
            mine = lax.dynamic_slice_in_dim(self.query_segments, row, rows, axis=1)
            theirs = lax.dynamic_slice_in_dim(self.key_segments, col, cols, axis=1)
            visible = visible & (_spread(mine, axes[0]) == _spread(theirs, axes[1]))
        if self.dense is not None:
            dense = slice_or_keep(slice_or_keep(self.dense, row, rows, 3), col, cols, 4)
            visible = visible & jnp.moveaxis(dense, (3, 4), axes)
        return visible

    def whole(self) -> Bool[Array, "b k g T S"]:
        """The mask of all queries and keys: T times S booleans for each axis on which it depends."""
        return self.tile(0, self.num_queries, 0, self.num_keys)

    def _band(self, i):
        """The first and last key that causality and the window leave to query i (`1 1 1 T 1`)."""
        position = i if self.offset is None else i + _column(self.offset)
        first, last = jnp.zeros_like(position), jnp.full_like(position, self.num_keys - 1)
        if self.window is not None:
            # Clipped first, so that an "unlimited" window of 2**31 - 1 cannot overflow.
            left, right = (min(size, self.num_keys + self.num_queries) for size in self.window)
            first, last = jnp.maximum(first, position - left), jnp.minimum(last, position + right)
        if self.causal:
            last = jnp.minimum(last, position)
        return first, last

    def key_range(self) -> tuple[Int[Array, "b T"], Int[Array, "b T"]]:
        """The first and last key, inclusive, that the band and the lengths leave to each query.

        A range whose last lies before its first is empty. Segments and `dense` can only narrow it.
        """
        i = jnp.arange(self.num_queries).reshape(1, 1, 1, -1, 1)
        first, last = self._band(i)
        if self.key_lengths is not None:
            last = jnp.minimum(last, _column(self.key_lengths) - 1)
        if self.query_lengths is not None:
            last = jnp.where(i < _column(self.query_lengths), last, -1)
        first, last = jnp.broadcast_arrays(first, last)
        return first[:, 0, 0, :, 0], last[:, 0, 0, :, 0]

    @property
    def uses_everything(self) -> bool:
        """Whether shapes alone show that every query sees a key and every key is seen (False: perhaps not)."""
        arrays = (self.offset, self.query_lengths, self.key_lengths, self.query_segments, self.dense)
        if any(array is not None for array in arrays):
            return False
        banded = self.causal or self.window is not None
        return not banded or self.num_queries == self.num_keys

    def used(self) -> tuple[Bool[Array, "b k g T"], Bool[Array, "b k S"]]:
        """Which queries see anything, and which keys anything sees, in O(T + S) unless there is a dense mask.

        Decided by lengths and band, by segment membership, and by the dense mask, each on its own: a slot
        reported unused is unused; one hidden only by their combination may be reported used.
        """
        queries, keys = self._used_by_band()
        if self.query_segments is not None and self.key_segments is not None:
            member = jax.vmap(lambda a, b: jnp.isin(a, b, method="sort"))
            queries &= member(self.query_segments, self.key_segments)
            keys &= member(self.key_segments, self.query_segments)
        queries, keys = queries[:, None, None, :], keys[:, None, :]
        if self.dense is not None:
            queries = queries & self.dense.any(4)
            keys = keys & self.dense.any((2, 3))
        return queries, keys

    def _used_by_band(self) -> tuple[Bool[Array, "b T"], Bool[Array, "b S"]]:
        first, last = self.key_range()
        queries = first <= last
        # Ranges move to the right with the query, so the union of a sequence's ranges is a count of opened
        # minus closed ones; summing a difference array over the keys finds the keys that lie in any.
        batch = first.shape[0]
        edges = jnp.zeros((batch, self.num_keys + 1), jnp.int32)
        each = jnp.arange(batch)[:, None]
        opened = edges.at[each, first.clip(0, self.num_keys)].add(queries.astype(jnp.int32))
        closed = opened.at[each, (last + 1).clip(0, self.num_keys)].add(-queries.astype(jnp.int32))
        keys = jnp.cumsum(closed, axis=1)[:, :-1] > 0
        return queries, keys


def slice_or_keep(x: Array, start, size: int, axis: int) -> Array:
    """A slice along an axis, or all of it where the axis has size 1 and stands for every index."""
    return x if x.shape[axis] == 1 else lax.dynamic_slice_in_dim(x, start, size, axis)


def _spread(x: Int[Array, "b n"], axis: int) -> Int[Array, "..."]:
    """Five axes, with the numbers of each batch element along the given one."""
    return jnp.expand_dims(x, [n for n in range(1, 5) if n != axis])


def _column(per_batch: Int[Array, " b"]) -> Int[Array, "b 1 1 1 1"]:
    return per_batch.reshape(-1, 1, 1, 1, 1)
