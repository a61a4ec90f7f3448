"""Experts follow the mixed precision of the FSDP around them."""

import pytest
import torch
import torch.distributed as dist
from parallel_cases import Run
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

from torch_moe_ep import apply_expert_parallel, init_device_mesh
from torch_moe_ep.parallel.state import iter_experts
from torch_moe_ep.testing import batch_of, relative_error, tiny_mixtral
from torch_moe_ep.testing.parallel import from_rank0, full_gradients, wrap
from torch_moe_ep.testing.reference import reference_gradients

BF16 = torch.bfloat16
POLICY = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)


def mixed_on_rank(kind: str, policy):
    """Dtypes of the gathered expert weights in forward and of their gradients; gradients."""
    mesh = init_device_mesh("cpu", 2)
    model = apply_expert_parallel(tiny_mixtral(), mesh, mp_policy=policy)
    options = {}
    if kind.startswith("fsdp1"):
        options["mixed_precision"] = MixedPrecision(BF16, torch.float32, torch.float32)
    seen = []
    for experts in iter_experts(model):
        experts.register_forward_pre_hook(
            lambda module, args: seen.append((module.gate_up_proj.dtype, args[0].dtype))
        )
    model = wrap(model, kind, mesh, mp_policy=POLICY, **options)
    model(**batch_of(dist.get_rank())).loss.backward()
    grads = {n: g for n, g in full_gradients(model).items() if ".experts." in n}
    return seen, from_rank0(grads)


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
@pytest.mark.parametrize(
    ("policy", "weights"),
    [("inherit", BF16), (POLICY, BF16), (None, torch.float32)],
    ids=["inherit", "explicit", "none"],
)
def test_expert_weights_are_gathered_in_the_policys_dtype(ranks, kind, policy, weights):
    seen, grads = ranks(2).run(mixed_on_rank, kind, policy)[0]
    assert seen == [(weights, BF16)] * 2
    _, exact = reference_gradients(tiny_mixtral, [batch_of(rank) for rank in range(2)])
    _, half = reference_gradients(
        lambda: tiny_mixtral().to(BF16), [batch_of(rank) for rank in range(2)]
    )
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        bound = 2 * relative_error(half[name].float(), exact[name])
        assert relative_error(grad, exact[name]) <= bound, name


def explicit_fp16_run(run: Run) -> bool:
    """Whether all ranks agree to skip after one rank's loss overflowed in fp16."""
    mesh = init_device_mesh("cpu", run.ep)
    model = wrap(apply_expert_parallel(tiny_mixtral(), mesh), run.wrap, mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loss = model(**batch_of(dist.get_rank())).loss
    if dist.get_rank() == 1:
        loss = loss * float("inf")
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() == 2.0


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
def test_trap_26_grad_scaler_skips_on_every_rank(ranks, kind):
    assert ranks(2).run(explicit_fp16_run, Run(kind, 2, 2)) == [True, True]


def overflow_in_one_shard(kind: str) -> tuple[float, bool]:
    """Loss scale after a step, and whether parameters moved, when one rank's shard overflowed."""
    run = Run(kind, 2, 2)
    mesh = init_device_mesh("cpu", run.ep)
    model = wrap(apply_expert_parallel(tiny_mixtral(), mesh), run.wrap, mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(**batch_of(dist.get_rank())).loss).backward()
    experts = next(iter_experts(model))
    before = experts.down_proj.to_local().clone()
    if dist.get_rank() == 1:  # after the reductions: rank 0 cannot see it by itself
        experts.down_proj.grad.to_local().view(-1)[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale(), torch.equal(experts.down_proj.to_local(), before)


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
def test_trap_26_grad_scaler_sees_an_infinity_of_another_ranks_experts(ranks, kind):
    assert ranks(2).run(overflow_in_one_shard, kind) == [(2.0, True)] * 2
