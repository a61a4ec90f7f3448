"""State-dict hooks of the experts.

DTensors in state dicts are what `get_state_dict` and torch.distributed.checkpoint want, so they
stay, with one exception on the way out: FSDP1's own FULL_STATE_DICT promises plain full tensors.
On the way in, a plain full tensor ``[E, ...]`` is accepted everywhere (any P, S, W): each rank
keeps its slice.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, StateDictType
from torch.distributed.tensor import DTensor

from torch_moe_ep.parallel.state import ExpertParallelState
from torch_moe_ep.parallel.swap import local_slice, shard_like


def register_state_dict_hooks(experts: nn.Module) -> None:
    """Register the save and load hooks on one experts module, or on a LoRA factor of it."""
    experts.register_state_dict_post_hook(_gather_for_fsdp1)
    experts.register_load_state_dict_pre_hook(_slice_plain)


def _gather_for_fsdp1(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: object
) -> None:
    """Replace DTensor shards by full tensors under FSDP1's FULL_STATE_DICT; collective there."""
    wrapper = _full_state_wrapper(module)
    if wrapper is None:
        return
    config = wrapper._state_dict_config
    is_wanted = not getattr(config, "rank0_only", False) or wrapper.rank == 0
    for name in list(module._parameters):
        key = prefix + name
        value = state_dict.get(key)
        if not isinstance(value, DTensor):
            continue
        with torch.no_grad():
            full = value.full_tensor()
        if not is_wanted:
            del state_dict[key]
        else:
            state_dict[key] = full.cpu() if config.offload_to_cpu else full


def _full_state_wrapper(module: nn.Module) -> FullyShardedDataParallel | None:
    """An FSDP1 instance around the experts that is set to FULL_STATE_DICT."""
    state: ExpertParallelState = module.__dict__["expert_parallel_state"]
    for wrapper in state.wrappers():
        if not isinstance(wrapper, FullyShardedDataParallel):
            continue
        if wrapper._state_dict_type != StateDictType.FULL_STATE_DICT:
            continue
        if any(child is module for child in wrapper.modules()):
            return wrapper
    return None


def _slice_plain(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_unused: object
) -> None:
    """Replace full plain tensors by this rank's slice, as a DTensor like the parameter. Local."""
    if isinstance(module, FSDPModule):
        module.reshard()
    state: ExpertParallelState = module.__dict__["expert_parallel_state"]
    for name in list(module._parameters):
        value, param = state_dict.get(prefix + name), module._parameters[name]
        if not isinstance(value, torch.Tensor) or not isinstance(param, DTensor):
            continue
        if isinstance(value, DTensor) or value.shape != param.shape:
            continue
        local = param.to_local()
        part = local_slice(value, state).to(local.device).contiguous()
        state_dict[prefix + name] = shard_like(param, part)
