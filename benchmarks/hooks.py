"""Host time of an expert-parallel layer with and without process-group hooks, in pairs.

    python -m benchmarks.hooks                   # CPU: gloo, groups of one and of two ranks
    python -m benchmarks.hooks --device cuda     # one GPU: NCCL, a group of one rank

A pair is the layer's forward and backward once on a group without hooks and once on one with them,
turn about, 10,000 pairs by default. Shapes are tiny: what is timed is the host. Seven collectives a
layer: the counts, rows and weights out, rows back; in backward rows back, rows and weights out. On
a GPU the device is waited for between the two of a pair and outside of the clock.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import add_common_arguments, finish
from torch_moe_ep.testing import LoneExperts, RankPool, make_local_expert_parallel, random_routing

TOKENS, TOP_K, EXPERTS, HIDDEN = 4, 2, 8, 16
COLLECTIVES = 7
WARM_UP = 200


def main() -> None:
    """Run, print, and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hooks", description=__doc__)
    add_common_arguments(parser)
    parser.add_argument("--pairs", type=int, default=10_000, help="pairs of calls per row")
    arguments = parser.parse_args()
    on_gpu = torch.device(arguments.device).type == "cuda"
    rows = []
    for num_ranks in (1,) if on_gpu else (1, 2):
        with RankPool(num_ranks, backend="nccl" if on_gpu else "gloo") as pool:
            seconds = pool.run(time_pairs, arguments.device, arguments.pairs, timeout_s=3600)[0]
        case = f"{'NCCL' if on_gpu else 'gloo'}, group of {num_ranks}, {arguments.pairs} pairs"
        rows += rows_of(case, *seconds)
    finish("hooks", rows, arguments)


def rows_of(case: str, without: list[float], with_hooks: list[float]) -> list[dict[str, Any]]:
    """Medians in microseconds per layer, and the median of the pairs' differences."""
    differences = [more - less for less, more in zip(without, with_hooks, strict=True)]
    found = {
        "layer without hooks": without,
        "layer with hooks": with_hooks,
        "hooks per layer": differences,
        "hooks per collective": [difference / COLLECTIVES for difference in differences],
    }
    return [
        {
            "name": name,
            "case": case,
            "value": round(statistics.median(values) * 1e6, 3),
            "unit": "us",
            "quartiles": [round(value * 1e6, 3) for value in statistics.quantiles(values)],
        }
        for name, values in found.items()
    ]


def time_pairs(device: str, num_pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each call on this rank, without and with hooks."""
    from torch_moe_ep import hooks, label
    from torch_moe_ep.hooks.library import native

    if device == "cuda":
        torch.cuda.set_device(0)
    everyone = list(range(dist.get_world_size()))
    plain, hooked = dist.new_group(everyone), dist.new_group(everyone)
    hooks.attach(hooked)
    hooks.attach()  # starts the order guard
    call = layer_on(device)

    @contextlib.contextmanager
    def guarded() -> Iterator[None]:
        native.begin_forward("training", False)
        try:
            yield
        finally:
            native.end_forward()

    without: list[float] = []
    with_hooks: list[float] = []
    for pair in range(WARM_UP + num_pairs):
        turns = [(plain, without), (hooked, with_hooks)]
        for group, seconds in turns if pair % 2 == 0 else reversed(turns):
            (label.enable if group is hooked else label.disable)()
            forward = guarded if group is hooked else contextlib.nullcontext
            took = call(group.group_name, forward)
            if pair >= WARM_UP:
                seconds.append(took)
    return without, with_hooks


def layer_on(device: str) -> Callable[..., float]:
    """A call that runs the layer on a group and returns the host's seconds for it.

    Its arguments: the group's name, and what makes the context of the forward.
    """
    num_ranks = dist.get_world_size()
    experts = make_local_expert_parallel(LoneExperts().experts).to(device)
    for name, weight in list(experts.named_parameters()):
        local = weight.detach()[: EXPERTS // num_ranks].clone()
        experts.register_parameter(name, torch.nn.Parameter(local))
    experts.layer_name = "experts"
    experts.tokens_per_expert = experts.tokens_per_expert.to(device)
    experts.invalid_flag = experts.invalid_flag.to(device)
    x = torch.randn(TOKENS, HIDDEN, device=device, requires_grad=True)
    ids, weights = (value.to(device) for value in random_routing(TOKENS, TOP_K, EXPERTS))
    weights.requires_grad_()
    on_gpu = device == "cuda"

    def call(group_name: str, forward: Callable[[], Any]) -> float:
        experts.ep_group_name = group_name
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        with forward():
            output = experts(x, ids, weights)
        output.sum().backward()
        took = time.perf_counter() - started
        x.grad = weights.grad = None
        return took

    return call


if __name__ == "__main__":
    main()
