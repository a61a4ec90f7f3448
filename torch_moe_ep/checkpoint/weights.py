"""The weights of a wrapped model one by one: full shape, and which part this rank holds.

FSDP2 and the experts hold DTensors, FSDP1 flat parameters, DDP and plain models whole tensors.
Names are those of the unwrapped model's state dict, relative to the Hugging Face model. FSDP1
hands its weights out unit by unit (`each_tensor`), so that never more than one is gathered.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from torch_moe_ep.integrations.wrapper_names import plain_name
from torch_moe_ep.parallel.state import ExpertParallelState, iter_experts, states_of
from torch_moe_ep.parallel.swap import local_box

Box = tuple[slice, ...]


@dataclass(eq=False)
class Weight:
    """One parameter or persistent buffer, whatever shards it.

    `names` are its keys in the state dict (several when tied, the one that is saved first) and
    `places` the modules and attributes that hold it. `box` is this rank's part of the full
    `shape`. Under FSDP1, `unit` is the wrapper and `flat_range` the elements (first, end) of the
    flattened weight that this rank holds; `box` are then the rows that cover them.
    """

    names: list[str]
    places: list[tuple[nn.Module, str]]
    shape: torch.Size
    dtype: torch.dtype
    box: Box
    is_expert: bool = False
    unit: FSDP1 | None = field(default=None, repr=False)
    flat_range: tuple[int, int] | None = None


def inner_model(model: nn.Module) -> nn.Module:
    """The model without FSDP1, DDP or compile wrappers around it."""
    states = states_of(model)
    if states:
        return states[0].model
    if isinstance(model, (FSDP1, DistributedDataParallel)):
        return inner_model(model.module)
    compiled = model._modules.get("_orig_mod")
    return model if compiled is None else inner_model(compiled)


def check_is_model(model: object) -> None:
    """Refuse what is no module, such as a path: checkpoints take it first, exports second."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; call save_checkpoint"
            f"(path, model) and load_checkpoint(path, model), but export_hf(model, folder) and "
            f"load_hf(model, folder)."
        )


def check_wrappers(model: nn.Module) -> None:
    """Refuse a model without the FSDP1 wrappers around it: its weights are pieces of flat shards.

    Not collective; all ranks wrap alike and raise alike.
    """
    check_is_model(model)
    inside = {id(module) for module in model.modules()}
    for state in states_of(model):
        for wrapper in state.fsdp1_modules():
            handle = wrapper._handle
            if id(wrapper) in inside or handle is None or not handle.uses_sharded_strategy:
                continue
            if any(id(info.module) in inside for info in handle.flat_param._param_infos):
                raise ValueError(
                    "the model is inside FullyShardedDataParallel and holds one rank's pieces of "
                    "its weights; pass the wrapper instead of the model."
                )


def find_weights(model: nn.Module) -> list[Weight]:
    """Every parameter and persistent buffer of a model once, FSDP1's unit by unit.

    Leaves FSDP2 modules sharded. Not collective.
    """
    inner = inner_model(model)
    for module in inner.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    names: dict[int, str] = {}
    for name, module in inner.named_modules():
        names[id(module)] = plain_name(name)
    found: list[Weight] = []
    flattened: set[tuple[int, str]] = set()
    for unit in _fsdp1_wrappers(model):
        in_unit, places = _flat_weights(unit, names)
        found += in_unit
        flattened |= places
    found = _plain_weights(inner, names, flattened) + found
    tied = getattr(inner, "all_tied_weights_keys", None) or {}
    for weight in found:
        order = sorted(range(len(weight.names)), key=lambda i: weight.names[i] in tied)
        weight.names = [weight.names[i] for i in order]
        weight.places = [weight.places[i] for i in order]
    return found


def each_tensor(
    model: nn.Module, weights: Sequence[Weight], *, writeback: bool
) -> Iterator[tuple[Weight, torch.Tensor]]:
    """Hand out each weight with the tensor that holds it now.

    Args:
        model: what `find_weights` was called with.
        weights: of `find_weights`.
        writeback: whether FSDP1 keeps what is written into the tensors (this rank's part).

    Returns:
        The weight and its DTensor, or its full plain tensor (valid until the next step of the
        iteration).

    Collective under FSDP1 (one gather per unit); all ranks must iterate to the end.
    """
    for wrapper in _fsdp1_wrappers(model):
        if wrapper._is_root is None:  # the outermost becomes the root, so it must come first
            with FSDP1.summon_full_params(wrapper, recurse=False, writeback=False):
                pass
    for unit, group in itertools.groupby(weights, key=lambda weight: weight.unit):
        if unit is None:
            yield from ((weight, _held(weight)) for weight in group)
            continue
        if writeback:
            _reshard_fsdp1(unit)
        with FSDP1.summon_full_params(unit, recurse=False, writeback=writeback):
            yield from ((weight, _held(weight)) for weight in group)


