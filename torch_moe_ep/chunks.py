"""The layer as one operation: tokens in chunks travel under each other's GEMMs.

Over peers tokens in one piece take it too (num_chunks = 1): the experts read rows where they came
and write results where the others read them, and gradients go back under the weights' GEMMs.
"""

from typing import TYPE_CHECKING

import torch

from torch_moe_ep import ops
from torch_moe_ep.budget import capacity_of

if TYPE_CHECKING:
    from torch_moe_ep.layer import ExpertParallelExperts


def run_in_chunks(
    experts: "ExpertParallelExperts",
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The layer's forward in `num_chunks` chunks; arguments as the layer's.

    Returns the sums ``[T, H]`` in the dtype that travelled; the layer casts and shapes them.

    Collective over the EP group, one host sync on CUDA (see `ops.plan_chunks`). Over peers
    budget="exact" waits for a counter in the host's memory, "bounded" for nothing after the first
    training forward (see `budget`).
    """
    config = experts.moe_config
    x = experts.tokens_of(hidden_states)
    weights = top_k_weights.float()
    # Before the plan, whose counts the host waits for: the GPU idles from then until rows leave.
    gate_up = experts.local_weight("gate_up_proj", x.dtype).to(x.dtype)
    down = experts.local_weight("down_proj", x.dtype).to(x.dtype)
    plan, packed = plan_of_chunks(experts, x, weights, top_k_index)
    return ops.chunked_experts(
        x,
        weights,
        plan,
        gate_up,
        down,
        packed=packed,
        weight_grad_scale=experts.weight_grad_scale,
        slots_per_pass=config.max_slots,
        recompute_gate_up=config.recompute == "gate_up",
        tokens_per_expert=experts.tokens_per_expert,
    )


def plan_of_chunks(
    experts: "ExpertParallelExperts",
    x: torch.Tensor,
    weights: torch.Tensor,
    top_k_index: torch.Tensor,
) -> tuple[ops.ChunkPlan, ops.SendBuffer | None]:
    """The plan, and what is packed already; peers need no send buffer. Collective."""
    config = experts.moe_config
    if not experts.uses_peers:
        return ops.plan_chunks(
            x,
            weights,
            top_k_index,
            experts.num_global_experts,
            config.num_chunks,
            group_name=experts.ep_group_name,
            max_rows=config.max_received_rows,
            invalid_flag=experts.invalid_flag,
        )
    plan = ops.peer_plan_chunks(
        top_k_index,
        experts.num_global_experts,
        config.num_chunks,
        group_name=experts.ep_group_name,
        capacity=capacity_of(experts, *top_k_index.shape),
        max_rows=config.max_received_rows,
        num_sms=config.peer_sms,
        invalid_flag=experts.invalid_flag,
        slots_needed=experts.slots_needed,
    )
    return plan, None
