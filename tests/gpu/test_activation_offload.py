"""Activations in pinned host memory: the same bits, and the memory is free after forward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from torch_moe_ep import apply_expert_parallel, init_device_mesh
from torch_moe_ep.memory import checkpoint_contexts, offload_activations
from torch_moe_ep.testing import batch_of, tiny_mixtral
from torch_moe_ep.testing.parallel import decoder_layers, plain_name

from .cases import requires_gpu

pytestmark = requires_gpu
SIZE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 6}


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(horizon: int | None, keep: str | None) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of the second step, and the bytes that its forward left on the GPU."""
    model = tiny_mixtral(**SIZE, max_position_embeddings=2048, attn_implementation="eager")
    model = apply_expert_parallel(model.to("cuda", torch.bfloat16), init_device_mesh("cuda", 1))
    if keep is not None:
        options = {"use_reentrant": False, "context_fn": checkpoint_contexts(keep)}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.train()
    if horizon is not None:
        layers = decoder_layers(model)
        offload_activations(model, lambda m: m in layers, horizon=horizon)
    batch = {name: value.cuda() for name, value in batch_of(0, tokens=4096, rows=16).items()}
    for _ in range(2):
        model.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = model(**batch).loss
        torch.cuda.synchronize()
        left = torch.cuda.memory_allocated() - before
        loss.backward()
    found = {plain_name(name): param.grad for name, param in model.named_parameters()}
    return {name: getattr(g, "full_tensor", lambda g=g: g)() for name, g in found.items()}, left


@pytest.mark.parametrize("keep", [None, "routing"])
def test_offloaded_step_has_the_same_bits_and_leaves_the_gpu_free(keep: str | None) -> None:
    plain, held = step(None, keep)
    logits = 4096 * 128 * 6  # bf16 and fp32, outside of the layers
    inputs = SIZE["num_hidden_layers"] * 4096 * SIZE["hidden_size"] * 2  # what routing keeps
    for horizon in (0, 1, 3):
        found, left = step(horizon, keep)
        assert [name for name in plain if not torch.equal(found[name], plain[name])] == []
        assert held - left >= inputs
        assert keep == "routing" or left - logits < (held - logits) / 3
