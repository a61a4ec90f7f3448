"""LoRA factors of local experts: sharded like the experts, added to the weights they belong to.

PEFT's wrapper objects and their names stay. Each factor becomes a DTensor ``[E, ...]`` that holds
this rank's experts, and enters the FSDP2 group of its experts module: gathered with the weights,
freed with them, its gradient reduced with theirs. The wrapper passes its input on; the experts
ask it for the weight with the low-rank product added (`add_to`), as PEFT itself computes it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torch_moe_ep.integrations import peft
from torch_moe_ep.layer import ExpertParallelExperts
from torch_moe_ep.parallel.state import ExpertParallelState
from torch_moe_ep.parallel.swap import shard_weight

_classes: dict[type[nn.Module], type[nn.Module]] = {}


class ExpertParallelAdapter(nn.Module):
    """Mixin for PEFT's ParamWrapper; `swap_adapters` makes the subclass."""

    base_layer: nn.Module
    lora_A: Any  # noqa: N815  PEFT's names
    lora_B: Any  # noqa: N815
    scaling: Any

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the experts return: they add the factors themselves (see `add_to`)."""
        self._check_forward_args(x, *args, **kwargs)  # type: ignore[operator]
        kwargs.pop("adapter_names", None)
        return self.base_layer(x, *args, **kwargs)

    def add_to(self, weight: torch.Tensor) -> torch.Tensor:
        """This rank's experts' weight ``[L, out, in]`` plus ``scaling * B A`` of active adapters.

        In the weight's dtype, also under autocast. Local; no host sync.
        """
        if self.disable_adapters:
            return weight
        for key in self.active_adapters:  # type: ignore[union-attr]
            if key not in self.lora_A:
                continue
            a = _local(self.lora_A[key].weight, weight.dtype)
            b = _local(self.lora_B[key].weight, weight.dtype)
            with torch.autocast(weight.device.type, enabled=False):
                weight = torch.baddbmm(weight, b, a, alpha=self.scaling[key])
        return weight

    def _refuse(self, *_args: Any, **_kwargs: Any) -> Any:
        raise ValueError(
            "adapters of expert-parallel experts cannot be added, merged or removed: add them "
            "before apply_expert_parallel; to merge, save them with save_pretrained and load them "
            "into the unpatched model."
        )

    merge = unmerge = update_layer = unload_and_optionally_merge_module = _refuse


def swap_adapters(
    experts: ExpertParallelExperts,
    wrappers: list[nn.Module],
    state: ExpertParallelState,
    sync_from_rank0: bool,
) -> None:
    """Shard the LoRA factors around one swapped experts module, and tell the module of them.

    Args:
        experts: the module.
        wrappers: PEFT's ParamWrappers around it.
        state: the model's state.
        sync_from_rank0: take global rank 0's factors.

    Collective over all ranks with `sync_from_rank0`, else local.
    """
    for wrapper in wrappers:
        for layer in peft.adapter_layers(wrapper):
            weight = layer.weight
            factor = peft.to_expert_major(
                weight.detach(), experts.num_global_experts, peft.is_factor_b(wrapper, layer)
            )
            whole = nn.Parameter(factor, requires_grad=weight.requires_grad)
            layer._parameters["weight"] = shard_weight(whole, state, sync_from_rank0)
            layer.register_load_state_dict_pre_hook(_LoadHook(wrapper, experts.num_global_experts))
            experts.adapter_layers.append(layer)
        wrapper.__class__ = _adapter_class(type(wrapper))
        name = str(wrapper.parameter_name)
        experts.adapters.setdefault(name, []).append(wrapper)


@contextlib.contextmanager
def as_children(experts: ExpertParallelExperts) -> Iterator[None]:
    """Let `fully_shard` find the factors inside the experts module, for the length of its call."""
    names = [f"adapter_{index}" for index in range(len(experts.adapter_layers))]
    experts._modules.update(zip(names, experts.adapter_layers, strict=True))
    try:
        yield
    finally:
        for name in names:
            del experts._modules[name]


class _LoadHook:
    """Accepts a factor in PEFT's layout where a state dict is loaded."""

    def __init__(self, wrapper: nn.Module, num_experts: int) -> None:
        self._wrapper = wrapper
        self._num_experts = num_experts

    def __call__(
        self, layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_unused: object
    ) -> None:
        value = state_dict.get(prefix + "weight")
        if isinstance(value, torch.Tensor) and value.dim() == 2:
            is_b = peft.is_factor_b(self._wrapper, layer)
            state_dict[prefix + "weight"] = peft.to_expert_major(value, self._num_experts, is_b)


def _adapter_class(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _classes:
        fields = {"__doc__": base.__doc__, "__module__": base.__module__}
        _classes[base] = type(
            f"ExpertParallel{base.__name__}", (ExpertParallelAdapter, base), fields
        )
    return _classes[base]


def _local(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    local = factor.to_local() if isinstance(factor, DTensor) else factor
    return local.to(dtype)
