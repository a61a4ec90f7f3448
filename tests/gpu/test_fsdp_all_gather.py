"""`set_fsdp_all_gather` on GPUs: the same bits by every way, and no NCCL all-gather kernel."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh as init_torch_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile

from torch_moe_ep import apply_expert_parallel, init_device_mesh, set_fsdp_all_gather
from torch_moe_ep.testing import RankPool, batch_of, share_the_gpu, tiny_mixtral
from torch_moe_ep.testing.parallel import from_rank0, full_gradients, wrap

from .cases import requires_gpu

pytestmark = requires_gpu

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs of one host")
TIMEOUT_S = 180.0


def gradients_by(kind: str | None, num_steps: int = 3):
    """What was set, gradients of a few steps, and the NCCL all-gathers of the last one."""
    torch.cuda.set_device(dist.get_rank())
    mesh = init_device_mesh("cuda", 1)
    model = tiny_mixtral().cuda()
    apply_expert_parallel(model, mesh)
    wrap(model, "fsdp2", mesh)
    found = "default" if kind is None else set_fsdp_all_gather(model, kind)
    batch = {name: value.cuda() for name, value in batch_of(dist.get_rank()).items()}
    for _ in range(num_steps - 1):
        model(**batch).loss.backward()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        model(**batch).loss.backward()
        torch.cuda.synchronize()
    kernels = [event.name for event in trace.events() if "AllGather" in event.name]
    return found, from_rank0(full_gradients(model)), len(kernels)


@needs_two
@pytest.mark.parametrize("kind", ["copy_engine", "auto"])
def test_copies_give_the_bits_of_nccl_without_its_kernels(gpu_ranks, kind):
    _, expected, num_nccl = gpu_ranks(2).run(gradients_by, None, timeout_s=TIMEOUT_S)[0]
    found, gradients, num_left = gpu_ranks(2).run(gradients_by, kind, timeout_s=TIMEOUT_S)[0]
    assert found in ("copy_engine", "nccl")
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name
    # What is left is not FSDP2's: the experts' gathers of counts have one rank here.
    assert num_nccl > 0
    assert num_left == 0


def gradients_in_zero_cta_groups(kind: str):
    """Of a model whose FSDP2 group was made with NCCL's zero-CTA policy; what was set."""
    torch.cuda.set_device(dist.get_rank())
    options = dist.ProcessGroupNCCL.Options()
    options.config.cta_policy = dist.ProcessGroupNCCL.NCCL_CTA_POLICY_ZERO
    mesh = init_torch_mesh(
        "cuda", (2,), mesh_dim_names=("fsdp",), backend_override={"fsdp": ("nccl", options)}
    )
    model = tiny_mixtral().cuda()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = "default" if kind == "default" else set_fsdp_all_gather(model, kind)
    batch = {name: value.cuda() for name, value in batch_of(dist.get_rank()).items()}
    for _ in range(2):
        model.zero_grad()
        model(**batch).loss.backward()
    return found, from_rank0(full_gradients(model))


@needs_two
@pytest.mark.parametrize("kind", ["nccl", "auto"])
def test_group_with_the_zero_cta_policy_gives_the_bits_of_one_without_choice(gpu_ranks, kind):
    _, expected = gpu_ranks(2).run(gradients_in_zero_cta_groups, "default", timeout_s=TIMEOUT_S)[0]
    found, gradients = gpu_ranks(2).run(gradients_in_zero_cta_groups, kind, timeout_s=TIMEOUT_S)[0]
    # Whether torch registers the memory so that NCCL takes no SM differs by version.
    assert found in {"nccl": ("nccl", "default"), "auto": ("nccl", "copy_engine")}[kind]
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name


def of_ranks_that_share_a_gpu() -> str:
    share_the_gpu()
    mesh = init_device_mesh("cuda", 1)
    model = tiny_mixtral().cuda()
    apply_expert_parallel(model, mesh)
    wrap(model, "fsdp2", mesh)
    return set_fsdp_all_gather(model, "copy_engine")


def test_ranks_that_share_a_gpu_keep_the_default():
    num_ranks = torch.cuda.device_count() + 1
    with RankPool(num_ranks, backend="nccl") as pool:
        kinds = pool.run(of_ranks_that_share_a_gpu, timeout_s=TIMEOUT_S)
    assert kinds == ["default"] * num_ranks
