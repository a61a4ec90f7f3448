"""Routings with exact loads: which expert each copy goes to.

Letters: T tokens, K experts per token, N = T * K copies, E experts.
"""

import torch

ROUTINGS = ("even", "1/i", "two", "empty")


def copies_per_expert(routing: str, num_tokens: int, num_experts: int, top_k: int) -> list[int]:
    """How many copies each expert gets; sums to N, none above T (a token's experts differ).

    "even": N / E each. "1/i": expert i in proportion to 1 / (i + 1). "two": all to the first two
    (to the first K where K > 2). "empty": expert 0 gets none, the others share evenly.
    """
    shares = {
        "even": [1.0] * num_experts,
        "1/i": [1.0 / (idx + 1) for idx in range(num_experts)],
        "two": [1.0 if idx < max(2, top_k) else 0.0 for idx in range(num_experts)],
        "empty": [0.0 if idx == 0 else 1.0 for idx in range(num_experts)],
    }
    if routing not in shares:
        raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {routing}.")
    counts = [0] * num_experts
    left = num_tokens * top_k
    total = sum(shares[routing])
    # Largest share first; what an expert cannot take (more than T) goes to those after it.
    for idx in sorted(range(num_experts), key=lambda idx: -shares[routing][idx]):
        share = shares[routing][idx]
        wanted = round(left * share / total) if total > 1e-12 else 0
        counts[idx] = min(num_tokens, wanted, left)
        left -= counts[idx]
        total -= share
    if left != 0:
        raise ValueError(f"routing {routing} has no room for top_k {top_k} of {num_experts}.")
    return counts


def expert_ids(routing: str, num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    """Expert ids int64 [T, K] on the CPU with exactly `copies_per_expert`, tokens shuffled.

    Copies in expert order are dealt to tokens 0, 1, ..., T - 1, 0, 1, ...: an expert with at most
    T copies never meets a token twice.
    """
    counts = copies_per_expert(routing, num_tokens, num_experts, top_k)
    in_order = torch.repeat_interleave(torch.arange(num_experts), torch.tensor(counts))
    dealt = in_order.view(top_k, num_tokens).T
    generator = torch.Generator().manual_seed(num_tokens + num_experts)
    return dealt[torch.randperm(num_tokens, generator=generator)].contiguous()
