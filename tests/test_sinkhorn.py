"""The operator sinkhorn: the loop's values, balance reached, no gradient."""

import pytest
import torch
from operator_cases import DTYPES, strided

from torch_moe_ep import ops, reference
from torch_moe_ep.ops.sinkhorn import SINKHORN_ITERATIONS
from torch_moe_ep.testing import relative_error

SHAPES = ((5, 4), (0, 4), (3, 1), (1, 6), (300, 8), (700, 33))
TOLERANCE = 1e-3


def logits_of(tokens: int, num_experts: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens * 100 + num_experts)
    return (2 * torch.randn(tokens, num_experts, generator=generator)).to(dtype)


def wide_logits(tokens: int, num_experts: int) -> torch.Tensor:
    """Spread evenly over -30 to 30."""
    generator = torch.Generator().manual_seed(tokens + num_experts)
    return 60 * torch.rand(tokens, num_experts, generator=generator) - 30


def imbalance(plan: torch.Tensor) -> float:
    """How far the share of an expert is from 1 / E, relative, when each token weighs the same."""
    rows = plan.double() / plan.double().sum(dim=1, keepdim=True)
    return (rows.mean(dim=0) * plan.shape[1] - 1).abs().max().item()


@pytest.mark.parametrize("num_iterations", [1, 2, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sinkhorn_equals_the_loop(shape, dtype, num_iterations):
    logits = logits_of(*shape, dtype)
    plan = ops.sinkhorn(logits, num_iterations)
    assert plan.dtype == torch.float32
    assert relative_error(plan, reference.sinkhorn(logits, num_iterations)) <= 1e-6


@pytest.mark.parametrize("shape", [(64, 8), (512, 8), (4096, 8), (2048, 64)], ids=str)
def test_sinkhorn_default_iterations_reach_the_tolerance_on_wide_logits(shape):
    logits = wide_logits(*shape)
    assert logits.abs().max() > 29.5
    plan = ops.sinkhorn(logits)
    assert imbalance(plan) <= TOLERANCE
    assert imbalance(ops.sinkhorn(logits, 1)) > TOLERANCE, "nothing to do for the iterations"
    assert torch.allclose(plan.double().sum(dim=0) * shape[1], torch.ones(()).double(), rtol=1e-5)
    # fp32 rounds logits + log d1, of magnitude 60, by up to 4e-6.
    assert relative_error(plan, reference.sinkhorn(logits, SINKHORN_ITERATIONS)) <= 2e-5


def test_sinkhorn_one_wanted_expert_is_shared_out():
    logits = logits_of(800, 8) + 30 * torch.nn.functional.one_hot(torch.tensor(3), 8)
    chosen = ops.sinkhorn(logits).argmax(dim=1)
    assert torch.bincount(logits.argmax(dim=1), minlength=8)[3] == 800
    # Argmax of shares that are equal softly: near, not at, 100 each.
    assert torch.bincount(chosen, minlength=8).min() >= 50


def test_sinkhorn_huge_logits_stay_finite():
    logits = 1e4 * logits_of(64, 8)
    logits[:, 2] = -1e5
    assert ops.sinkhorn(logits).isfinite().all()


def test_sinkhorn_nan_passes_through():
    logits = logits_of(8, 4)
    logits[3, 1] = float("nan")
    assert ops.sinkhorn(logits).isnan().all()


def test_sinkhorn_carries_no_gradient():
    assert not ops.sinkhorn(logits_of(8, 4).requires_grad_()).requires_grad


def test_sinkhorn_takes_non_contiguous_logits():
    logits = logits_of(6, 8)
    for odd in (strided(logits), logits.t().contiguous().t()):
        assert not odd.is_contiguous()
        assert torch.equal(ops.sinkhorn(odd), ops.sinkhorn(logits))


def test_sinkhorn_does_not_depend_on_the_number_of_threads():
    logits = logits_of(3000, 8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.sinkhorn(logits)
        torch.set_num_threads(2)
        assert torch.equal(ops.sinkhorn(logits), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 4), (300, 8)], ids=str)
def test_sinkhorn_opcheck(shape, dtype):
    torch.library.opcheck(torch.ops.torch_moe_ep.sinkhorn.default, (logits_of(*shape, dtype), 3))


@pytest.mark.parametrize(
    ("logits", "num_iterations", "message"),
    [
        (torch.zeros(4), 1, "logits must be"),
        (torch.zeros(4, 4, dtype=torch.int64), 1, "logits must be float32"),
        (torch.zeros(4, 0), 1, "at least one expert"),
        (torch.zeros(4, 4), 0, "num_iterations must be at least 1, got 0"),
    ],
    ids=["one_dimension", "integers", "no_expert", "no_iteration"],
)
def test_sinkhorn_wrong_input_is_refused_by_name(logits, num_iterations, message):
    with pytest.raises(ValueError, match=message):
        ops.sinkhorn(logits, num_iterations)
