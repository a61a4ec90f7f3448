"""FSDP2's CPU offload: shards, gradients and step on the CPU, compute on the GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from torch_moe_ep import apply_expert_parallel, clip_grad_norm_, init_device_mesh
from torch_moe_ep.parallel.swap import local_slice
from torch_moe_ep.testing import RankPool, batch_of, relative_error, share_the_gpu, tiny_mixtral
from torch_moe_ep.testing.parallel import decoder_layers
from torch_moe_ep.testing.reference import reference_gradients

from .cases import requires_gpu
from .test_several_ranks import TIMEOUT_S

pytestmark = requires_gpu

MAX_NORM = 0.05
LEARNING_RATE = 0.5


def step_offloaded(world_size: int) -> tuple[float, float]:
    """Relative errors of the clipped norm and of the experts after one SGD step."""
    rank = share_the_gpu()
    policy = CPUOffloadPolicy()
    mesh = init_device_mesh("cuda", 2)
    model = apply_expert_parallel(tiny_mixtral(), mesh, offload_policy=policy)
    for layer in decoder_layers(model):
        fully_shard(layer, offload_policy=policy)
    fully_shard(model, offload_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    model(**{key: value.cuda() for key, value in batch_of(rank).items()}).loss.backward()
    norm = clip_grad_norm_(model, MAX_NORM)
    optimizer.step()

    _, grads = reference_gradients(tiny_mixtral, [batch_of(r) for r in range(world_size)])
    expected_norm = torch.cat([grad.flatten() for grad in grads.values()]).double().norm()
    scale = MAX_NORM / (expected_norm.item() + 1e-6)
    start = dict(tiny_mixtral().named_parameters())
    errors = []
    for name, experts in model.named_modules():
        state = experts.__dict__.get("expert_parallel_state")
        if state is None:
            continue
        for key, param in experts.named_parameters(recurse=False):
            full = start[f"{name}.{key}"] - LEARNING_RATE * scale * grads[f"{name}.{key}"]
            local = param.to_local()
            assert local.device.type == "cpu"
            errors.append(relative_error(local, local_slice(full.detach(), state)))
    assert errors
    return abs(norm.item() / expected_norm.item() - 1), max(errors)


def test_offloaded_experts_step_like_one_process(gpu_ranks: Callable[[int], RankPool]) -> None:
    for norm_error, weight_error in gpu_ranks(2).run(step_offloaded, 2, timeout_s=TIMEOUT_S):
        assert norm_error <= 1e-5
        assert weight_error <= 1e-5
