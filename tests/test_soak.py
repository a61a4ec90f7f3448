"""Many steps with random batches, routing and delays: no rank hangs, and memory stays flat."""

import os
import random
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_cases import Run, build

import torch_moe_ep

WARM_UP = 20  # steps after which pools and caches have what they need
MAX_DELAY_S = 0.004
# What an allocator may still take for batches of random lengths; one leaked gradient of every
# expert (0.4 MB) a step would be 30 MB in 80 steps.
MAX_GROWTH_BYTES = 16 << 20


def soak(run: Run, num_steps: int) -> dict[str, int]:
    """Train on random batches; what grew after the warm-up."""
    torch.manual_seed(dist.get_rank())
    delays = random.Random(dist.get_rank())
    model = build(run)
    for module in model.modules():
        if isinstance(module, torch_moe_ep.layer.ExpertParallelExperts):
            module.register_forward_pre_hook(
                lambda *_: time.sleep(delays.uniform(0.0, MAX_DELAY_S)), prepend=True
            )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before: dict[str, int] = {}
    for step in range(num_steps):
        if step == WARM_UP:
            before = resources()
        ids = torch.randint(0, 128, (delays.randint(1, 3), delays.randint(2, 32)))
        model(input_ids=ids, labels=ids).loss.backward()
        time.sleep(delays.uniform(0.0, MAX_DELAY_S))
        norm = torch_moe_ep.clip_grad_norm_(model, 1.0)
        assert torch.isfinite(norm), f"gradient norm {norm} in step {step}"
        optimizer.step()
        optimizer.zero_grad()
    return {name: value - before[name] for name, value in resources().items()}


def resources() -> dict[str, int]:
    """Resident bytes, threads and open files of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
    }


@pytest.mark.parametrize(
    "num_steps", [100, pytest.param(1000, marks=pytest.mark.full)], ids="{}_steps".format
)
@pytest.mark.parametrize(
    "config", [{}, pytest.param({"num_chunks": 3}, marks=pytest.mark.full)], ids=str
)
def test_steps_with_random_routing_and_delays_neither_hang_nor_grow(ranks, config, num_steps):
    run = Run("fsdp2", 4, 2, config=config)
    grown = ranks(4).run(soak, run, num_steps, timeout_s=60.0 + 0.5 * num_steps)
    for rank, growth in enumerate(grown):
        assert growth["bytes"] < MAX_GROWTH_BYTES, f"rank {rank}: {growth}"
        assert growth["threads"] == 0, f"rank {rank}: {growth}"
        assert growth["files"] == 0, f"rank {rank}: {growth}"
