"""route on CUDA against plain torch."""

from __future__ import annotations

import pytest
import torch

from torch_moe_ep import ops

from .cases import normal, relative_error, requires_gpu

pytestmark = requires_gpu

SHAPES = [
    (0, 8, 2),
    (1, 1, 1),
    (257, 8, 2),
    (1000, 33, 5),
    (64, 128, 8),
    (64, 512, 32),
    (9, 16, 16),
]


def route_reference(
    logits: torch.Tensor, top_k: int, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    probabilities = torch.softmax(logits.float(), dim=-1)
    # Stable: of equal probabilities the smaller id comes first, which topk does not promise.
    weights, expert_ids = probabilities.sort(dim=-1, descending=True, stable=True)
    weights, expert_ids = weights[:, :top_k], expert_ids[:, :top_k]
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, expert_ids


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_route_equals_torch(
    shape: tuple[int, int, int], dtype: torch.dtype, normalize: bool
) -> None:
    num_tokens, num_experts, top_k = shape
    # Far enough apart to round alike; the 16-bit types have ties among 512.
    order = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(1))
    logits = (order.argsort(dim=1).float() / 16).to(dtype).cuda().requires_grad_()
    weights, expert_ids = ops.route(logits, top_k, normalize)
    expected_weights, expected_ids = route_reference(logits, top_k, normalize)
    assert torch.equal(expert_ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-9)
    grad_weights = normal(num_tokens, top_k, seed=2).cuda()
    (grad,) = torch.autograd.grad(weights, logits, grad_weights)
    assert grad.dtype == dtype
    (expected,) = torch.autograd.grad(expected_weights, logits, grad_weights)
    assert relative_error(grad, expected) <= (1e-5 if dtype == torch.float32 else 1e-2)


def test_route_ties_take_the_smaller_id_first() -> None:
    _, expert_ids = ops.route(torch.zeros(5, 40, device="cuda"), 6)
    assert torch.equal(expert_ids.cpu(), torch.arange(6).expand(5, 6))


def test_route_nan_logits_pass_through() -> None:
    logits = torch.zeros(2, 8, device="cuda")
    logits[1, 3] = float("nan")
    weights, expert_ids = ops.route(logits, 2)
    assert weights[0].isfinite().all() and weights[1].isnan().all()
    assert torch.equal(expert_ids.cpu(), torch.tensor([[0, 1], [0, 1]]))


def test_route_strided_logits_equal_contiguous() -> None:
    logits = normal(8, 50, seed=3).cuda().t()
    for ours, expected in zip(ops.route(logits, 3), ops.route(logits.contiguous(), 3), strict=True):
        assert torch.equal(ours, expected)


def test_route_too_many_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 512 experts"):
        ops.route(torch.zeros(2, 513, device="cuda"), 2)
    with pytest.raises(ValueError, match="top_k must be at most 32"):
        ops.route(torch.zeros(2, 64, device="cuda"), 33)


def test_route_opcheck() -> None:
    logits = normal(6, 8, seed=4).cuda().requires_grad_()
    torch.library.opcheck(torch.ops.torch_moe_ep.route.default, (logits, 2, True))
