"""The layer with tokens in chunks (num_chunks > 1): they travel under each other's GEMMs."""

from typing import TYPE_CHECKING

import torch

from torch_moe_ep import ops

if TYPE_CHECKING:
    from torch_moe_ep.layer import ExpertParallelExperts


def run_in_chunks(
    experts: "ExpertParallelExperts",
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The layer's forward in `num_chunks` chunks; arguments as the layer's.

    Collective over the EP group, one host sync on CUDA (see `ops.plan_chunks`).
    """
    config = experts.moe_config
    x = hidden_states.reshape(-1, hidden_states.size(-1))
    if torch.is_autocast_enabled(x.device.type):  # rows travel in the dtype of the experts
        x = x.to(torch.get_autocast_dtype(x.device.type))
    weights = top_k_weights.float()
    plan, packed = ops.plan_chunks(
        x,
        weights,
        top_k_index,
        experts.num_global_experts,
        config.num_chunks,
        group_name=experts.ep_group_name,
        max_rows=config.max_received_rows,
        invalid_flag=experts.invalid_flag,
    )
    output = ops.chunked_experts(
        x,
        weights,
        plan,
        experts._local_weight("gate_up_proj", x.dtype).to(x.dtype),
        experts._local_weight("down_proj", x.dtype).to(x.dtype),
        packed=packed,
        weight_grad_scale=experts.weight_grad_scale,
        slots_per_pass=config.max_slots,
        recompute_gate_up=config.recompute == "gate_up",
        tokens_per_expert=experts.tokens_per_expert,
    )
    return output.to(hidden_states.dtype).view(hidden_states.shape)
