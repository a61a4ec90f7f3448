"""Gradient norm and clipping over every kind of gradient a patched model can have.

    kind                                  counted by
    FSDP2 dense, experts (DTensor)        ranks whose coordinate is 0 on every replicated mesh dim
    FSDP1 flat shards                     ranks of the first replica (HYBRID) or all (FULL)
    plain (no FSDP, DDP, FSDP1 NO_SHARD)  rank 0

Each rank reduces what it counts to one number, the W numbers are gathered, and every rank adds
them in rank order in fp64: the norm has the same bits on all ranks, whatever algorithm the
all-gather uses. Gradients that a rank does not count still enter times zero, so a NaN or infinity
in any replica makes the norm NaN on every rank and all ranks decide alike.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate

from torch_moe_ep.gather import all_gather
from torch_moe_ep.parallel.flags import local_flags, raise_if_flagged, wait_for_peers
from torch_moe_ep.parallel.state import ExpertParallelState, live_states, states_of


class _Gradient(NamedTuple):
    local: torch.Tensor  # this rank's elements
    is_counted: bool  # whether this rank's elements enter the norm


@torch.no_grad()
def clip_grad_norm_(
    model_or_parameters: nn.Module | torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
) -> torch.Tensor:
    """Clip the gradients of a model to a total norm, in place.

    Args:
        model_or_parameters: the model (patched, or its FSDP1 or DDP wrapper), or its parameters.
        max_norm: gradients are scaled by min(1, max_norm / (norm + 1e-6)), as torch does.
        norm_type: p of the p-norm, positive; ``float("inf")`` for the largest element.

    Returns:
        The total norm before clipping: fp32 ``[]`` on the experts' device, the same bits on all
        ranks; NaN on all ranks if any rank has a non-finite gradient and p is finite.

    Raises:
        ValueError: on every rank, before any gradient changes, when an experts module met an
            expert id out of range since the last step, or more rows than budget="bounded" has
            room for. Also for a mesh that does not span all
            ranks, and for FSDP1 parameters whose wrapper is unknown (pass the model).

    Collective over all ranks (one all-gather of three numbers). Syncs the host once when the model
    is patched, to read the flags; with the peer transport twice. Deterministic.
    """
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ValueError(f'norm_type must be positive or float("inf"), got {norm_type}.')
    params, states, wrappers = _resolve(model_or_parameters)
    grads = _gradients(params, wrappers)
    device = _device(states, grads)
    part = _counted_part(grads, norm_type, device)
    wait_for_peers(states)
    everyone = all_gather(torch.cat([part, local_flags(states, device)]))
    if states:
        raise_if_flagged(states, everyone[:, 1:].tolist())
        for state in states:
            state.is_flag_checked = True
    total_norm = _norm_of_parts(everyone[:, 0], norm_type)
    coefficient = torch.clamp(max_norm / (total_norm + 1e-6), max=1.0)
    for local_grads in _by_device_and_dtype([grad.local for grad in grads]):
        torch._foreach_mul_(local_grads, coefficient.to(local_grads[0].device))
    return total_norm


def _resolve(
    source: nn.Module | torch.Tensor | Iterable[torch.Tensor],
) -> tuple[list[torch.Tensor], list[ExpertParallelState], list[FullyShardedDataParallel]]:
    """Parameters (each once), patched models to check, FSDP1 instances that may own parameters."""
    params: list[torch.Tensor]
    if isinstance(source, nn.Module):
        params, states = list(source.parameters()), states_of(source)
        modules = [m for m in source.modules() if isinstance(m, FullyShardedDataParallel)]
    else:
        params = [source] if isinstance(source, torch.Tensor) else list(source)
        states, modules = live_states(), []
    for state in states:
        modules += state.fsdp1_modules()
    unique = {id(param): param for param in params}
    return list(unique.values()), states, modules


def _gradients(
    params: list[torch.Tensor], wrappers: list[FullyShardedDataParallel]
) -> list[_Gradient]:
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    flat_counted = _fsdp1_counted(wrappers, is_first)
    grads: list[_Gradient] = []
    for param in params:
        if param.grad is None:
            continue
        if isinstance(param.grad, DTensor):
            is_counted = _is_first_replica(param.grad)
            grads.append(_Gradient(param.grad.to_local(), is_counted))
        elif getattr(param, "_fsdp_flattened", False):
            if id(param) not in flat_counted:
                raise ValueError(
                    "clip_grad_norm_ got FSDP1 parameters whose wrapper it does not know; pass "
                    "the model instead of its parameters."
                )
            grads.append(_Gradient(param.grad, flat_counted[id(param)]))
        else:
            grads.append(_Gradient(param.grad, is_first))
    return [grad for grad in grads if grad.local.numel() > 0]


def _is_first_replica(grad: DTensor) -> bool:
    mesh = grad.device_mesh
    if mesh.size() != dist.get_world_size():
        raise ValueError(
            f"a gradient is spread over {mesh.size()} of {dist.get_world_size()} ranks; "
            f"parameters must span all ranks (see torch_moe_ep.dense_mesh)."
        )
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    if any(placement.is_partial() for placement in grad.placements):
        raise ValueError("a gradient is not reduced yet (Partial placement); redistribute it.")
    return all(
        place == 0
        for place, placement in zip(coordinate, grad.placements, strict=True)
        if isinstance(placement, Replicate)
    )


def _fsdp1_counted(wrappers: list[FullyShardedDataParallel], is_first: bool) -> dict[int, bool]:
    """For each FSDP1 parameter (by id) whether this rank counts its local elements."""
    counted: dict[int, bool] = {}
    for wrapper in wrappers:
        handle = wrapper._handle
        if handle is None:
            continue
        if not handle.uses_sharded_strategy:
            is_counted = is_first
        else:
            replicas = getattr(wrapper, "_inter_node_pg", None)
            is_counted = replicas is None or replicas.rank() == 0
        flat = handle.flat_param
        params = flat._params if handle._use_orig_params else [flat]
        counted.update((id(param), is_counted) for param in params or [])
    return counted


def _device(states: list[ExpertParallelState], grads: list[_Gradient]) -> torch.device:
    """Where numbers of all ranks can meet: the same kind of device on every rank."""
    if states:
        return states[0].device
    return grads[0].local.device if grads else torch.device("cpu")


def _counted_part(grads: list[_Gradient], norm_type: float, device: torch.device) -> torch.Tensor:
    """What this rank adds to the norm, fp64 ``[1]``: a sum of p-th powers, or the largest element.

    Gradients that it does not count enter times zero. Local.
    """
    is_inf = math.isinf(norm_type)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for is_counted in (True, False):
        local_grads = [grad.local for grad in grads if grad.is_counted == is_counted]
        for same_kind in _by_device_and_dtype(local_grads):
            dtype = torch.promote_types(same_kind[0].dtype, torch.float32)
            norms = torch._foreach_norm(same_kind, norm_type, dtype=dtype)
            stacked = torch.stack(norms).to(device, torch.float64)
            if is_inf:
                total = torch.maximum(total, stacked.max())
            else:
                total = total + (stacked**norm_type).sum() * float(is_counted)
    return total.reshape(1)


def _norm_of_parts(parts: torch.Tensor, norm_type: float) -> torch.Tensor:
    """The norm fp32 ``[]`` of all ranks' parts fp64 ``[W]``."""
    norm = parts.max() if math.isinf(norm_type) else parts.sum() ** (1.0 / norm_type)
    return norm.to(torch.float32)


def _by_device_and_dtype(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())
