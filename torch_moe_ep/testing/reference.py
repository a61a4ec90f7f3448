"""The run that every parallel run is compared with.

One process runs the W local batches one after another and averages their losses. (The auxiliary
loss of Hugging Face is a product of batch means, so the mean of the ranks' losses is not the loss
of the joined batch.)
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

Batch = dict[str, torch.Tensor]


def mean_loss_backward(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Backward of the mean of the batches' losses; returns that mean. Gradients accumulate."""
    total = 0.0
    for batch in batches:
        loss = model(**batch).loss / len(batches)
        loss.backward()
        total += loss.item()
    return total


def reference_gradients(
    make_model: Callable[[], nn.Module], batches: Sequence[Batch]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and every parameter's gradient of the reference run, in fp32 or the model's dtype."""
    model = make_model()
    loss = mean_loss_backward(model, batches)
    return loss, {
        name: torch.zeros_like(param) if param.grad is None else param.grad.clone()
        for name, param in model.named_parameters()
    }


def reference_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[Sequence[Batch]],
    max_norm: float | None = None,
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of training steps, each on the W batches of one step."""
    losses: list[float] = []
    norms: list[float] = []
    for batches in steps:
        losses.append(mean_loss_backward(model, batches))
        if max_norm is not None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms
