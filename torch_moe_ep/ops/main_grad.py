"""Weight gradients added up in fp32 tensors that the caller owns, in place of ``.grad``."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor

WITH_FSDP = (
    "has a main_grad, which works without FSDP alone: FSDP reduces the gradients that backward "
    "returns, and there would be none (delete the attribute, or call ops.expert_mlp with "
    "main_grads on weights that FSDP does not manage)"
)


class _AddToMainGrad(torch.autograd.Function):
    """The weight itself; its gradient goes into main_grad and no further."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, main_grad: torch.Tensor) -> torch.Tensor:
        ctx.main_grad = main_grad
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        ctx.main_grad.add_(grads[0])
        return None, None


def with_main_grad(weight: torch.Tensor, main_grad: torch.Tensor, name: str) -> torch.Tensor:
    """Return the weight such that backward adds its gradient to `main_grad`.

    Args:
        weight: a plain tensor, no DTensor.
        main_grad: fp32 of the weight's shape and device, without a gradient of its own.
        name: of the weight, for messages.

    Raises:
        ValueError: `main_grad` does not fit, or the weight is a DTensor.
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
    weighted: torch.Tensor = _AddToMainGrad.apply(weight, main_grad)  # type: ignore[no-untyped-call]
    return weighted
