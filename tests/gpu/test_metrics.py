"""The recorder on a GPU: no host sync in a step, and the same record as on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh
from torch_moe_ep.metrics import Recorder
from torch_moe_ep.testing import batch_of, tiny_mixtral

from .cases import requires_gpu

pytestmark = requires_gpu


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def recorded(device: str) -> list[dict]:
    """Three steps' records; on a GPU torch raises at any host sync of `Recorder.step`."""
    model = tiny_mixtral(router_scale=20.0).to(device)
    config = MoEConfig(routing="none", z_loss_coeff=0.01)
    apply_expert_parallel(model, init_device_mesh(device, 1), config)
    records: list[dict] = []
    recorder = Recorder(model, records.append)
    for step in range(3):
        batch = {key: value.to(device) for key, value in batch_of(0, step=step).items()}
        model(**batch).loss.backward()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            recorder.step(step)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    recorder.flush()
    return records


def test_recorder_step_on_the_gpu_never_waits_and_equals_the_cpu() -> None:
    found, wanted = recorded("cuda"), recorded("cpu")
    assert [record["step"] for record in found] == [0, 1, 2]
    for ours, theirs in zip(found, wanted, strict=True):
        for name, layer in theirs["layers"].items():
            assert ours["layers"][name]["tokens"] == layer["tokens"]
            for key in ("entropy", "z_loss", "imbalance"):
                assert ours["layers"][name][key] == pytest.approx(layer[key], rel=1e-4)
