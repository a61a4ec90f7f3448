"""Initial expert weights that do not depend on how many ranks hold them."""

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

from torch_moe_ep.integrations.transformers import initializer_range
from torch_moe_ep.parallel.state import ExpertParallelState, fsdp_param_groups, iter_experts
from torch_moe_ep.parallel.swap import WEIGHT_NAMES, shard_slice
from torch_moe_ep.seed import seed_of


@torch.no_grad()
def initialize_experts(model: nn.Module, *, seed: int = 0, std: float | None = None) -> None:
    """Draw the expert weights of a patched model anew, also of one on the meta device.

    Each expert's weight is drawn whole on the CPU from its own generator, seeded by (seed, layer
    name, expert, parameter), and every rank keeps its slice: the values are the same at every P,
    S and W. Experts on meta are materialised on the mesh's device; other parameters are not
    touched, so call `model.to_empty` first when the rest is on meta as well.

    Args:
        model: a patched model, with or without FSDP around it.
        seed: first part of every generator's seed.
        std: standard deviation; None takes ``initializer_range`` of the model's config.

    Not collective. Each rank draws the experts of its EP rank only.
    """
    for experts in iter_experts(model):
        state: ExpertParallelState = experts.__dict__["expert_parallel_state"]
        if any(param.is_meta for param in experts.parameters(recurse=False)):
            experts.to_empty(device=_home(experts, state), recurse=False)
        if isinstance(experts, FSDPModule):
            experts.reshard()
        layer = next(name for name, module in state.experts.items() if module is experts)
        scale = initializer_range(state.model) if std is None else std
        for name in WEIGHT_NAMES:
            param = experts._parameters[name]
            assert isinstance(param, DTensor)
            _draw(param, state, (seed, layer, name), scale)


def _home(experts: nn.Module, state: ExpertParallelState) -> torch.device:
    """Where this rank's shards live: the CPU under FSDP2's CPU offload, else the mesh's device."""
    policies = [group.offload_policy for group in fsdp_param_groups(experts)]
    is_offloaded = any(isinstance(policy, CPUOffloadPolicy) for policy in policies)
    return torch.device("cpu") if is_offloaded else state.device


def _draw(
    param: DTensor, state: ExpertParallelState, key: tuple[int, str, str], std: float
) -> None:
    """Fill this rank's part of one weight ``[E, a, b]``."""
    num_experts, *shape = param.shape
    num_local = num_experts // state.mesh["ep"].size()
    first = state.mesh.get_local_rank("ep") * num_local
    drawn = torch.stack([draw_expert(key, first + i, shape, std) for i in range(num_local)])
    param.to_local().copy_(shard_slice(drawn, state))


def draw_expert(
    key: tuple[int, str, str], expert: int, shape: list[int], std: float
) -> torch.Tensor:
    """One expert's part of a weight, whole, on the CPU; `key` is (seed, layer, parameter)."""
    seed, layer, name = key
    generator = torch.Generator().manual_seed(seed_of(f"{seed}/{layer}/{expert}/{name}"))
    return torch.normal(0.0, std, tuple(shape), generator=generator)
