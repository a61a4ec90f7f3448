"""Handlers that make torch's own clipping and gradient scaler take two kinds of gradients.

`torch.nn.utils.clip_grad_norm_` and `clip_grad_value_`, `FSDP.clip_grad_norm_` and GradScaler put
all gradients of a model in one list. Experts live on another mesh than the dense parameters (or
the dense ones are plain tensors), which DTensor refuses, always with an error. Handlers in
DTensor's dispatcher answer exactly those mixed calls; calls on one mesh go on to torch's own code.
The handler table is private to torch: where it is missing nothing is registered, stock clipping
fails as loudly as without this file, and `torch_moe_ep.clip_grad_norm_` works all the same.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from torch_moe_ep.parallel.state import has_sharded_fsdp1

aten = torch.ops.aten
Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def register_stock_clip_handlers() -> bool:
    """Register the handlers, once per process; returns whether torch has the table."""
    table = getattr(getattr(DTensor, "_op_dispatcher", None), "_custom_op_handlers", None)
    if not isinstance(table, dict):
        return False
    handlers: dict[Any, Handler] = {
        aten.stack.default: _stack_norms,
        aten._foreach_norm.Scalar: _foreach_norm,
        aten._foreach_mul_.Tensor: _foreach_mul_,
        aten._foreach_clamp_min_.Scalar: _foreach_clamp_,
        aten._foreach_clamp_max_.Scalar: _foreach_clamp_,
        aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale_,
    }
    for operator, handler in handlers.items():
        previous = table.get(operator)
        if getattr(previous, "is_torch_moe_ep", False):
            continue
        table[operator] = _MixedHandler(table, operator, handler, previous)
    return True


class _MixedHandler:
    """A handler that answers mixed calls and leaves the others to torch."""

    is_torch_moe_ep = True

    def __init__(
        self, table: dict[Any, Any], operator: Any, handler: Handler, previous: Any
    ) -> None:
        self._table = table
        self._operator = operator
        self._handler = handler
        self._previous = previous

    def __call__(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        answer = self._handler(operator, args, kwargs)
        if answer is not NotImplemented:
            return answer
        if self._previous is not None:
            return self._previous(operator, args, kwargs)
        self._table.pop(self._operator, None)
        try:
            return operator(*args, **kwargs)
        finally:
            self._table[self._operator] = self


def _is_mixed(tensors: list[torch.Tensor]) -> bool:
    """Whether a list holds plain tensors beside DTensors, or DTensors of several meshes."""
    meshes = [tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)]
    return len(meshes) < len(tensors) or any(mesh != meshes[0] for mesh in meshes[1:])


def _stack_norms(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Stack scalar norms of several meshes into one plain vector of full norms.

    FSDP1 clips its own shards and stacks only norms on the experts' mesh, then adds the result
    to plain numbers: scalars on a mesh with an "ep" dimension become plain as well. Collective:
    one reduction per mesh dimension and mesh.
    """
    tensors = list(args[0])
    if any(tensor.dim() != 0 for tensor in tensors):
        return NotImplemented
    is_on_ep = any(
        "ep" in (tensor.device_mesh.mesh_dim_names or ())
        for tensor in tensors
        if isinstance(tensor, DTensor)
    )
    if not is_on_ep:
        return NotImplemented
    if any(not isinstance(tensor, DTensor) for tensor in tensors):
        _refuse_flat_shards()
    return torch.stack(_full_scalars(tensors), *args[1:], **kwargs)


def _full_scalars(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The full value of each scalar, in order, with one reduction per mesh and placement."""
    full = list(tensors)
    groups: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            groups.setdefault((tensor.device_mesh, tensor.placements), []).append(place)
    for (mesh, placements), places in groups.items():
        locals_ = [tensors[place].to_local() for place in places]  # type: ignore[attr-defined]
        joined = DTensor.from_local(torch.stack(locals_), mesh, placements, run_check=False)
        for place, value in zip(places, _reduced(joined).unbind(), strict=True):
            full[place] = value
    return full


def _reduced(joined: DTensor) -> torch.Tensor:
    """The full value of partial norms, one mesh dimension after the other, innermost first."""
    placements = list(joined.placements)
    for dim in reversed(range(joined.device_mesh.ndim)):
        placements[dim] = Replicate()
        joined = joined.redistribute(placements=placements)
    return joined.to_local()


def _foreach_norm(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Norms of plain tensors beside DTensors: each kind on its own."""
    tensors = list(args[0])
    plain = [place for place, tensor in enumerate(tensors) if not isinstance(tensor, DTensor)]
    if not plain:
        return NotImplemented
    _refuse_flat_shards()
    norms: list[torch.Tensor] = [*tensors]
    sharded = [place for place in range(len(tensors)) if place not in set(plain)]
    for places in (plain, sharded):
        kind = [tensors[place] for place in places]
        for place, norm in zip(places, operator(kind, *args[1:], **kwargs), strict=True):
            norms[place] = norm
    return norms


def _refuse_flat_shards() -> None:
    if has_sharded_fsdp1():
        raise ValueError(
            "torch.nn.utils.clip_grad_norm_ would take FSDP1's flat shards for whole gradients; "
            "use model.clip_grad_norm_ of FSDP1 or torch_moe_ep.clip_grad_norm_."
        )


def _foreach_mul_(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Scale gradients of any kinds by one plain number, in place, on their local elements."""
    tensors, factor = args
    if isinstance(factor, DTensor) or factor.dim() != 0 or not _is_mixed(list(tensors)):
        return NotImplemented
    operator([_local(tensor) for tensor in tensors], factor, **kwargs)
    return None


def _foreach_clamp_(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Bound every element of gradients of any kinds, in place, on their local elements."""
    tensors, bound = args
    if not _is_mixed(list(tensors)):
        return NotImplemented
    operator([_local(tensor) for tensor in tensors], bound, **kwargs)
    return None


def _unscale_(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """GradScaler's unscale over mixed gradients; every rank learns of any rank's infinity.

    Collective over all ranks.
    """
    tensors, found_inf, inv_scale = args
    if not _is_mixed(list(tensors)):
        return NotImplemented
    found = _local(found_inf)
    operator([_local(tensor) for tensor in tensors], found, _local(inv_scale), **kwargs)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return None


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
