"""Sinkhorn: scale router probabilities until every expert has the same share of the tokens."""

import torch

SINKHORN_ITERATIONS = 128


def sinkhorn(logits: torch.Tensor, num_iterations: int = SINKHORN_ITERATIONS) -> torch.Tensor:
    """Scale the rows and columns of ``exp(logits)`` to equal sums, by a fixed number of steps.

    Starting at ``d1 = 1``, each iteration does ``d0[t] = 1 / (T sum_e exp(logits[t, e]) d1[e])``
    and ``d1[e] = 1 / (E sum_t d0[t] exp(logits[t, e]))``. The `num_iterations` of the default bring
    the experts' shares of `logits` spread evenly over -30 to 30 within 1e-3 of each other from 64
    tokens on; logits nearer to each other need far fewer.

    Args:
        logits: ``[T, E]``, float32, bfloat16 or float16, any strides, any magnitude; E is at most
            512 on CUDA. T may be 0.
        num_iterations: at least 1.

    Returns:
        fp32 ``[T, E]``: ``d0[t] exp(logits[t, e]) d1[e]``. Columns sum to 1 / E; rows to 1 / T
        once converged.

    Raises:
        ValueError: a shape, dtype or number of iterations that does not fit.

    Not collective, deterministic. No host sync: convergence is never tested, and on CUDA all
    iterations are one cooperative kernel. Not differentiable: the result carries no gradient.
    Arithmetic is fp32, sums over tokens fp64. The iteration is Sinkhorn's and Knopp's (1967), as
    used for routing by Clark et al., "Unified Scaling Laws for Routed Language Models" (2022).
    """
    plan: torch.Tensor = torch.ops.torch_moe_ep.sinkhorn(logits.detach(), num_iterations)
    return plan


@torch.library.register_fake("torch_moe_ep::sinkhorn")
def _sinkhorn_fake(logits: torch.Tensor, num_iterations: int) -> torch.Tensor:
    return torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
