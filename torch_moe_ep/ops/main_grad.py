"""Weight gradients added up in fp32 tensors that the caller owns, in place of ``.grad``."""

import torch
from torch.distributed.tensor import DTensor

WITH_FSDP = (
    "has a main_grad, which works without FSDP alone: FSDP reduces the gradients that backward "
    "returns, and there would be none (delete the attribute, or call ops.expert_mlp with "
    "main_grads on weights that FSDP does not manage)"
)


def check_main_grad(weight: torch.Tensor, main_grad: torch.Tensor, name: str) -> None:
    """Check that backward can add the weight's gradient to `main_grad`.

    Args:
        weight: a plain tensor, no DTensor.
        main_grad: fp32 of the weight's shape and device, contiguous, without a gradient of its own.
        name: of the weight, for messages.

    Raises:
        ValueError: `main_grad` does not fit, or the weight is a DTensor or frozen.
    """
    if isinstance(weight, DTensor):
        raise ValueError(f"{name} {WITH_FSDP}; got a DTensor.")
    wanted, got = (weight.shape, weight.device), (main_grad.shape, main_grad.device)
    if main_grad.dtype != torch.float32 or wanted != got:
        raise ValueError(
            f"the main_grad of {name} must be float32 {list(weight.shape)} on {weight.device}, got "
            f"{main_grad.dtype} {list(main_grad.shape)} on {main_grad.device} (make it with "
            f"torch.zeros_like(weight, dtype=torch.float32))."
        )
    if main_grad.requires_grad:
        raise ValueError(f"the main_grad of {name} must not require a gradient (detach it).")
    if not main_grad.is_contiguous():
        raise ValueError(
            f"the main_grad of {name} must be contiguous, got strides {main_grad.stride()} (make "
            f"it with torch.zeros_like(weight, dtype=torch.float32))."
        )
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError(
            f"{name} has a main_grad but requires no gradient (pass main_grads only where both "
            f"weights are trained)."
        )
