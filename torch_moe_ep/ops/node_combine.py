"""Combine over several nodes: results are summed on each node, then cross once."""

import torch

from torch_moe_ep.ops.node_dispatch import NodePlan
from torch_moe_ep.ops.one_device import check_one_device


def node_combine(
    rows: torch.Tensor,
    plan: NodePlan,
    *,
    tokens_per_expert: torch.Tensor | None = None,
    bytes_sent: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum the K results of each token, first those of one node, then those of its nodes.

    Args:
        rows: results ``[R, H]`` in expert order, float32, bfloat16 or float16, any strides.
        plan: the plan of the dispatch.
        tokens_per_expert: as in `combine`.
        bytes_sent: int64 ``[2]`` on the CPU; entry 0 grows by the bytes of rows that leave this
            rank's node, here and in backward.

    Returns:
        ``[T, H]`` of the rows' dtype. Both sums are added in fp32 and rounded once each: a node's
        sum travels in the rows' dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit the plan.
        RuntimeError: a collective failed; the message names the ranks that did not take part.

    Collective over the plan's group (two all-to-alls of rows), in backward as well; gloo waits for
    them on the host, NCCL does not. Deterministic, no float atomics. Differentiable in `rows`; its
    backward is `node_dispatch`.
    """
    result: torch.Tensor = torch.ops.torch_moe_ep.node_combine(
        rows, None, *plan, tokens_per_expert, bytes_sent
    )[0]
    return result


@torch.library.register_fake("torch_moe_ep::node_combine")
def _node_combine_fake(
    rows: torch.Tensor,
    row_weights: torch.Tensor | None,
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
    tokens_per_expert: torch.Tensor | None = None,
    bytes_sent: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_one_device(rows=rows, row_weights=row_weights, row_of_copy=row_of_copy)
    num_tokens = row_of_copy.numel() // top_k
    weights_shape = (0,) if row_weights is None else (num_tokens, top_k)
    x = rows.new_empty((num_tokens, rows.size(1)))
    return x, rows.new_empty(weights_shape, dtype=torch.float32)
