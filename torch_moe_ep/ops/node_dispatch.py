"""Dispatch over several nodes: a token crosses to each node once, then fans out there."""

from typing import NamedTuple

import torch

from torch_moe_ep.ops.one_device import check_one_device
from torch_moe_ep.ops.plan import _group_size, flag_on, row_alignment_on

_NodePlanTensors = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]


class NodePlan(NamedTuple):
    """Where each copy goes in two hops; tensors and numbers only.

    The P ranks of the group are M nodes of G ranks; rank r is place ``r % G`` of node ``r // G``.
    Hop 1 takes one row of a token to each node that has one of its experts, to the rank of the
    sender's place; A rows arrive at a rank. Hop 2 takes from there a row for each copy.

    Attributes:
        row_of_copy: int64 ``[N]``, row of the copy's token in the send buffer of hop 1, for the
            first copy of each (token, node); -1 for the others.
        slot_of_forwarded: int64 ``[A * K]``, row of each copy of the rows that arrived in the send
            buffer of hop 2; -1 for copies of other nodes.
        slot_of_received: int64, the slot of each row that hop 2 brought.
        expert_offsets: int64 ``[L + 1]``, first slot of each local expert.
        counts: int64 ``[P, E]``, copies that each rank sends to each expert.
        host_counts: int64 ``[P, E + M]`` on the CPU: the same, and the tokens that each rank sends
            to each node.
        top_k: K.
        row_alignment: each expert's segment is padded to a multiple of this many rows.
        ranks_per_node: G.
        group_name: the EP process group.

    Example: 2 nodes of 2 ranks, one expert a rank, rank 0 has one token with the ids [3, 1, 2]:
    row_of_copy is [1, 0, -1]. Rank 0 gets its own row 0 and forwards it to rank 1; rank 2 gets row
    1, keeps a copy for expert 2 and forwards one to rank 3.
    """

    row_of_copy: torch.Tensor
    slot_of_forwarded: torch.Tensor
    slot_of_received: torch.Tensor
    expert_offsets: torch.Tensor
    counts: torch.Tensor
    host_counts: torch.Tensor
    top_k: int
    row_alignment: int
    ranks_per_node: int
    group_name: str

    def host_offsets(self) -> torch.Tensor:
        """`expert_offsets` on the CPU. No sync."""
        if self.expert_offsets.device.type == "cpu":
            return self.expert_offsets
        num_experts = self.counts.size(1)
        offsets: torch.Tensor = torch.ops.torch_moe_ep.plan_host_offsets(
            self.host_counts[:, :num_experts].contiguous(), self.row_alignment, self.group_name
        )
        return offsets


def node_plan(
    expert_ids: torch.Tensor,
    num_experts: int,
    *,
    group_name: str,
    ranks_per_node: int,
    row_alignment: int | None = None,
    max_rows: int = 0,
    invalid_flag: torch.Tensor | None = None,
    bytes_sent: torch.Tensor | None = None,
) -> NodePlan:
    """Compute where each copy goes in two hops; the slots are those of `plan`.

    Args:
        expert_ids: int64 ``[T, K]``, ids in [0, E), any strides.
        num_experts: E; a multiple of the group's P ranks, at most 512 on CUDA.
        group_name: name of the EP process group (``group.group_name``).
        ranks_per_node: G, which divides P; ranks of one node are consecutive.
        row_alignment: as in `plan`.
        max_rows: as in `plan`.
        invalid_flag: as in `plan`.
        bytes_sent: int64 ``[2]`` on the CPU; entry 1 grows by the bytes of expert ids that leave
            this rank's node.

    Returns:
        The plan for `node_dispatch`, `expert_mlp` and `node_combine`.

    Raises:
        ValueError: as `plan`, and a `ranks_per_node` that does not divide P.
        RuntimeError: a collective failed; the message names the ranks that did not take part.

    Collective over the group (one all-gather of E + M numbers, then 4 K bytes of expert ids with
    each row of hop 1), one host sync on CUDA. Deterministic; not differentiable.
    """
    row_alignment = row_alignment_on(expert_ids.device, row_alignment)
    invalid_flag = flag_on(expert_ids.device, invalid_flag)
    tensors: _NodePlanTensors = torch.ops.torch_moe_ep.node_plan(
        expert_ids,
        num_experts,
        row_alignment,
        max_rows,
        ranks_per_node,
        group_name,
        invalid_flag,
        bytes_sent,
    )
    return NodePlan(*tensors, expert_ids.size(1), row_alignment, ranks_per_node, group_name)


def node_dispatch(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    plan: NodePlan,
    *,
    bytes_sent: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move each token once to every node of its experts, and there to its experts.

    Args:
        x: hidden states ``[T, H]``, float32, bfloat16 or float16, any strides.
        weights: router weights fp32 ``[T, K]``, any strides, or None.
        plan: the plan of these tokens; K is at most 32 on CUDA.
        bytes_sent: int64 ``[2]`` on the CPU; grows by the bytes that leave this rank's node, here
            and in backward: entry 0 by those of rows, entry 1 by those of router weights.

    Returns:
        rows ``[R, H]`` and row_weights, the bits that `dispatch` returns.

    Raises:
        ValueError: a shape, dtype or device that does not fit the plan.
        RuntimeError: a collective failed; the message names the ranks that did not take part.

    Collective over the plan's group (two all-to-alls of rows, and of weights), in backward as well;
    gloo waits for them on the host, NCCL does not. Deterministic. Differentiable in `x` and
    `weights`; its backward is `node_combine`. Under autocast rows travel in the autocast dtype.
    """
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.torch_moe_ep.node_dispatch(
        x, weights, *plan, bytes_sent
    )
    return result


@torch.library.register_fake("torch_moe_ep::node_plan")
def _node_plan_fake(
    expert_ids: torch.Tensor,
    num_experts: int,
    row_alignment: int,
    max_rows: int,
    ranks_per_node: int,
    group_name: str,
    invalid_flag: torch.Tensor,
    bytes_sent: torch.Tensor | None = None,
) -> _NodePlanTensors:
    num_ranks = _group_size(group_name)
    num_nodes = num_ranks // ranks_per_node
    sizes = torch.library.get_ctx()
    return (
        expert_ids.new_empty(expert_ids.numel()),
        expert_ids.new_empty(sizes.new_dynamic_size()),
        expert_ids.new_empty(sizes.new_dynamic_size()),
        expert_ids.new_empty(num_experts // num_ranks + 1),
        expert_ids.new_empty((num_ranks, num_experts)),
        expert_ids.new_empty((num_ranks, num_experts + num_nodes), device="cpu"),
    )


@torch.library.register_fake("torch_moe_ep::node_dispatch")
def _node_dispatch_fake(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    row_of_copy: torch.Tensor,
    slot_of_forwarded: torch.Tensor,
    slot_of_received: torch.Tensor,
    expert_offsets: torch.Tensor,
    counts: torch.Tensor,
    host_counts: torch.Tensor,
    top_k: int,
    row_alignment: int,
    ranks_per_node: int,
    group_name: str,
    bytes_sent: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_one_device(x=x, weights=weights, row_of_copy=row_of_copy)
    num_slots = torch.library.get_ctx().new_dynamic_size()
    num_weights = 0 if weights is None else num_slots
    return x.new_empty((num_slots, x.size(1))), x.new_empty(num_weights, dtype=torch.float32)
