"""The operator route: softmax, top-k and normalisation."""

import pytest
import torch
from operator_cases import DTYPES, strided

from torch_moe_ep import ops, reference
from torch_moe_ep.testing import relative_error

SHAPES = ((5, 4, 2), (0, 4, 2), (3, 1, 1), (6, 8, 8), (4, 16, 3), (33, 7, 1))


def logits_of(tokens: int, num_experts: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens * 100 + num_experts)
    return torch.randn(tokens, num_experts, generator=generator).to(dtype)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_route_values_equal_reference(shape, dtype, normalize):
    tokens, num_experts, top_k = shape
    logits = logits_of(tokens, num_experts, dtype)
    weights, ids = ops.route(logits, top_k, normalize)
    expected_weights, expected_ids = reference.route(logits, top_k, normalize)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int64
    assert torch.equal(ids, expected_ids)
    assert relative_error(weights, expected_weights) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_route_equals_hugging_face_formula(dtype):
    logits = logits_of(64, 8, dtype)
    scores = torch.nn.functional.softmax(logits.float(), dim=-1)
    values, ids = torch.topk(scores, 2, dim=-1)
    weights, expert_ids = ops.route(logits, 2)
    tied = (scores.sort(dim=-1, descending=True).values[:, :3].diff(dim=-1) == 0).any(dim=-1)
    assert torch.equal(expert_ids[~tied], ids[~tied])
    assert (~tied).sum() > 32
    assert relative_error(weights, values / values.sum(-1, keepdim=True)) <= 1e-6


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_route_gradient_equals_reference(shape, normalize):
    tokens, num_experts, top_k = shape
    logits = logits_of(tokens, num_experts).requires_grad_()
    expected = logits.detach().clone().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(tokens, top_k, generator=generator)
    ops.route(logits, top_k, normalize)[0].backward(upstream)
    reference.route(expected, top_k, normalize)[0].backward(upstream)
    # Top-1 normalised has the gradient zero; the twin's is the rounding of terms that cancel.
    scale = max(expected.grad.abs().max().item() if tokens else 0.0, 0.1)
    assert tokens == 0 or (logits.grad - expected.grad).abs().max() / scale <= 1e-5
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_route_half_gradient_has_dtype_of_logits(dtype):
    logits = logits_of(16, 8, dtype).requires_grad_()
    wide = logits.detach().float().requires_grad_()
    upstream = torch.linspace(-1, 1, 32).view(16, 2)
    ops.route(logits, 2)[0].backward(upstream)
    reference.route(wide, 2)[0].backward(upstream)
    assert logits.grad.dtype == dtype
    assert relative_error(logits.grad, wide.grad.to(dtype)) <= 2**-7


def test_route_ties_take_smaller_id_first():
    weights, ids = ops.route(torch.zeros(3, 6), 4)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    assert torch.equal(weights, torch.full((3, 4), 0.25))


def test_route_nan_logit_gives_nan_weights_and_valid_ids():
    logits = logits_of(4, 8)
    logits[1, 5] = float("nan")
    weights, ids = ops.route(logits, 2)
    assert weights[1].isnan().all() and not weights[[0, 2, 3]].isnan().any()
    assert ((ids >= 0) & (ids < 8)).all()
    assert all(len(set(row)) == 2 for row in ids.tolist())


def test_route_takes_non_contiguous_logits():
    logits = logits_of(6, 8)
    for odd in (strided(logits), logits.t().contiguous().t()):
        assert not odd.is_contiguous()
        for actual, expected in zip(ops.route(odd, 2), ops.route(logits, 2), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_route_opcheck(shape, dtype):
    tokens, num_experts, top_k = shape
    logits = logits_of(tokens, num_experts, dtype).requires_grad_()
    torch.library.opcheck(torch.ops.torch_moe_ep.route.default, (logits, top_k, True))


def test_route_backward_opcheck():
    logits = logits_of(5, 4)
    weights, ids = ops.route(logits, 2)
    arguments = (torch.ones_like(weights), logits, weights, ids, True)
    torch.library.opcheck(torch.ops.torch_moe_ep.route_backward.default, arguments)


@pytest.mark.parametrize(
    ("logits", "top_k", "message"),
    [
        (torch.zeros(4), 1, "logits"),
        (torch.zeros(4, 4, dtype=torch.int64), 1, "logits"),
        (torch.zeros(4, 4), 5, "top_k"),
        (torch.zeros(4, 4), 0, "top_k"),
    ],
    ids=["one_dimension", "integers", "top_k_over_e", "top_k_zero"],
)
def test_route_wrong_input_is_refused_by_name(logits, top_k, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.route(logits, top_k)
