"""The parameters of a model, and what one rank holds of each.

FSDP2 cuts dense parameters along dimension 0 over all W ranks, an expert weight ``[L, a, b]`` of
an EP rank along dimension 1, 2 or 0 over the S ranks of its shard group (`parallel.swap`). Where
a cut is uneven the first rank holds most; all figures are that rank's.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

from torch_moe_ep.plan.shape import ModelShape


class Weight(NamedTuple):
    """Equal parameters of a model.

    Attributes:
        kind: "expert"; "layer": dense, of a decoder layer; "root": embedding, last norm, head.
        shape: of one of them.
        num: how many there are.
    """

    kind: str
    shape: tuple[int, ...]
    num: int


@functools.cache
def weights_of(model: ModelShape) -> tuple[Weight, ...]:
    """Every parameter of a model."""
    hidden, vocab = model.hidden, model.vocab
    root = [(vocab, hidden), (hidden,)] + ([] if model.is_tied else [(vocab, hidden)])
    shapes = [*_attention(model), (hidden,), (hidden,), (model.experts, hidden), *_shared(model)]
    experts = [
        (model.experts, 2 * model.expert_width, hidden),
        (model.experts, hidden, model.expert_width),
    ]
    return (
        *(Weight("root", shape, 1) for shape in root),
        *(Weight("layer", shape, model.layers) for shape in shapes),
        *(Weight("expert", shape, model.layers) for shape in experts),
    )


def _attention(model: ModelShape) -> list[tuple[int, ...]]:
    hidden, queries, keys = model.hidden, model.query_width, model.key_width
    shapes: list[tuple[int, ...]] = [(queries, hidden), (keys, hidden), (keys, hidden)]
    shapes.append((hidden, queries))
    if model.has_qkv_bias:
        shapes += [(queries,), (keys,), (keys,)]
    if model.has_output_bias:
        shapes.append((hidden,))
    if model.qk_norm == "head":
        shapes += [(model.head_dim,), (model.head_dim,)]
    elif model.qk_norm == "full":
        shapes += [(queries,), (keys,)]
    return shapes


def _shared(model: ModelShape) -> list[tuple[int, ...]]:
    if model.shared_width == 0:
        return []
    width, hidden = model.shared_width, model.hidden
    return [(width, hidden), (width, hidden), (hidden, width), (1, hidden)]


def num_parameters(weights: Iterable[Weight], kind: str = "") -> int:
    """Elements of all weights, or of those of a kind.

    >>> num_parameters([Weight("expert", (8, 4, 2), 3), Weight("root", (5, 2), 1)])
    202
    """
    return sum(math.prod(w.shape) * w.num for w in weights if kind in ("", w.kind))


def local_parameters(
    weights: Iterable[Weight], world: int, ep: int, shard: int, kind: str = ""
) -> int:
    """Elements that the first rank holds, of all weights or of a kind.

    >>> local_parameters([Weight("root", (5, 2), 1)], world=4, ep=1, shard=4)  # rows 2, 2, 1, 0
    4
    >>> local_parameters([Weight("expert", (8, 4, 2), 1)], world=8, ep=4, shard=2)
    8
    """
    return sum(
        w.num * (_expert_part(w.shape, ep, shard) if w.kind == "expert" else _cut(w.shape, world))
        for w in weights
        if kind in ("", w.kind)
    )


def _cut(shape: tuple[int, ...], parts: int) -> int:
    """Elements of the first part of a tensor cut along dimension 0."""
    return -(-shape[0] // parts) * math.prod(shape[1:])


def _expert_part(shape: tuple[int, ...], ep: int, shard: int) -> int:
    local = (shape[0] // ep, *shape[1:])
    if local[1] % shard == 0 or local[2] % shard == 0:
        return math.prod(local) // shard
    return _cut(local, shard)
