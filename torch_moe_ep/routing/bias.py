"""The bias of routing="bias", moved after the optimizer step."""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from torch_moe_ep.routing.router import RoutedRouter


@torch.no_grad()
def move_biases(routers: Iterable[RoutedRouter]) -> None:
    """Raise the bias of experts that got fewer copies than the mean, lower that of the others.

    By one step (`MoEConfig.bias_update_rate`) each, by the copies of all ranks since the last
    call; an expert at the mean keeps its bias, and so do all when nothing was counted. Wang et
    al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (2024), algorithm 1.

    Collective over all ranks (one all-reduce of layers * E int64); no host sync. Same bits on
    every rank.
    """
    biased = [router for router in routers if router.moe_config.routing == "bias"]
    if not biased:
        return
    counts = torch.stack([router.copies_per_expert for router in biased])
    if dist.is_initialized():
        dist.all_reduce(counts)
    # sign(mean - count) in whole numbers: sum - E * count.
    steps = torch.sign(counts.sum(dim=1, keepdim=True) - counts.shape[1] * counts)
    for router, step in zip(biased, steps, strict=True):
        router.expert_bias_steps += step.to(router.expert_bias_steps.device)
        router.copies_per_expert.zero_()
