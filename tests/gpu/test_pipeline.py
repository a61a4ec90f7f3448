"""The four operators in a row on one GPU: against Hugging Face's eager experts, in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from torch_moe_ep import ops

from .cases import normal, poisoned_memory, relative_error, requires_gpu

pytestmark = requires_gpu

NUM_EXPERTS, HIDDEN, WIDTH = 8, 256, 512


def hugging_face_experts(dtype: torch.dtype, implementation: str) -> nn.Module:
    """MixtralExperts with seeded weights on the GPU."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=NUM_EXPERTS
    )
    config._experts_implementation = implementation
    experts: nn.Module = MixtralExperts(config)
    with torch.no_grad():
        for seed, param in enumerate(experts.parameters()):
            param.copy_(normal(*param.shape, seed=seed, scale=param.shape[-1] ** -0.5))
    return experts.to("cuda", dtype)


def experts_of_ours(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    plan = ops.plan(expert_ids, NUM_EXPERTS)
    rows, row_weights = ops.dispatch(x, weights, plan)
    return ops.combine(ops.expert_mlp(rows, row_weights, plan, gate_up, down), plan)


def inputs_of(dtype: torch.dtype, top_k: int) -> list[torch.Tensor]:
    """x, expert ids, weights and the gradient of the output; expert 7 gets few tokens."""
    logits = normal(700, NUM_EXPERTS, seed=10)
    logits[:, 7] -= 2.5
    weights, expert_ids = ops.route(logits.cuda(), top_k)
    x = normal(700, HIDDEN, dtype=dtype, seed=11).cuda()
    return [x, expert_ids, weights, normal(700, HIDDEN, dtype=dtype, seed=12).cuda()]


def results_of(
    function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], experts: nn.Module
) -> list[torch.Tensor]:
    """y and the gradients of x, the weights and both expert parameters."""
    x, expert_ids, weights, grad_y = inputs
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    leaves = [x, weights, experts.gate_up_proj, experts.down_proj]
    y = function(x, expert_ids, weights, experts)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


def ours(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, e: nn.Module) -> torch.Tensor:
    return experts_of_ours(x, ids, weights, e.gate_up_proj, e.down_proj)


def theirs(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, e: nn.Module) -> torch.Tensor:
    y: torch.Tensor = e(x, ids, weights.to(x.dtype))
    return y


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_pipeline_float32_equals_hugging_face_eager(top_k: int) -> None:
    inputs = inputs_of(torch.float32, top_k)
    experts = hugging_face_experts(torch.float32, "eager")
    with poisoned_memory():
        values = results_of(ours, inputs, experts)
    expected = results_of(theirs, inputs, experts)
    errors = [relative_error(a, b) for a, b in zip(values, expected, strict=True)]
    assert max(errors) <= 1e-5, errors


def test_pipeline_bfloat16_is_within_twice_the_error_of_hugging_face() -> None:
    inputs = inputs_of(torch.bfloat16, 2)
    values = results_of(ours, inputs, hugging_face_experts(torch.bfloat16, "eager"))
    peers = results_of(theirs, inputs, hugging_face_experts(torch.bfloat16, "grouped_mm"))
    exact_inputs = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    exact = hugging_face_experts(torch.bfloat16, "eager").double()
    oracle = results_of(theirs, exact_inputs, exact)
    for value, peer, reference in zip(values, peers, oracle, strict=True):
        assert relative_error(value, reference) <= 2 * relative_error(peer, reference) + 1e-4


def test_pipeline_twice_is_bit_equal() -> None:
    """Trap 21."""
    inputs = inputs_of(torch.bfloat16, 2)
    experts = hugging_face_experts(torch.bfloat16, "eager")
    for first, second in zip(
        results_of(ours, inputs, experts), results_of(ours, inputs, experts), strict=True
    ):
        assert torch.equal(first, second)


def test_pipeline_replays_in_a_cuda_graph_bit_equal() -> None:
    """One rank reads no size on the host, so a replay follows another routing."""
    inputs = inputs_of(torch.bfloat16, 2)
    experts = hugging_face_experts(torch.bfloat16, "eager")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results_of(ours, inputs, experts)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results_of(ours, inputs, experts)
    inputs[1].copy_((inputs[1] + 3) % NUM_EXPERTS)
    graph.replay()
    replayed = [tensor.clone() for tensor in captured]
    for first, second in zip(replayed, results_of(ours, inputs, experts), strict=True):
        assert torch.equal(first, second)
