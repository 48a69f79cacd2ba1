"""How large tiles are."""

from attention.chunked.tiles import Tiles
from attention.inputs import Inputs


def chosen(inputs: Inputs, query_chunk: int | None, key_chunk: int | None) -> tuple[Tiles, Tiles]:
    T, S = inputs.mask.num_queries, inputs.mask.num_keys
    return Tiles(T, min(T, query_chunk or 512)), Tiles(S, min(S, key_chunk or 512))
