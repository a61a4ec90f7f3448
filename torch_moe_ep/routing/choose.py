"""Which experts a token takes, and with what weights: one function for each routing mode.

All take router logits ``[T, E]`` and return weights fp32 ``[T, K]``, differentiable in the
logits, and expert ids int64 ``[T, K]``, distinct within a token. None syncs the host or talks to
other ranks. T tokens of this rank, K experts per token, E experts.
"""

import torch
from torch.nn import functional

from torch_moe_ep import ops

Choice = tuple[torch.Tensor, torch.Tensor]


def choose_top_k(logits: torch.Tensor, top_k: int) -> Choice:
    """The k largest logits, weighted by the softmax over these k (Mixtral, Jiang et al. 2024)."""
    return ops.route(logits, top_k, True)


def choose_sinkhorn(logits: torch.Tensor, top_k: int, *, is_training: bool) -> Choice:
    """The k largest entries of the Sinkhorn-scaled ``exp(logits)``; plain top-k in evaluation.

    The choice has no gradient. Weights are the softmax over all E at the chosen, not divided by
    their sum; the sigmoid for k = 1. Clark et al., "Unified Scaling Laws for Routed Language
    Models" (2022), section on Sinkhorn; the weights are Megatron-LM's.
    """
    with torch.no_grad():
        # In evaluation no batch is balanced: a token's experts do not depend on its neighbours.
        values = ops.sinkhorn(logits).log() if is_training else logits
        expert_ids = ops.route(values, top_k, False)[1]
    if top_k == 1:
        return torch.sigmoid(logits.float().gather(1, expert_ids)), expert_ids
    return torch.softmax(logits.float(), dim=-1).gather(1, expert_ids), expert_ids


def choose_balanced(logits: torch.Tensor, top_k: int) -> Choice:
    """Experts in turn whatever the logits say, for benchmarks: copy (t, k) goes to (t K + k) % E.

    For T = 3, K = 2, E = 4: (0, 1), (2, 3), (0, 1).
    """
    num_tokens, num_experts = logits.shape
    copies = torch.arange(num_tokens * top_k, device=logits.device)
    expert_ids = (copies % num_experts).view(num_tokens, top_k)
    return _weights_of_chosen(logits, expert_ids), expert_ids


def choose_biased(logits: torch.Tensor, top_k: int, bias: torch.Tensor) -> Choice:
    """The k largest of softmax + `bias` fp32 ``[E]``; the bias does not enter the weights.

    Weights are the softmax over the chosen logits. Wang et al., "Auxiliary-Loss-Free Load
    Balancing Strategy for Mixture-of-Experts" (2024).
    """
    with torch.no_grad():
        wanted = torch.softmax(logits.float(), dim=-1) + bias
        # Stable: of equal values the smaller id comes first.
        expert_ids = wanted.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return _weights_of_chosen(logits, expert_ids), expert_ids


def _weights_of_chosen(logits: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    return functional.softmax(logits.float().gather(1, expert_ids), dim=-1)


def count_copies(expert_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Copies per expert: int64 ``[E]``. Deterministic, and unlike bincount without host sync."""
    ordered = expert_ids.flatten().sort().values
    bounds = torch.arange(num_experts + 1, device=expert_ids.device)
    return torch.searchsorted(ordered, bounds).diff()
