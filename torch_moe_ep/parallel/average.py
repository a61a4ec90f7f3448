"""Gradient averaging for models without FSDP or DDP around them."""

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from torch_moe_ep.gather import all_gather
from torch_moe_ep.parallel.state import ExpertParallelState, iter_experts, states_of

BUCKET_ELEMENTS = 1 << 25  # bounds the extra memory: 128 MiB of fp32 per all-reduce


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Average the dense gradients over all ranks, in place, after backward.

    Expert gradients need nothing: they are final (the mean over W) when backward returns.

    Args:
        model: a patched model with no FSDP and no DDP around it. A parameter whose gradient is
            None on some ranks counts as zero there; None on all ranks stays None.

    Raises:
        ValueError: DDP or FSDP averages already.
        RuntimeError: a rank did not take part within the time-out; the message names it (over NCCL
            with process-group hooks).

    Collective over all ranks (an all-gather of a byte per parameter, and one all-reduce per 32 Mi
    elements and dtype). Syncs the host once, to learn which gradients exist anywhere. Same bits on
    every rank.
    """
    params = _dense_parameters(model)
    for state in states_of(model):
        state.is_averaging_known = True
    if not params or not dist.is_initialized():
        return
    device = params[0].device
    has_grad = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8, device=device)
    is_anywhere = all_gather(has_grad).amax(dim=0).tolist()
    present = [p for p, is_there in zip(params, is_anywhere, strict=True) if is_there]
    for param in present:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
    for bucket in _buckets([param.grad for param in present if param.grad is not None]):
        _average_bucket(bucket)


def warn_of_unaveraged(state: ExpertParallelState) -> None:
    """Warn once, on rank 0, where nothing averages a model's dense gradients; at its first step.

    Local; looks at modules alone.
    """
    if state.is_averaging_known:
        return
    state.is_averaging_known = True
    is_wrapped = state.wrappers() or state.fsdp1_modules() or state.fsdp2_modules()
    if is_wrapped or state.mesh.size() == 1 or dist.get_rank() > 0:
        return
    if _dense_parameters(state.model):
        warnings.warn(
            f"no FSDP or DDP is around the model and average_gradients(model) was not called: "
            f"dense weights of the {state.mesh.size()} ranks will drift apart. Call it after each "
            f"backward, unless the script averages dense gradients itself.",
            stacklevel=2,
        )


def _dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    wrappers = [wrapper for state in states_of(model) for wrapper in state.wrappers()]
    if wrappers or isinstance(model, DistributedDataParallel):
        raise ValueError(
            "average_gradients is for models without a wrapper: FSDP and DDP average dense "
            "gradients themselves; remove the call."
        )
    expert_ids = {id(p) for experts in iter_experts(model) for p in experts.held_parameters()}
    params = [p for p in model.parameters() if p.requires_grad and id(p) not in expert_ids]
    if any(isinstance(p, DTensor) for p in params):
        raise ValueError(
            "average_gradients is for models without FSDP: fully_shard averages dense gradients "
            "itself; remove the call."
        )
    return params


def _buckets(grads: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Group gradients by dtype and device, in order, at most BUCKET_ELEMENTS each (or one)."""
    buckets: list[list[torch.Tensor]] = []
    open_buckets: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for grad in grads:
        key = (grad.dtype, grad.device)
        bucket = open_buckets.get(key)
        if bucket is None or sum(g.numel() for g in bucket) + grad.numel() > BUCKET_ELEMENTS:
            bucket = open_buckets[key] = []
            buckets.append(bucket)
        bucket.append(grad)
    return buckets


def _average_bucket(grads: list[torch.Tensor]) -> None:
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    flat.div_(dist.get_world_size())
    parts = torch.split(flat, [grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))
