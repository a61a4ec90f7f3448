"""Options that no other test puts together: models, wrappers, grids, configurations at random.

A run's number draws it, so that a failure comes again. Gradients are those of one process.
"""

import contextlib
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from node_cases import ranks_per_node
from parallel_cases import AUX, TIED, Run, backward, build, reference_of

from torch_moe_ep.memory import checkpoint_contexts
from torch_moe_ep.testing import assert_close
from torch_moe_ep.testing.parallel import from_rank0, full_gradients

TOLERANCE = 3e-5  # single tests have 1e-5; a sharp router on top of other options is worse off
NUM_RUNS, NUM_FULL_RUNS = 16, 200
CHECKPOINTING: dict[str, dict[str, Any]] = {
    "hf": {"use_reentrant": False},
    "hf_reentrant": {"use_reentrant": True},
    "rows": {"use_reentrant": False, "context_fn": checkpoint_contexts("rows")},
    "routing": {"use_reentrant": False, "context_fn": checkpoint_contexts("routing")},
}
DENSE = ("self_attn", "embed", "norm", "lm_head")
FROZEN = {
    "experts": (".experts.",),
    "experts of one layer": ("layers.1.mlp.experts.",),
    "router": (".gate.",),
    "attention": ("self_attn",),
    "one layer": ("layers.0.",),
    "dense": DENSE,
    "all but the router": (*DENSE, ".experts."),
}


@dataclass(frozen=True)
class Drawn:
    """A run, its activation checkpointing, batches a gradient."""

    run: Run
    checkpointing: str
    num_steps: int

    def __str__(self) -> str:
        """All of it, for a failure."""
        return (
            f"{self.run}, {self.run.model}, {self.run.config}, checkpointing "
            f"{self.checkpointing}, frozen {self.run.frozen}, {self.num_steps} batches"
        )


def draw_model(rng: random.Random, ep: int) -> dict[str, Any]:
    experts = rng.choice([count for count in (4, 6, 8, 12, 16) if count % ep == 0])
    top_k = rng.choice([1, 2, 3, experts - 1])
    model: dict[str, Any] = {"num_local_experts": experts, "num_experts_per_tok": top_k}
    model["router_scale"] = rng.choice([1.0, 10.0, 40.0])
    if rng.random() < 0.3 or top_k == 1:  # one normalised weight alone is 1, without a gradient
        model.update(AUX)
    if rng.random() < 0.2:
        model.update(TIED)
    return model


def draw_config(rng: random.Random, ep: int, has_aux: bool) -> dict[str, Any]:
    drawn = {
        "recompute": rng.choice(["none", "gate_up"]),
        "max_slots": rng.choice([0, 0, 1, 8, 64]),
        "received_rows": rng.choice(["auto", "keep"]),
        "gradient": rng.choice(["mean", "mean", "sum"]),
        "router_dtype": rng.choice([None, None, "float32"]),
        # Hugging Face's auxiliary loss of tokens that were mixed is another one.
        "global_token_shuffle": not has_aux and rng.random() < 0.3,
    }
    if rng.random() < 0.2:
        drawn["max_received_rows"] = 20_000  # never reached
    travel = rng.choice(["plain", "chunks", "all_gather", "nodes" if ep == 4 else "plain"])
    if travel == "chunks":
        drawn["num_chunks"] = rng.choice([2, 3, 40])
    elif travel == "all_gather":
        drawn["dispatcher"] = "all_gather"
    elif travel == "nodes":
        drawn["transport"] = "hierarchical"
    if travel != "chunks" and rng.random() < 0.25:
        drawn["received_rows"] = "dispatch_again"
    return drawn


def draw(number: int) -> Drawn:
    rng = random.Random(number)
    world = rng.choice([1, 2, 3, 4, 4])
    ep = rng.choice([degree for degree in (1, 2, 3, 4) if world % degree == 0])
    wraps = ["fsdp2", "fsdp1", "none", "fsdp1_grad_op", "fsdp1_no_shard"]
    wraps += ["ddp"] * (world > 1) + ["hsdp2"] * (world % 2 == 0)
    wraps += ["fsdp1_hybrid", "fsdp1_hybrid_zero2"] * (world == 4)
    wrap = rng.choice(wraps)
    shards = [degree for degree in (1, 2, 4) if (world // ep) % degree == 0]
    shard = rng.choice([0, *shards]) if wrap in ("fsdp2", "hsdp2") else 0
    model = draw_model(rng, ep)
    has_aux = "output_router_logits" in model
    config = draw_config(rng, ep, has_aux)
    # Reentrant checkpointing takes the auxiliary loss's gradient from Hugging Face's router.
    reentrant = ["hf_reentrant"] * (not has_aux)
    checkpointing = rng.choice(["none", "none", "none", "hf", "rows", "routing", *reentrant])
    frozen = FROZEN[rng.choice(list(FROZEN))] if rng.random() < 0.4 else ()
    if wrap.startswith("fsdp1") and "tie_word_embeddings" in model and "embed" in frozen:
        frozen = ()  # torch's own FSDP1 refuses tied weights in a root unit that is frozen
    run = Run(wrap, world, ep, shard, model, config, frozen=frozen)
    return Drawn(run, checkpointing, num_steps=rng.choice([1, 1, 2]))


def gradients_of(drawn: Drawn) -> tuple[float, dict[str, torch.Tensor]]:
    has_nodes = drawn.run.config.get("transport") == "hierarchical"
    with ranks_per_node(2) if has_nodes else contextlib.nullcontext():
        model = build(drawn.run)
    if drawn.checkpointing != "none":
        inner = model
        while not hasattr(inner, "gradient_checkpointing_enable"):
            inner = inner.module
        inner.gradient_checkpointing_enable(CHECKPOINTING[drawn.checkpointing])
        if drawn.checkpointing == "hf_reentrant" and drawn.run.frozen:
            inner.enable_input_require_grads()  # where the embedding is frozen
        inner.train()
    loss = backward(drawn.run, model, num_steps=drawn.num_steps)
    return loss, from_rank0(full_gradients(model))


@pytest.mark.parametrize(
    "number",
    [
        *range(NUM_RUNS),
        *(pytest.param(n, marks=pytest.mark.full) for n in range(NUM_RUNS, NUM_FULL_RUNS)),
    ],
)
def test_gradients_of_options_put_together_at_random(ranks, number):
    drawn = draw(number)
    shown = f"run {number}: {drawn}"
    results = ranks(drawn.run.world).run(gradients_of, drawn)
    loss, gradients = reference_of(drawn.run, drawn.num_steps)
    mean = sum(found for found, _ in results) / drawn.run.world
    assert abs(mean - loss) <= TOLERANCE * abs(loss), shown
    assert_close(results[0][1], gradients, TOLERANCE, shown)
