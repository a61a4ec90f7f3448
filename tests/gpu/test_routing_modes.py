"""Routing modes on the GPU give what they give on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh
from torch_moe_ep.metrics import RouterLosses, router_losses
from torch_moe_ep.testing import assert_close, batch_of, tiny_mixtral

from .cases import requires_gpu

pytestmark = requires_gpu

MODES = (
    {"routing": "none", "router_dtype": "float32", "z_loss_coeff": 0.01},
    {"routing": "aux_loss", "aux_loss_coeff": 0.1},
    {"routing": "sinkhorn"},
    {"routing": "balanced"},
    {"routing": "bias"},
    {"routing": "none", "capacity_factor": 1.0},
    {"routing": "none", "global_token_shuffle": True},
)


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(device: str, mode: dict[str, object]) -> tuple[dict[str, torch.Tensor], RouterLosses]:
    """Loss and gradients of one batch, and the router losses that metrics report."""
    model = tiny_mixtral(router_scale=20.0).to(device)
    apply_expert_parallel(model, init_device_mesh(device, 1), MoEConfig(**mode))
    model.train()
    loss = model(**{key: value.to(device) for key, value in batch_of(0).items()}).loss
    loss.backward()
    found = {"loss": loss.detach().cpu()}
    for name, param in model.named_parameters():
        grad = param.grad if param.grad is not None else torch.zeros_like(param)
        found[name] = getattr(grad, "full_tensor", lambda grad=grad: grad)().cpu()
    return found, router_losses(model)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values())))
def test_routing_mode_on_the_gpu_equals_the_cpu(mode: dict[str, object]) -> None:
    ours, our_losses = trained("cuda", mode)
    expected, losses = trained("cpu", mode)
    assert_close(ours, expected, 1e-5)
    for found, wanted in zip(our_losses, losses, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
