"""Losses of the router that act through the gradient and leave the printed loss alone.

`AddGradient` is the identity on the router's weights; its backward hands the losses a gradient of
their own. So a loss counts exactly once per backward: under activation checkpointing the first
forward builds no graph that is run backward, and evaluation none at all. The loss stands where a
"+ loss" in the script would, before any division by micro-batches, which is why the script says
its factor (`set_aux_loss_scale`); a GradScaler's factor is followed by itself.
"""

import functools
import math
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from torch_moe_ep.routing.choose import count_copies

_scale = 1.0
_scaler: "weakref.ref[GradScaler] | None" = None
_is_following = False


def set_aux_loss_scale(scale: float) -> None:
    """Say what factor the script puts on its loss before backward.

    z loss and load-balancing loss are added to the gradient inside the model, where a factor of
    the script's (1 / n for n micro-batches) cannot be seen; their gradient is multiplied by
    `scale` instead. A GradScaler's scale comes on top by itself. Acts on every patched model of
    this process, from the next backward on, until called again; 1 at the start.

    Args:
        scale: a finite factor, usually 1 / n.

    Raises:
        ValueError: not a finite number.

    Local, no host sync.
    """
    global _scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, such as 1 / 4, got {scale!r}.")
    _scale = float(scale)


def follow_grad_scaler() -> None:
    """Remember which GradScaler scaled a loss last, from now on. Once per process.

    torch has no hook for it, so `scale` of its two scaler classes is wrapped: it notes the
    scaler and does what it did. Without a scaler nothing is noted.
    """
    global _is_following
    if _is_following:
        return
    _is_following = True
    for scaler_class in (GradScaler, ShardedGradScaler):
        _note_scaler(scaler_class)


def _note_scaler(scaler_class: Any) -> None:
    original = scaler_class.scale

    @functools.wraps(original)
    def scale(self: GradScaler, outputs: Any) -> Any:
        global _scaler
        _scaler = weakref.ref(self)
        return original(self, outputs)

    scaler_class.scale = scale


def loss_gradient(device: torch.device) -> torch.Tensor:
    """The gradient that stands for "+ loss": fp32 ``[]``. No host sync."""
    gradient = torch.full((), _scale, dtype=torch.float32, device=device)
    scaler: Any = None if _scaler is None else _scaler()
    factor = getattr(scaler, "_scale", None)  # a device tensor; get_scale() would sync the host
    if scaler is None or not scaler.is_enabled() or factor is None:
        return gradient
    scaled: torch.Tensor = gradient * factor.to(device)
    return scaled


class AddGradient(torch.autograd.Function):
    """The identity on `weights`; backward hands `loss` its gradient and calls `count`."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, loss: torch.Tensor, count: Any) -> torch.Tensor:
        """Args: weights ``[T, K]``, the loss ``[]`` and a function to call once per backward."""
        ctx.count = count
        ctx.device = loss.device
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Pass the gradient of the weights on."""
        ctx.count()
        return grads[0], loss_gradient(ctx.device), None


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of logsumexp(logits)^2: fp32 ``[]``, 0 without tokens.

    Zoph et al., "ST-MoE: Designing Stable and Transferable Sparse Expert Models" (2022).
    """
    total = torch.logsumexp(logits.float(), dim=-1).square().sum()
    return total / max(1, logits.shape[0])


def load_balancing_loss(
    logits: torch.Tensor, expert_ids: torch.Tensor, *, is_global: bool
) -> torch.Tensor:
    """E * sum over e of (mean probability of e) * (share of the copies that e gets): fp32 ``[]``.

    1 when both are even. Shares sum to 1 (Megatron-LM's convention; Hugging Face's sum to K).
    Fedus et al., "Switch Transformers" (2021), equations 4 to 6, for top-k.

    Args:
        logits: ``[T, E]``.
        expert_ids: int64 ``[T, K]``, as chosen.
        is_global: shares over the tokens of all ranks, and the mean probability divided by the
            ranks' mean number of tokens: the mean over the ranks is then the loss of the joined
            batch, value and gradient.

    Collective over all ranks with `is_global` (one all-reduce of E + 1 int64), no host sync.
    """
    num_tokens, num_experts = logits.shape
    totals = count_copies(expert_ids, num_experts)
    totals = torch.cat([totals, totals.new_full((1,), num_tokens)])
    num_ranks = 1
    if is_global and dist.is_initialized():
        num_ranks = dist.get_world_size()
        dist.all_reduce(totals)
    tokens = totals[-1].clamp_min(1).float()
    shares = totals[:-1].float() / (tokens * expert_ids.shape[1])
    probabilities = torch.softmax(logits.float(), dim=-1).sum(dim=0) * num_ranks / tokens
    return num_experts * (probabilities * shares).sum()
