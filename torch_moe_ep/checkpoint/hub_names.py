"""Which tensors of a Hugging Face folder make up which weight of the model.

The mapping is transformers' own: its registered conversion renames keys and says how experts
stored one by one become a fused weight. Mixtral on the hub::

    model.layers.0.block_sparse_moe.experts.3.w1.weight  [I, H]   gate_up_proj[3, 0:I]
    model.layers.0.block_sparse_moe.experts.3.w3.weight  [I, H]   gate_up_proj[3, I:2I]
    model.layers.0.block_sparse_moe.experts.3.w2.weight  [H, I]   down_proj[3]

A file that has the fused names already needs no conversion; both go by the keys met.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_moe_ep.checkpoint.hub_files import FLOATING, ITEM_BYTES, Header, and_more
from torch_moe_ep.checkpoint.weights import Weight
from torch_moe_ep.integrations.transformers4 import HUB_EXPERT, Names, fused_names

IGNORED = r"rotary_emb\.inv_freq"  # computed, yet in old files; transformers passes over it too
_EXTRA = (
    "the folder holds {}, which the model does not have; it is of another model, or config and "
    "weights do not belong together."
)


@dataclass(frozen=True)
class Piece:
    """One tensor of the files as a block of a weight.

    It covers ``weight[start : start + shape]``; `is_stacked` tensors lack the first dimension,
    over which experts are stacked.
    """

    key: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    is_stacked: bool = False


@dataclass(frozen=True)
class Source:
    """The pieces of one weight; `copies` are whole tensors that must equal it (tied weights)."""

    weight: Weight
    pieces: list[Piece]
    copies: list[Piece]


def find_sources(
    inner: nn.Module, weights: Sequence[Weight], headers: dict[str, Header]
) -> list[Source]:
    """Match a folder's tensors with the weights of a model.

    Args:
        inner: the transformers model without wrappers.
        weights: of `find_weights`.
        headers: every tensor of the folder.

    Returns:
        One source per weight, in the order of `weights`.

    Raises:
        ValueError: a weight or an expert without a tensor, a tensor without a weight, a shape or
            kind of dtype that differs, or a conversion that cannot be read in parts.

    Not collective; reads nothing.
    """
    by_name = {name: weight for weight in weights for name in weight.names}
    keys, converters = _sort_keys(inner, by_name, headers)
    sources: list[Source] = []
    missing: list[str] = []
    for weight in weights:
        made = [
            _pieces(weight, name, keys[name], converters, headers)
            for name in weight.names
            if name in keys
        ]
        if not made:
            missing.append(weight.names[0])
            continue
        sources.append(Source(weight, made[0], [piece for pieces in made[1:] for piece in pieces]))
    if missing:
        raise ValueError(
            f"the folder holds nothing for {missing[0]}{and_more(missing)}; it is of another "
            f"model, or config and weights do not belong together."
        )
    return sources


# Per weight name: pattern of the conversion (None without one) to the keys that match it.
_Keys = dict[str, dict[str | None, list[tuple[str, int]]]]


def _sort_keys(
    inner: nn.Module, by_name: dict[str, Weight], headers: dict[str, Header]
) -> tuple[_Keys, dict[str, Any]]:
    """Sort keys by the weight they go to; the number beside a key is its expert's."""
    fused = fused_names(inner)
    if fused:
        return _sort_single_experts(fused, by_name, headers)
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(inner)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = getattr(inner, "base_model_prefix", "")
    found: _Keys = defaultdict(lambda: defaultdict(list))
    extra: list[str] = []
    for key in sorted(headers, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, by_name)
        if name not in by_name and key in by_name:
            name, pattern = key, None
        if name not in by_name:
            extra.append(key)
            continue
        renamed = key if pattern is None else rename_source_key(key, renamings, [])[0]
        found[name][pattern].append((key, _expert_of(renamed, pattern)))
    ignored = [IGNORED, *(getattr(inner, "_keys_to_ignore_on_load_unexpected", None) or [])]
    extra = [key for key in extra if not any(re.search(each, key) for each in ignored)]
    if extra:
        raise ValueError(_EXTRA.format(extra[0] + and_more(extra)))
    return found, {pattern: entry for entry in converters for pattern in entry.source_patterns}


