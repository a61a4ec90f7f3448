"""sinkhorn on CUDA against the loop in plain torch."""

from __future__ import annotations

import pytest
import torch

from torch_moe_ep import ops, reference

from .cases import normal, relative_error, requires_gpu

pytestmark = requires_gpu

SHAPES = [(1, 1), (3, 8), (257, 8), (5000, 8), (16384, 8), (1000, 33), (700, 128), (640, 512)]


@pytest.mark.parametrize("num_iterations", [1, 2, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sinkhorn_equals_the_loop(
    shape: tuple[int, int], dtype: torch.dtype, num_iterations: int
) -> None:
    logits = (2 * normal(*shape, seed=1)).to(dtype).cuda()
    plan = ops.sinkhorn(logits, num_iterations)
    expected = reference.sinkhorn(logits.cpu(), num_iterations)
    assert plan.dtype == torch.float32
    assert relative_error(plan.cpu(), expected) <= 1e-6


@pytest.mark.parametrize("shape", [(64, 8), (4096, 8), (2048, 64)], ids=str)
def test_sinkhorn_default_iterations_reach_the_tolerance_on_wide_logits(
    shape: tuple[int, int],
) -> None:
    logits = 60 * torch.rand(*shape, generator=torch.Generator().manual_seed(2)) - 30
    rows = ops.sinkhorn(logits.cuda()).double()
    shares = (rows / rows.sum(dim=1, keepdim=True)).mean(dim=0) * shape[1]
    assert (shares - 1).abs().max().item() <= 1e-3


def test_sinkhorn_twice_is_bit_equal_and_waits_for_nothing() -> None:
    logits = (5 * normal(9000, 8, seed=3)).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = ops.sinkhorn(logits), ops.sinkhorn(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)


def test_sinkhorn_empty_strided_nan_and_too_many_experts() -> None:
    assert ops.sinkhorn(torch.zeros(0, 8, device="cuda")).shape == (0, 8)
    logits = normal(8, 50, seed=4).cuda().t()
    assert torch.equal(ops.sinkhorn(logits), ops.sinkhorn(logits.contiguous()))
    broken = logits.contiguous()
    broken[3, 1] = float("nan")
    assert ops.sinkhorn(broken).isnan().all()
    with pytest.raises(ValueError, match="at most 512 experts"):
        ops.sinkhorn(torch.zeros(2, 513, device="cuda"))


def test_sinkhorn_opcheck() -> None:
    arguments = (normal(6, 8, seed=5).cuda(), 3)
    torch.library.opcheck(torch.ops.torch_moe_ep.sinkhorn.default, arguments)
