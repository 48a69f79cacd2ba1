"""Decoding for methods that choose pages: the state has the pages, and what the tile at hand has chosen."""

import dataclasses
from typing import Any

from jaxtyping import Array

from attention.cache import mask_of_tokens
from attention.inputs import prepare_tokens, ungrouped
from attention.method import Method, compiled
from attention.sparse.pages import PagedCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paged(Method, register=False):
    """A method with a hook `attend_pages`: from inputs and a state to the output and the last tile's choice."""

    def extend(self, state: PagedCache, query, key, value, **options: Any) -> tuple[PagedCache, Array]:
        """As `Method.extend`. Where params are drawn, they must be those of the earlier calls."""
        new = prepare_tokens(self, query, key, value, **options)
        longer = state.append(new.key, new.value)
        mask = mask_of_tokens(new.mask, state.length, longer.length, longer.max_length)
        whole = dataclasses.replace(new, mask=mask)
        output, chosen = compiled((whole, longer), method=self, hook="attend_pages")
        return dataclasses.replace(longer, chosen=chosen), ungrouped(output, query).astype(query.dtype)
