"""torch.compile of the model around the experts.

Trap 20 (mixed meshes and data-dependent routing break compile, or recompile for ever).
"""

import pytest
import torch
import torch.distributed as dist
from parallel_cases import UNEVEN, Run, reference_of
from torch._dynamo.testing import CompileCounterWithBackend

from torch_moe_ep import apply_expert_parallel, init_device_mesh
from torch_moe_ep.testing import (
    LoneExperts,
    assert_close,
    batch_of,
    make_local_expert_parallel,
    random_routing,
    relative_error,
    tiny_mixtral,
)
from torch_moe_ep.testing.parallel import decoder_layers, from_rank0, full_gradients, wrap


def test_trap_20_compiled_layer_equals_eager_over_twenty_routings():
    model, plain = LoneExperts(), LoneExperts()
    for each in (model, plain):
        make_local_expert_parallel(each.experts)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for step in range(20):
        x = torch.randn(9 + step % 3, 16)
        ids, weights = random_routing(len(x), 2, 2 + 6 * (step % 2), seed=step)
        results = []
        for function, module in ((compiled, model), (plain, plain)):
            module.zero_grad()
            y = function(x, ids, weights)
            y.square().sum().backward()
            results.append([y.detach(), *(param.grad for param in module.parameters())])
        for actual, expected in zip(*results, strict=True):
            assert relative_error(actual, expected) <= 1e-6
    assert 1 <= counter.frame_count <= 6, f"{counter.frame_count} graphs for 20 routings"


def test_trap_20_layer_is_one_graph_for_twenty_routings():
    """At P = 1 the compiler sees through the layer: no graph break, one graph, right counters."""
    model = LoneExperts()
    make_local_expert_parallel(model.experts)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    expected = torch.zeros(8, dtype=torch.int64)
    for step in range(20):
        x = torch.randn(12, 16, requires_grad=True)
        ids, weights = random_routing(12, 2, 8, seed=step)
        compiled(x, ids, weights).square().sum().backward()
        expected += torch.bincount(ids.flatten(), minlength=8)
    assert counter.frame_count == 1
    assert torch.equal(model.experts.tokens_per_expert, expected)


def test_compiled_layer_of_frozen_experts_passes_on_the_gradients_of_trained_ones():
    results = []
    for is_frozen in (False, True):
        model = LoneExperts()
        make_local_expert_parallel(model.experts)
        model.requires_grad_(not is_frozen)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(12, 16, generator=generator, requires_grad=True)
        ids, weights = random_routing(12, 2, 8)
        weights.requires_grad_()
        compiled(x, ids, weights).square().sum().backward()
        results.append((x.grad, weights.grad))
        assert all((param.grad is None) == is_frozen for param in model.parameters())
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def compiled_gradients(run: Run, what: str):
    """Gradients and how many graphs were compiled after the first two of six steps."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", run.ep)
    model = apply_expert_parallel(tiny_mixtral(**run.model), mesh)
    counter = CompileCounterWithBackend("aot_eager")
    if what == "layers":
        for layer in decoder_layers(model):
            layer.compile(backend=counter)
    model = wrap(model, run.wrap, mesh)
    if what == "model":
        model.compile(backend=counter)
    counts = []
    for step in (5, 4, 3, 2, 1, 0):
        model.zero_grad()
        model(**batch_of(dist.get_rank(), step=step)).loss.backward()
        counts.append(counter.frame_count)
    return counts, from_rank0(full_gradients(model))


@pytest.mark.parametrize(
    ("wrap_kind", "what"), [("fsdp2", "layers"), ("fsdp2", "model"), ("fsdp1", "layers")]
)
def test_trap_20_compiled_model_has_the_same_gradients(ranks, wrap_kind, what):
    run = Run(wrap_kind, 2, 2, model=UNEVEN)
    counts, grads = ranks(2).run(compiled_gradients, run, what, timeout_s=240)[0]
    assert_close(grads, reference_of(run)[1], 1e-5, f"gradients of {run}")
    assert counts[0] >= 1, "nothing was compiled"
    assert counts[-1] == counts[2], f"graphs compiled after each step: {counts}"
