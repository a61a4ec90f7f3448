"""Lone experts in chunks: inputs of a rank, and everything that one step gives."""

import dataclasses

import torch
import torch.distributed as dist
from gpu.cases import poisoned_memory

from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh, metrics, ops
from torch_moe_ep.testing import LoneExperts, random_routing
from torch_moe_ep.testing.parallel import full_gradients

NUM_EXPERTS = 8


@dataclasses.dataclass(frozen=True)
class Layer:
    """Sizes of lone experts, and how their tokens are routed: "spread", or "piled" on one expert
    by some ranks only."""

    hidden: int = 16
    width: int = 32
    top_k: int = 2
    routing: str = "spread"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    tokens_apart: int = 4

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states, ids, weights and upstream gradient of this rank; rank 1 has no token."""
        rank = dist.get_rank()
        tokens = 0 if rank == 1 else 9 + self.tokens_apart * rank
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(tokens, self.hidden, generator=generator).to(self.dtype)
        ids, weights = random_routing(tokens, self.top_k, NUM_EXPERTS, seed=rank)
        if self.routing == "piled" and rank % 2 == 0:
            ids = torch.arange(self.top_k).expand_as(ids).contiguous()
        upstream = torch.randn(x.shape, generator=generator).to(self.dtype)
        x, ids, weights, upstream = (it.to(self.device) for it in (x, ids, weights, upstream))
        return x.requires_grad_(), ids, weights.requires_grad_(), upstream

    def experts(self, ep: int, config: dict) -> torch.nn.Module:
        """Patched lone experts. Collective."""
        lone = LoneExperts(NUM_EXPERTS, self.hidden, self.width).to(self.device, self.dtype)
        return apply_expert_parallel(lone, init_device_mesh(self.device, ep), MoEConfig(**config))


def results_of_two_steps(layer: Layer, ep: int, config: dict) -> dict[str, torch.Tensor]:
    """Output, gradients and counted copies, with NaN in memory that nobody wrote.

    Two steps must agree in every bit.
    """
    model = layer.experts(ep, config)
    runs = []
    for _ in range(2):
        model.zero_grad()
        x, ids, weights, upstream = layer.inputs()
        with poisoned_memory():
            y = model(x, ids, weights)
            y.backward(upstream)
        runs.append({"y": y.detach(), "x": x.grad, "w": weights.grad, **full_gradients(model)})
    first, second = runs
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    found = {**first, "load": metrics.expert_load(model).tokens["experts"]}
    return {name: value.cpu() for name, value in found.items()}


def rows_of_chunks(
    tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    experts: tuple[torch.Tensor, torch.Tensor],
    num_chunks: int,
    row_alignment: int | None = None,
) -> dict[str, torch.Tensor]:
    """Rows, their weights and z of each chunk dispatched alone, in the order of all chunks:
    expert, chunk, source rank, token.

    tokens: hidden states, router weights and expert ids. Collective.
    """
    x, weights, ids = tokens
    group, num_tokens = dist.group.WORLD.group_name, ids.size(0)
    segments: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in range(experts[0].size(0))]
    for chunk in range(num_chunks):
        part = slice(chunk * num_tokens // num_chunks, (chunk + 1) * num_tokens // num_chunks)
        plan = ops.plan(ids[part], NUM_EXPERTS, group_name=group, row_alignment=row_alignment)
        found = ops.dispatch(x[part], weights[part], plan)
        offsets = plan.expert_offsets
        _, z = torch.ops.torch_moe_ep.expert_mlp_forward(
            *found, offsets, offsets.cpu(), *experts, 0
        )
        for expert, of_expert in enumerate(segments):
            rows = slice(*offsets[expert : expert + 2].tolist())
            of_expert.append(tuple(it[rows] for it in (*found, z)))
    whole = zip(*(segment for of_expert in segments for segment in of_expert), strict=True)
    return dict(zip(("rows", "row_weights", "z"), map(torch.cat, whole), strict=True))
