"""The experts' own FSDP2, applied before the user's FSDP, and its late mixed-precision policy.

An experts module is sharded by FSDP2 over ``shard`` (and replicated over ``replicate``) whatever
the user does with the dense parameters. FSDP2 averages gradients over R * S ranks; together with
the operator's own factor that is the mean over W, at every S and R, 1 included. No divide factor
is set: torch applies one twice on a one-rank shard group.
"""

import weakref
from typing import ClassVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from torch_moe_ep.layer import ExpertParallelExperts
from torch_moe_ep.parallel.adapters import as_children
from torch_moe_ep.parallel.state import ExpertParallelState, fsdp_state, is_fsdp2
from torch_moe_ep.parallel.swap import shard_dim


class InheritedMixedPrecision(MixedPrecisionPolicy):
    """A policy that asks the FSDP around the experts, when FSDP2 first needs to know.

    FSDP2 reads the dtypes at the first forward, when the user's FSDP is in place. The answers
    come from the nearest FSDP2 module above the experts, else from the innermost FSDP1 wrapper
    around them; without either, nothing is cast. Inputs and outputs are left as they are, as for
    any module inside an FSDP module: casting inputs would round the router's fp32 weights.

    Which experts it belongs to is an attribute of the class (see `inherit`): newer torch copies
    a policy with `dataclasses.replace`, which keeps the class and passes on the fields alone.
    """

    experts_ref: ClassVar["weakref.ref[nn.Module]"]

    def __init__(self, **_fields: object) -> None:
        object.__setattr__(self, "output_dtype", None)
        object.__setattr__(self, "cast_forward_inputs", False)

    @classmethod
    def inherit(cls, experts: nn.Module) -> "InheritedMixedPrecision":
        """The policy of one experts module."""
        own = type(cls.__name__, (cls,), {"experts_ref": weakref.ref(experts)})
        policy: InheritedMixedPrecision = own()
        return policy

    def __repr__(self) -> str:
        """Say what kind of policy it is; the dtypes may not be known yet."""
        return "InheritedMixedPrecision()"

    def __eq__(self, other: object) -> bool:
        """Whether both belong to the same experts module."""
        return type(self) is type(other)

    def __hash__(self) -> int:
        """Hash by experts module."""
        return hash(type(self))

    @property
    def param_dtype(self) -> torch.dtype | None:
        """Dtype of the gathered weights and so of the expert computation."""
        return self._dtypes()[0]

    @property
    def reduce_dtype(self) -> torch.dtype | None:
        """Dtype of the gradient reduction."""
        return self._dtypes()[1]

    def _dtypes(self) -> tuple[torch.dtype | None, torch.dtype | None]:
        experts = type(self).experts_ref()
        if experts is None or not is_fsdp2(experts):
            return None, None
        return inherited_dtypes(experts)


def shard_experts(
    experts: ExpertParallelExperts,
    mesh: DeviceMesh,
    *,
    mp_policy: object,
    offload_policy: object,
    reshard_after_forward: bool,
) -> None:
    """Apply `fully_shard` to one swapped experts module.

    Also at S = 1, where gathering costs one transient copy of the weights: one code path. Each
    weight is sharded along dimension 1, else 2, else 0 (see `shard_dim`). Local; slices copies.
    """
    replicas = mesh["replicate"].size()
    data_mesh = mesh["shard"] if replicas == 1 else mesh["replicate", "shard"]
    shard_size = mesh["shard"].size()

    def placement(param: nn.Parameter) -> Shard:
        assert isinstance(param, DTensor)
        return Shard(shard_dim(param.to_local().shape, shard_size))

    if mp_policy == "inherit":
        mp_policy = InheritedMixedPrecision.inherit(experts)
    with as_children(experts):
        fully_shard(
            experts,
            mesh=data_mesh,
            reshard_after_forward=reshard_after_forward,
            shard_placement_fn=placement,
            mp_policy=mp_policy if isinstance(mp_policy, MixedPrecisionPolicy) else
            MixedPrecisionPolicy(),
            offload_policy=offload_policy if isinstance(offload_policy, OffloadPolicy) else
            OffloadPolicy(),
        )  # fmt: skip


def inherited_dtypes(experts: nn.Module) -> tuple[torch.dtype | None, torch.dtype | None]:
    """(param dtype, reduce dtype) of the FSDP around an experts module. Not collective."""
    for ancestor in reversed(_fsdp2_ancestors(experts)):
        policy = fsdp_state(ancestor)._mp_policy
        return policy.param_dtype, policy.reduce_dtype
    state: ExpertParallelState = experts.__dict__["expert_parallel_state"]
    around = [
        wrapper
        for wrapper in state.fsdp1_modules()
        if any(module is experts for module in wrapper.modules())
    ]
    if not around:
        return None, None
    innermost: FullyShardedDataParallel = min(around, key=lambda w: len(list(w.modules())))
    mixed = innermost.mixed_precision
    return mixed.param_dtype, mixed.reduce_dtype or mixed.param_dtype  # FSDP1's own fallback


def _fsdp2_ancestors(experts: nn.Module) -> list[nn.Module]:
    """FSDP2 modules above the experts, outermost first, under the FSDP2 root of this forward."""
    state: ExpertParallelState = experts.__dict__["expert_parallel_state"]
    all_states = fsdp_state(experts)._state_ctx.all_states
    root = all_states[0]._modules[0] if all_states else experts
    if root is state.root or root is experts:
        root = state.model
    modules = dict(root.named_modules())
    name = next((name for name, module in modules.items() if module is experts), None)
    if name is None:
        return []
    parts = name.split(".") if name else []
    path = [modules[".".join(parts[:depth])] for depth in range(len(parts))]
    return [module for module in path if is_fsdp2(module)]