def _reshard_fsdp1(unit: FSDP1) -> None:
    """Free what a forward left gathered; it would be used on, with old values of other ranks."""
    handle = unit._handle
    assert handle is not None
    if handle.uses_sharded_strategy and not handle.needs_unshard():
        _reshard(unit, handle, free_unsharded_flat_param=True)


def _held(weight: Weight) -> torch.Tensor:
    module, attribute = weight.places[0]
    tensor = getattr(module, attribute)
    assert isinstance(tensor, torch.Tensor)
    return tensor.detach()


def _join(module_name: str, attribute: str) -> str:
    return f"{module_name}.{attribute}" if module_name else attribute


def _fsdp1_wrappers(model: nn.Module) -> list[FSDP1]:
    """FSDP1 wrappers in and around a model, outermost first."""
    candidates = [module for module in model.modules() if isinstance(module, FSDP1)]
    for state in states_of(model):
        candidates += state.fsdp1_modules()
    wrappers = {id(wrapper): wrapper for wrapper in candidates}
    return sorted(wrappers.values(), key=lambda wrapper: -sum(1 for _ in wrapper.modules()))


def _flat_weights(unit: FSDP1, names: dict[int, str]) -> tuple[list[Weight], set[tuple[int, str]]]:
    """The weights in one FSDP1 unit's flat parameter, and the places that it took over."""
    handle: Any = unit._handle
    if handle is None:
        return [], set()
    flat = handle.flat_param
    weights: dict[tuple[int, str], Weight] = {}
    for idx, (info, shape) in enumerate(zip(flat._param_infos, flat._shapes, strict=True)):
        first, end = 0, shape.numel()
        if handle.uses_sharded_strategy:
            shard = flat._shard_param_infos[idx]
            is_held = shard.in_shard
            first, end = (
                (shard.intra_param_start_idx, shard.intra_param_end_idx + 1) if is_held else (0, 0)
            )
        row = max(1, shape[1:].numel()) if len(shape) > 0 else 1
        box = [slice(0, length) for length in shape]
        if box:
            box[0] = slice(first // row, -(-end // row))
        weights[id(info.module), info.param_name] = Weight(
            names=[_join(names[id(info.module)], info.param_name)],
            places=[(info.module, info.param_name)],
            shape=shape,
            dtype=flat.dtype,
            box=tuple(box),
            unit=unit,
            flat_range=(first, end),
        )
    places = set(weights)
    for shared in flat._shared_param_infos:
        weight = weights[id(shared.prim_module), shared.prim_param_name]
        weight.names.append(_join(names[id(shared.module)], shared.param_name))
        weight.places.append((shared.module, shared.param_name))
        places.add((id(shared.module), shared.param_name))
    return list(weights.values()), places


def _plain_weights(
    inner: nn.Module, names: dict[int, str], flattened: set[tuple[int, str]]
) -> list[Weight]:
    """The weights that hang on their modules as themselves."""
    state_of_param: dict[int, ExpertParallelState] = {}
    for experts in iter_experts(inner):
        for param in experts.held_parameters():
            state_of_param[id(param)] = experts.__dict__["expert_parallel_state"]
    found: dict[int, Weight] = {}
    for module in inner.modules():
        persistent = {
            key: tensor
            for key, tensor in module._buffers.items()
            if key not in module._non_persistent_buffers_set
            and key not in getattr(module, "unexported_buffers", ())
        }
        for key, tensor in {**module._parameters, **persistent}.items():
            if tensor is None or (id(module), key) in flattened or key == "_flat_param":
                continue
            if id(tensor) not in found:
                state = state_of_param.get(id(tensor))
                found[id(tensor)] = Weight(
                    names=[],
                    places=[],
                    shape=tensor.shape,
                    dtype=tensor.dtype,
                    box=_box(tensor, state),
                    is_expert=state is not None,
                )
            found[id(tensor)].names.append(_join(names[id(module)], key))
            found[id(tensor)].places.append((module, key))
    return list(found.values())


def _box(tensor: torch.Tensor, state: ExpertParallelState | None) -> Box:
    if state is not None:
        return local_box(tensor.shape, state)
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, length) for length in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))
