"""A rank is killed in the middle of training: how long until every other rank has named it.

    python -m benchmarks.killed_rank                    # a rank for each GPU; one GPU: two share it
    python -m benchmarks.killed_rank --timeout_s 5      # CPU: four ranks over gloo

Every rank trains a small layer; the last one kills itself after two steps. The others are in the
middle of an exchange then, and raise when TORCH_MOE_EP_TIMEOUT_S has passed, or when the process
group says so before. A rank whose message does not name the dead one is told apart.
"""

import argparse
import os
import re
import signal
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import common
from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh
from torch_moe_ep.testing import LoneExperts, RankFailure, RankPool, random_routing, share_the_gpu

STEPS_BEFORE = 2
STARTING_S = 60.0  # what the ranks may take until the first step


def survive(device_type: str, transport: str, timeout_s: int) -> tuple[str, float]:
    """What this rank says about the last one's death, and after how many seconds; or die."""
    if device_type == "cuda":
        share_the_gpu()
    rank, world = dist.get_rank(), dist.get_world_size()
    config = MoEConfig(transport=transport)
    experts = LoneExperts(2 * world, hidden=128, width=256).to(device_type)
    model = apply_expert_parallel(experts, init_device_mesh(device_type, world), config)
    ids, weights = (part.to(device_type) for part in random_routing(64, 2, 2 * world))
    torch.manual_seed(rank)
    x = torch.randn(64, 128, device=device_type)

    def step() -> None:
        model(x, ids, weights).sum().backward()
        if device_type == "cuda":
            torch.cuda.synchronize()

    for _ in range(STEPS_BEFORE):
        step()
    os.environ["TORCH_MOE_EP_TIMEOUT_S"] = str(timeout_s)
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        while True:
            step()
    except RuntimeError as error:
        return str(error), time.monotonic() - start


def rows_of(
    transport: str, num_ranks: int, timeout_s: int, said: dict[int, tuple[str, float]]
) -> list[dict[str, Any]]:
    """Result rows from what the ranks said that came back."""
    dead = num_ranks - 1
    names_it = re.compile(rf"did not take part: [\d, ]*\b{dead}\b")
    named = [rank for rank, (text, _) in said.items() if names_it.search(text)]
    case = f"P={num_ranks} TORCH_MOE_EP_TIMEOUT_S={timeout_s}"
    slowest = max((seconds for _, seconds in said.values()), default=float("nan"))
    return [
        {"name": transport, "case": case, "value": round(value, 1), "unit": unit}
        for value, unit in (
            (slowest, "s until the last of the others raised"),
            (len(said), f"of {dead} others raised"),
            (len(named), f"of {dead} others named it"),
        )
    ]


def measure(
    num_ranks: int, device_type: str, transport: str, timeout_s: int
) -> list[dict[str, Any]]:
    """Kill the last of the ranks and hear the others."""
    with RankPool(num_ranks, backend="nccl" if device_type == "cuda" else "gloo") as pool:
        try:
            pool.run(
                survive,
                *(device_type, transport, timeout_s),
                timeout_s=STARTING_S + timeout_s,
                grace_s=timeout_s + 10.0,
            )
        except RankFailure as failure:
            return rows_of(transport, num_ranks, timeout_s, failure.results)
    raise RuntimeError(f"rank {num_ranks - 1} was not killed.")


def main() -> None:
    """Kill a rank under each transport and keep the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    num_gpus = torch.cuda.device_count()
    parser.add_argument("--ranks", type=int, default=(max(num_gpus, 2) if num_gpus else 4))
    parser.add_argument("--timeout_s", type=int, default=50)
    common.add_output_arguments(parser)
    arguments = parser.parse_args()
    device_type = "cuda" if num_gpus else "cpu"
    rows: list[dict[str, Any]] = []
    for transport in ("collective", "peer") if num_gpus else ("collective",):
        rows += measure(arguments.ranks, device_type, transport, arguments.timeout_s)
    common.finish("killed_rank", rows, arguments)


if __name__ == "__main__":
    main()
