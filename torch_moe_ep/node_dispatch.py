"""The layer over an EP group that spans nodes (transport="hierarchical")."""

from typing import TYPE_CHECKING

import torch

from torch_moe_ep import ops

if TYPE_CHECKING:
    from torch_moe_ep.layer import ExpertParallelExperts


def run_over_nodes(
    experts: "ExpertParallelExperts",
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The layer's forward with a token crossing to each node once; arguments as the layer's.

    Returns the sums ``[T, H]`` in the dtype that travelled; the layer casts and shapes them.

    Collective over the EP group, one host sync on CUDA (see `ops.node_plan`).
    """
    config, counter = experts.moe_config, experts.bytes_between_nodes
    x = experts.tokens_of(hidden_states)
    plan = ops.node_plan(
        top_k_index,
        experts.num_global_experts,
        group_name=experts.ep_group_name,
        ranks_per_node=experts.ranks_per_node,
        max_rows=config.max_received_rows,
        invalid_flag=experts.invalid_flag,
        bytes_sent=counter,
    )
    rows, row_weights = ops.node_dispatch(x, top_k_weights.float(), plan, bytes_sent=counter)
    y = experts.expert_mlp(rows, row_weights, plan)
    return ops.node_combine(
        y, plan, tokens_per_expert=experts.tokens_per_expert, bytes_sent=counter
    )
