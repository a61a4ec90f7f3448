"""One table of parallel runs, and the rank function that runs one of them.

Letters: W ranks, P expert-parallel degree, S shard degree of the experts, K experts per token.
"""

import contextlib
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from node_cases import ranks_per_node
from torch import nn

import torch_moe_ep
from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh
from torch_moe_ep.testing import (
    LoneExperts,
    batch_of,
    random_routing,
    relative_error,
    tiny_mixtral,
)
from torch_moe_ep.testing.parallel import from_rank0, full_gradients, wrap
from torch_moe_ep.testing.reference import reference_gradients

UNEVEN = {"router_scale": 40.0}
AUX = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
TIED = {"tie_word_embeddings": True}


@dataclass(frozen=True)
class Run:
    """One parallel run; `shard` 0 means W / P, `model` are overrides of the tiny Mixtral.

    A parameter whose name has one of `frozen` as a part is not trained.
    """

    wrap: str
    world: int
    ep: int
    shard: int = 0
    model: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    frozen: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A pytest id."""
        shard = f"_s{self.shard}" if self.shard else ""
        label = f"_{self.label}" if self.label else ""
        return f"{self.wrap}_w{self.world}_p{self.ep}{shard}{label}"

    @property
    def scale(self) -> float:
        """Factor of expert gradients over the reference's."""
        return float(self.world) if self.config.get("gradient") == "sum" else 1.0

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name is trained."""
        return not any(part in name for part in self.frozen)


def build(run: Run, **apply_options: Any) -> nn.Module:
    """The patched and wrapped model of a run. Collective."""
    mesh = init_device_mesh("cpu", run.ep, run.shard)
    model = tiny_mixtral(**run.model)
    for name, param in model.named_parameters():
        param.requires_grad_(run.trains(name))
    apply_expert_parallel(model, mesh, MoEConfig(**run.config), **apply_options)
    return wrap(model, run.wrap, mesh, **run.options)


def backward(run: Run, model: nn.Module, step: int = 0, num_steps: int = 1) -> float:
    """Forward and backward of this rank's batches, dense gradients averaged; returns the loss.

    num_steps: batches whose gradients are added, from that of `step` on; losses likewise.
    """
    total = 0.0
    for number in range(step, step + num_steps):
        loss = model(**batch_of(dist.get_rank(), step=number)).loss
        loss.backward()
        total += loss.item()
    if run.wrap == "none":
        torch_moe_ep.average_gradients(model)
    return total


def gradients_on_rank(run: Run) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of this rank, and (rank 0) every parameter's full gradient."""
    model = build(run)
    loss = backward(run, model)
    return loss, from_rank0(full_gradients(model))


def freeze(overrides: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A hashable form of model overrides."""
    return tuple(sorted(overrides.items()))


def reference_of(run: Run, num_steps: int = 1) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradients of trained parameters of the reference run, added over the steps.

    Computed once per model, W and step.
    """
    steps = [_reference(freeze(run.model), run.world, step) for step in range(num_steps)]
    grads = {
        name: sum(grads[name] for _, grads in steps) * (run.scale if ".experts." in name else 1.0)
        for name in steps[0][1]
        if run.trains(name)
    }
    return sum(loss for loss, _ in steps), grads


@functools.cache
def _reference(
    overrides: tuple[tuple[str, Any], ...], world: int, step: int
) -> tuple[float, dict[str, torch.Tensor]]:
    batches = [batch_of(rank, step=step) for rank in range(world)]
    return reference_gradients(lambda: tiny_mixtral(**dict(overrides)), batches)


def bfloat16_errors(
    config: dict[str, Any], num_experts: int, top_k: int, per_node: int = 0
) -> list[tuple[float, float]]:
    """(ours, Hugging Face's) against fp32: output, x, router weights, both expert weights.

    Of one layer over all ranks; per_node: the ranks that play a node.
    """
    world, rank, tokens = dist.get_world_size(), dist.get_rank(), 40
    exact = LoneExperts(num_experts, 64, 128).bfloat16().float()
    theirs = LoneExperts(num_experts, 64, 128).bfloat16()
    theirs.experts.config._experts_implementation = "grouped_mm"
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(world * tokens, 64, generator=generator).bfloat16()
    upstream = torch.randn(world * tokens, 64, generator=generator).bfloat16()
    ids, weights = random_routing(world * tokens, top_k, num_experts)
    mine = slice(rank * tokens, (rank + 1) * tokens)

    def run(model: nn.Module, part: slice, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x[part].to(dtype).requires_grad_(), weights[part].clone().requires_grad_()]
        y = model(leaves[0], ids[part], leaves[1])
        y.backward(upstream[part].to(dtype))
        return [y, *(leaf.grad for leaf in leaves)]

    wanted = [part[mine] for part in run(exact, slice(None), torch.float32)]
    wanted += [param.grad for param in exact.parameters()]
    their = [part[mine] for part in run(theirs, slice(None), torch.bfloat16)]
    their += [param.grad for param in theirs.parameters()]
    model = LoneExperts(num_experts, 64, 128).bfloat16()
    with ranks_per_node(per_node) if per_node else contextlib.nullcontext():
        mesh = init_device_mesh("cpu", world)
        apply_expert_parallel(model, mesh, MoEConfig(**config, gradient="sum"))
    ours = run(model, mine, torch.bfloat16)
    ours += full_gradients(model).values()
    return [
        (relative_error(a.float(), c), relative_error(b.float(), c))
        for a, b, c in zip(ours, their, wanted, strict=True)
    ]


def kept_outputs(forward: Any, operator: Any) -> list[Any]:
    """What a selective checkpoint's first run keeps of an operator, call by call."""
    kept = forward.contexts[0].storage[operator]
    if isinstance(kept, dict):  # since torch 2.15; it marks what is computed again
        return [outputs for outputs in kept.values() if isinstance(outputs, tuple | list)]
    return kept
