"""How sure a router is: the entropy of its probabilities, averaged over tokens.

log(E) says that every expert looks alike to it, 0 that one expert takes a token for certain.
"""

from typing import Any

import torch
from torch import nn

from torch_moe_ep.gather_dispatch import CountCopies


def watch_entropy(router: nn.Module, device: torch.device) -> torch.Tensor:
    """Count a router's entropy from here on, once per backward.

    Args:
        router: returns logits ``[T, E]`` first and the weights of the chosen ``[T, K]`` second.
        device: where it computes.

    Returns:
        fp64 ``[2]``: sum over tokens of the entropy in nats, and tokens. The router keeps adding
        to it; evaluation and recomputation by activation checkpointing add nothing.

    Local, no host sync. A second call returns the first one's tensor.
    """
    found = router.__dict__.get("entropy_sums")
    if found is not None:
        assert isinstance(found, torch.Tensor)
        return found
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    router.__dict__["entropy_sums"] = sums  # no buffer: it enters no state dict
    router.register_forward_hook(_count_entropy)
    return sums


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the entropy of softmax(logits), and tokens: fp64 ``[2]``."""
    log_probabilities = torch.log_softmax(logits.detach().float(), dim=-1)
    # Not sum(p log p) with p = 0: the product of 0 and -inf would be NaN.
    total = torch.special.entr(log_probabilities.exp()).sum(dtype=torch.float64)
    return torch.stack([total, total.new_full((), logits.shape[0])])


# An autograd function with side effects is nothing for a compiler to trace.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _count_entropy(router: nn.Module, _args: Any, output: tuple[torch.Tensor, ...]) -> Any:
    logits, weights, *rest = output
    if not router.training or not weights.requires_grad:
        return None
    count: Any = CountCopies.apply
    return (logits, count(weights, entropy(logits), router.entropy_sums), *rest)
