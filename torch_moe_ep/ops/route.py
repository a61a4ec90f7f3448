"""Route: pick experts and weights for each token."""

import torch


def route(
    logits: torch.Tensor, top_k: int, normalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over all experts, then the `top_k` most probable ones.

    Args:
        logits: ``[T, E]``, float32, bfloat16 or float16, any strides; E and top_k are at most 512
            and 32 on CUDA.
        top_k: K, from 1 to E.
        normalize: divide the K probabilities by their sum.

    Returns:
        weights fp32 ``[T, K]``, descending, and expert_ids int64 ``[T, K]``; of equal
        probabilities the smaller id comes first. A NaN logit makes its token's weights NaN.

    Raises:
        ValueError: a shape, dtype or top_k that does not fit.

    Not collective, no host sync, deterministic. Differentiable in `logits`. Arithmetic is fp32.
    The formula is that of Hugging Face's ``MixtralTopKRouter``.
    """
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.torch_moe_ep.route(
        logits, top_k, normalize
    )
    return result


@torch.library.register_fake("torch_moe_ep::route")
def _route_fake(
    logits: torch.Tensor, top_k: int, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.size(0), top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("torch_moe_ep::route_backward")
def _route_backward_fake(
    grad_weights: torch.Tensor,
    logits: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    normalize: bool,
) -> torch.Tensor:
    return logits.new_empty(logits.shape)