def _sort_single_experts(
    fused: dict[str, Names], by_name: dict[str, Weight], headers: dict[str, Header]
) -> tuple[_Keys, dict[str, Any]]:
    """The same for transformers 4.57, whose names are the hub's, but for the fused experts."""
    found: _Keys = defaultdict(lambda: defaultdict(list))
    converters: dict[str, Any] = {}
    for key in sorted(headers):
        match = HUB_EXPERT.match(key)
        names = None if match is None else fused.get(match[1])
        if match is None or names is None:
            if key not in by_name:
                if re.search(IGNORED, key):
                    continue
                raise ValueError(_EXTRA.format(key))
            found[key][None].append((key, -1))
            continue
        sources = (names.down,) if match[3] == names.down else (names.gate, names.up)
        name = f"{match[1]}.{'down_proj' if len(sources) == 1 else 'gate_up_proj'}"
        found[name][match[3]].append((key, int(match[2])))
        converters[match[3]] = _Stacking(sources)
    return found, converters


@dataclass(frozen=True)
class _Stacking:
    """A conversion that stacks experts and joins its sources along their rows."""

    source_patterns: tuple[str, ...]


def _expert_of(renamed: str, pattern: str | None) -> int:
    """The number where a pattern such as ``.experts.*.w1.weight`` has its star, else -1."""
    if pattern is None or "*." not in pattern:
        return -1
    match = re.search(pattern.replace("*.", r"(\d+)\."), renamed)
    return -1 if match is None else int(match.group(1))


def _pieces(
    weight: Weight,
    name: str,
    keys: dict[str | None, list[tuple[str, int]]],
    converters: dict[str, Any],
    headers: dict[str, Header],
) -> list[Piece]:
    if None in keys:
        found = [key for entries in keys.values() for key, _ in entries]
        if len(found) > 1:
            raise ValueError(
                f"the folder holds {name} twice, as {found[0]} and {found[1]}; it mixes two "
                f"layouts, download or export it anew."
            )
        pieces = [Piece(found[0], (0,) * len(weight.shape), tuple(weight.shape))]
    else:
        pattern = next(key for key in keys if key is not None)
        pieces = _stacked_pieces(weight, name, keys, converters[pattern])
    for piece in pieces:
        _check_header(weight, piece, headers[piece.key])
    return pieces


def _stacked_pieces(
    weight: Weight,
    name: str,
    keys: dict[str | None, list[tuple[str, int]]],
    converter: Any,
) -> list[Piece]:
    """One piece per expert and source: sources share the rows of an expert, in their order."""
    if not _is_stacking(converter) or len(weight.shape) != 3:
        raise ValueError(
            f"{name} is stored in a way that load_hf cannot read in parts ({converter}); load the "
            f"model on rank 0 with from_pretrained and pass sync_from_rank0=True to "
            f"apply_expert_parallel."
        )
    num_experts, rows, columns = weight.shape
    patterns = converter.source_patterns
    rows_each = rows // len(patterns)
    pieces: list[Piece] = []
    for place, pattern in enumerate(patterns):
        of_expert = {expert: key for key, expert in keys.get(pattern, [])}
        lost = sorted(set(range(num_experts)) - set(of_expert))
        if lost or len(keys[pattern]) != num_experts:
            what = f"lacks {lost}" if lost else f"holds {len(keys[pattern])}"
            raise ValueError(
                f"{name} is made of experts 0 to {num_experts - 1} ({pattern}), but the folder "
                f"{what}; config and weights do not belong together, or a file is missing."
            )
        pieces += [
            Piece(of_expert[e], (e, place * rows_each, 0), (1, rows_each, columns), is_stacked=True)
            for e in range(num_experts)
        ]
    return pieces


def _is_stacking(converter: Any) -> bool:
    """Whether a conversion stacks experts, and joins several sources along their rows at most."""
    if isinstance(converter, _Stacking):
        return True
    from transformers.core_model_loading import Concatenate, MergeModulelist

    stack, *join = converter.operations
    if not isinstance(stack, MergeModulelist) or stack.dim != 0:
        return False
    if len(converter.target_patterns) != 1 or len(join) > 1:
        return False
    if not join:
        return len(converter.source_patterns) == 1
    return isinstance(join[0], Concatenate) and join[0].dim == 1


def _check_header(weight: Weight, piece: Piece, header: Header) -> None:
    shape = piece.shape[1:] if piece.is_stacked else piece.shape
    if header.shape != shape:
        raise ValueError(
            f"{piece.key} has shape {header.shape}, but {weight.names[0]} needs {shape}; config "
            f"and weights do not belong together."
        )
    is_kind = (header.dtype in FLOATING) == weight.dtype.is_floating_point
    if header.dtype not in ITEM_BYTES or not is_kind:
        raise ValueError(
            f"{piece.key} is stored as {header.dtype}, but {weight.names[0]} is {weight.dtype}; "
            f"quantised weights must be dequantised first."
        )
