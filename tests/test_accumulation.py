"""Gradient accumulation, with and without synchronisation between micro batches."""

import contextlib

import pytest
import torch.distributed as dist
from parallel_cases import Run, build

import torch_moe_ep
from torch_moe_ep.testing import assert_close, batch_of, tiny_mixtral
from torch_moe_ep.testing.parallel import from_rank0, full_gradients
from torch_moe_ep.testing.reference import reference_gradients

MICRO_BATCHES = 3


def accumulated_on_rank(run: Run, is_deferred: bool):
    """Gradients of three micro batches; `is_deferred` reduces dense gradients at the last one."""
    model = build(run)
    for micro in range(MICRO_BATCHES):
        is_last = micro == MICRO_BATCHES - 1
        context = contextlib.nullcontext()
        if is_deferred and run.wrap in ("fsdp2", "hsdp2"):
            model.set_requires_gradient_sync(is_last)
        elif is_deferred and run.wrap != "none" and not is_last:
            context = model.no_sync()
        with context:
            batch = batch_of(dist.get_rank(), step=micro)
            (model(**batch).loss / MICRO_BATCHES).backward()
    if run.wrap == "none":
        torch_moe_ep.average_gradients(model)
    return from_rank0(full_gradients(model))


@pytest.mark.parametrize("is_deferred", [False, True], ids=["each", "deferred"])
@pytest.mark.parametrize(
    "run",
    [Run("fsdp2", 4, 2), Run("fsdp2", 2, 2), Run("hsdp2", 4, 2, 1), Run("fsdp1", 4, 2),
     Run("fsdp1_no_shard", 2, 2), Run("ddp", 2, 2), Run("none", 2, 2)],
    ids=str,
)  # fmt: skip
def test_accumulated_gradients_equal_one_process(ranks, run, is_deferred):
    actual = ranks(run.world).run(accumulated_on_rank, run, is_deferred)[0]
    batches = [
        batch_of(rank, step=micro) for micro in range(MICRO_BATCHES) for rank in range(run.world)
    ]
    _, expected = reference_gradients(tiny_mixtral, batches)
    assert_close(actual, expected, 1e-5, f"gradients of {run}")
