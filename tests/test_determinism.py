"""Two runs give the same bits."""

import pytest
import torch
from parallel_cases import UNEVEN, Run, backward, build

from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh
from torch_moe_ep.parallel import initialize_experts
from torch_moe_ep.testing import (
    LoneExperts,
    make_local_expert_parallel,
    random_routing,
    tiny_mixtral,
)
from torch_moe_ep.testing.parallel import from_rank0, full_gradients, full_parameters


def two_runs_on_rank(run: Run) -> list[str]:
    found = []
    for _ in range(2):
        model = build(run)
        backward(run, model)
        found.append(from_rank0(full_gradients(model)))
    return [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_two_parallel_runs_are_bit_equal(ranks, kind):
    assert ranks(4).run(two_runs_on_rank, Run(kind, 4, 2, model=UNEVEN))[0] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [{}, {"recompute": "gate_up"}], ids=["plain", "recompute"])
def test_two_runs_of_the_layer_on_two_threads_are_bit_equal(dtype, config):
    before = torch.get_num_threads()
    found = []
    try:
        torch.set_num_threads(2)
        for _ in range(2):
            model = LoneExperts(hidden=64, width=96).to(dtype)
            make_local_expert_parallel(model.experts, MoEConfig(**config))
            x = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
            x.requires_grad_()
            y = model(x, *random_routing(300, 3, 8))
            y.float().square().sum().backward()
            found.append([y, x.grad, *(param.grad for param in model.parameters())])
    finally:
        torch.set_num_threads(before)
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def initialized_on_rank(run: Run):
    model = build(run)
    initialize_experts(model, seed=3)
    weights = full_parameters(model)
    return from_rank0({name: w for name, w in weights.items() if ".experts." in name})


def initialized_from_meta(run: Run):
    with torch.device("meta"):
        model = tiny_mixtral(**run.model)
    mesh = init_device_mesh("cpu", run.ep, run.shard)
    apply_expert_parallel(model, mesh)
    initialize_experts(model, seed=3)  # the experts alone leave meta
    weights = {
        f"{name}.{key}": param.full_tensor()
        for name, experts in model.named_modules()
        if name.endswith(".experts")
        for key, param in experts.named_parameters(recurse=False)
    }
    return from_rank0(weights)


def test_initial_weights_do_not_depend_on_the_grid(ranks):
    runs = [
        Run("fsdp2", 1, 1), Run("fsdp2", 2, 2), Run("fsdp1", 4, 2), Run("fsdp2", 4, 2, 1),
        Run("fsdp2", 4, 4), Run("fsdp2", 8, 8), Run("fsdp2", 8, 2),
    ]  # fmt: skip
    found = [ranks(run.world).run(initialized_on_rank, run)[0] for run in runs]
    found += [ranks(run.world).run(initialized_from_meta, run)[0] for run in runs[1:5]]
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])
    weight = next(iter(found[0].values()))
    assert 0.019 < weight.std() < 0.021
    assert not torch.equal(weight[0], weight[1])
