"""Every stage in plain torch, for one process (P = 1): the readable specification.

Tests compare the operators of `torch_moe_ep.ops` with these; they are slow and sync the host.
Letters and names as there.
"""

import itertools

import torch
from torch.nn import functional

from torch_moe_ep.ops.plan import DispatchPlan


def route(
    logits: torch.Tensor, top_k: int, normalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over all experts, then the top_k; of equal probabilities the smaller id first."""
    probabilities = torch.softmax(logits.float(), dim=-1)
    # topk promises no order among equals; a stable sort does.
    weights, expert_ids = probabilities.sort(dim=-1, descending=True, stable=True)
    weights, expert_ids = weights[:, :top_k], expert_ids[:, :top_k]
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, expert_ids


def sinkhorn(logits: torch.Tensor, num_iterations: int) -> torch.Tensor:
    """The loop, on exp(logits) in fp64, rounded once."""
    cost = torch.exp(logits.double())
    num_tokens, num_experts = cost.shape
    row_scale, column_scale = cost.new_ones(num_tokens), cost.new_ones(num_experts)
    for _ in range(num_iterations):
        row_scale = 1.0 / (num_tokens * (cost * column_scale).sum(dim=1))
        column_scale = 1.0 / (num_experts * (row_scale[:, None] * cost).sum(dim=0))
    return (row_scale[:, None] * cost * column_scale).float()


def plan(expert_ids: torch.Tensor, num_experts: int, *, row_alignment: int = 1) -> DispatchPlan:
    """Copies ordered by expert, then by copy; each expert's segment rounded up."""
    ids = expert_ids.flatten()
    counts = torch.bincount(ids, minlength=num_experts)
    lengths = (counts + row_alignment - 1) // row_alignment * row_alignment
    expert_offsets = functional.pad(lengths.cumsum(0), (1, 0))
    slot_of_copy = torch.empty_like(ids)
    for expert in range(num_experts):
        copies = (ids == expert).nonzero().flatten()
        slot_of_copy[copies] = expert_offsets[expert] + torch.arange(len(copies))
    return DispatchPlan(
        slot_of_copy=slot_of_copy,
        slot_of_received=ids.new_empty(0),
        expert_offsets=expert_offsets,
        counts=counts.unsqueeze(0),
        host_counts=ids.new_empty((0, num_experts)),
        top_k=expert_ids.shape[1],
        row_alignment=row_alignment,
        group_name="",
    )


def dispatch(
    x: torch.Tensor, weights: torch.Tensor | None, plan: DispatchPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows[slot_of_copy[t * K + k]] = x[t]``, zeros between; the weights likewise."""
    num_slots = int(plan.expert_offsets[-1])
    copies = x.repeat_interleave(plan.top_k, dim=0)
    rows = x.new_zeros(num_slots, x.shape[1]).index_put((plan.slot_of_copy,), copies)
    if weights is None:
        return rows, x.new_empty(0, dtype=torch.float32)
    row_weights = weights.new_zeros(num_slots).index_put((plan.slot_of_copy,), weights.flatten())
    return rows, row_weights


def expert_mlp(
    rows: torch.Tensor,
    row_weights: torch.Tensor,
    plan: DispatchPlan,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """SwiGLU, expert by expert; the router weight multiplies the activation."""
    offsets = plan.expert_offsets.tolist()
    parts = []
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets)):
        gate, up = functional.linear(rows[begin:end], gate_up[expert]).chunk(2, dim=-1)
        activation = row_weights[begin:end, None] * functional.silu(gate) * up
        parts.append(functional.linear(activation.to(rows.dtype), down[expert]))
    owned = torch.cat(parts)
    return functional.pad(owned, (0, 0, 0, rows.shape[0] - owned.shape[0]))


def combine(rows: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
    """``x[t]``: the sum over k of the rows of its copies, in fp32, rounded once."""
    copies = rows[plan.slot_of_copy].float().view(-1, plan.top_k, rows.shape[1])
    total = torch.zeros_like(copies[:, 0])
    for k in range(plan.top_k):
        total = total + copies[:, k]
    return total.to(rows.dtype)
