"""fp32 master weights of experts that a host upcasts behind their back.

accelerate (and Trainer on it) upcasts trainable parameters before mixed-precision FSDP. Under
FSDP2 it sets ``param.data``, which changes what a DTensor says its dtype is and leaves what it
holds; under FSDP1 it walks FSDP1's wrappers and misses the experts. Both are put right at the
first forward, in place: the optimizer keeps its parameters.
"""

import sys
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from torch_moe_ep.layer import ExpertParallelExperts
from torch_moe_ep.parallel.state import ExpertParallelState, fsdp_param_groups
from torch_moe_ep.parallel.swap import shard_like


def settle_masters(state: ExpertParallelState) -> None:
    """Make every expert parameter hold the dtype that it says, or that its dense peers have.

    Args:
        state: of a model at its first forward.

    Local; copies what has to be cast.
    """
    is_left_behind = bool(state.fsdp1_modules()) and _accelerate_upcasts()
    for experts in state.experts.values():
        held = [param for param in experts.held_parameters() if isinstance(param, DTensor)]
        was_cast = False
        for param in held:
            dtype = param.dtype
            if is_left_behind and param.requires_grad and dtype in (torch.bfloat16, torch.float16):
                dtype = torch.float32
            if param.to_local().dtype != dtype:
                _cast(param, dtype)
                was_cast = True
        if was_cast:
            _tell_fsdp(experts)


def _accelerate_upcasts() -> bool:
    """Whether accelerate runs FSDP with mixed precision in this process."""
    module: Any = sys.modules.get("accelerate.state")
    if module is None:
        return False
    shared: dict[str, Any] = module.AcceleratorState._shared_state
    if shared.get("distributed_type") != module.DistributedType.FSDP:
        return False
    return str(shared.get("_mixed_precision", "no")) != "no"


@torch.no_grad()
def _cast(param: DTensor, dtype: torch.dtype) -> None:
    whole = shard_like(param, param._local_tensor.to(dtype))
    param.data = whole  # its outer dtype
    param._local_tensor = whole._local_tensor
    param._spec = whole._spec


def _tell_fsdp(experts: ExpertParallelExperts) -> None:
    """FSDP2 keeps views of the shards; where it has them already, it reads them again."""
    for group in fsdp_param_groups(experts):
        for param in group.fsdp_params:
            param.reset_sharded_param()
        group._init_mp_dtypes()
