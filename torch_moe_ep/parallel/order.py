"""Tells the order guard when a model's forward begins and ends, and of which kind it is."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

_is_wanted = True
_native: Any = None


def start(store: dist.Store, rank: int, world_size: int) -> None:
    """Start the guard for the default group's ranks, unless it is not wanted. Local."""
    global _native
    from torch_moe_ep.hooks.library import native

    _native = native
    if _is_wanted:
        native.start_order_guard(store, rank, world_size)


def start_for_default_group() -> None:
    """Start it for a default group that exists. Local."""
    store = dist.distributed_c10d._get_default_store()
    start(store, dist.get_rank(), dist.get_world_size())


def is_watching() -> bool:
    """Whether hooks have been put around this process's default group."""
    return _native is not None


def stop() -> None:
    """Stop the guard. Local."""
    if _native is not None:
        _native.stop_order_guard()


def set_wanted(is_wanted: bool) -> None:
    """Have the guard or not; a change starts or stops it where the default group has hooks."""
    global _is_wanted
    _is_wanted = is_wanted
    if not is_wanted:
        stop()
    elif _native is not None and dist.is_initialized() and _native.has_hooks(dist.group.WORLD):
        start_for_default_group()


@contextlib.contextmanager
def forward_of(model: nn.Module, wrappers: list[nn.Module], experts: nn.Module) -> Iterator[None]:
    """Around a patched model's forward, while `is_watching`.

    Args:
        model: the model.
        wrappers: FSDP1 and DDP modules around it or in it.
        experts: one of its experts modules.

    Raises:
        RuntimeError: the first step of this kind that just ended had another order on another rank.

    Collective through the store when a first step of its kind has ended, else local.
    """
    _native.read_times()
    is_inside_backward = torch._C._current_graph_task_id() != -1
    _native.begin_forward(_kind(model, wrappers, experts, is_inside_backward), is_inside_backward)
    try:
        yield
    finally:
        _native.end_forward()


def _kind(
    model: nn.Module, wrappers: list[nn.Module], experts: nn.Module, is_inside_backward: bool
) -> str:
    if is_inside_backward:
        return "recomputation"
    if not torch.is_grad_enabled() or not model.training:
        return "evaluation"
    return "training" if _is_synchronised(wrappers, experts) else "no_sync"


def _is_synchronised(wrappers: list[nn.Module], experts: nn.Module) -> bool:
    from torch_moe_ep.parallel.state import fsdp_param_groups

    for wrapper in wrappers:
        if isinstance(wrapper, FullyShardedDataParallel) and not wrapper._sync_gradients:
            return False
        if isinstance(wrapper, DistributedDataParallel) and not wrapper.require_backward_grad_sync:
            return False
    return all(group.reduce_grads for group in fsdp_param_groups(experts))
