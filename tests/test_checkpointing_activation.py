"""Activation checkpointing changes no bit.

Trap 11 (the second run of a checkpointed block routes differently).
"""

import pytest
import torch
from parallel_cases import UNEVEN, Run, backward, build
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh
from torch_moe_ep.testing import tiny_mixtral
from torch_moe_ep.testing.parallel import decoder_layers, from_rank0, full_gradients, wrap

WRAPPERS = {"wrapper": CheckpointImpl.NO_REENTRANT, "wrapper_reentrant": CheckpointImpl.REENTRANT}
HUGGING_FACE = {"hf": False, "hf_reentrant": True}


def checkpointed_gradients(run: Run, how: str, order: str):
    """Gradients with activation checkpointing put on before or after the data parallelism."""
    mesh = init_device_mesh("cpu", run.ep, run.shard)
    model = apply_expert_parallel(tiny_mixtral(**run.model), mesh, MoEConfig(**run.config))
    layer_class = type(decoder_layers(model)[0])

    def add_checkpointing(module):
        if how in HUGGING_FACE:
            options = {"use_reentrant": HUGGING_FACE[how]}
            inner = model
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            inner.train()
        elif how in WRAPPERS:
            apply_activation_checkpointing(
                module,
                checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, WRAPPERS[how]),
                check_fn=lambda m: type(m).__name__.endswith(layer_class.__name__),
            )

    if order == "before":
        add_checkpointing(model)
    wrapped = wrap(model, run.wrap, mesh)
    if order == "after":
        add_checkpointing(wrapped)
    for _ in range(2):
        wrapped.zero_grad()
        backward(run, wrapped)
    return from_rank0(full_gradients(wrapped))


@pytest.mark.parametrize(
    ("wrap_kind", "how", "order"),
    [
        ("fsdp2", "hf", "before"),
        ("fsdp2", "hf_reentrant", "before"),
        ("fsdp2", "wrapper", "before"),
        ("fsdp2", "wrapper", "after"),
        ("fsdp2", "wrapper_reentrant", "after"),
        ("fsdp1", "hf", "before"),
        ("fsdp1", "hf_reentrant", "after"),
        ("fsdp1", "wrapper", "after"),
        ("fsdp1", "wrapper", "before"),
        ("ddp", "hf", "before"),
        ("none", "hf", "before"),
        ("none", "hf_reentrant", "before"),
    ],
)
def test_trap_11_checkpointed_gradients_are_bit_equal(ranks, wrap_kind, how, order):
    run = Run(wrap_kind, 2, 2, model=UNEVEN)
    plain = ranks(2).run(checkpointed_gradients, run, "none", "before")[0]
    actual = ranks(2).run(checkpointed_gradients, run, how, order)[0]
    assert set(actual) == set(plain)
    assert [name for name in plain if not torch.equal(actual[name], plain[name])] == []


@pytest.mark.parametrize("how", ["hf", "hf_reentrant"])
def test_router_losses_keep_their_gradient_in_checkpointed_blocks(ranks, how):
    """Hugging Face's own auxiliary loss loses it in reentrant ones."""
    losses = {"routing": "aux_loss", "aux_loss_coeff": 0.5, "z_loss_coeff": 0.1}
    run = Run("fsdp2", 2, 2, model=UNEVEN, config=losses)
    plain = ranks(2).run(checkpointed_gradients, run, "none", "before")[0]
    actual = ranks(2).run(checkpointed_gradients, run, how, "before")[0]
    assert [name for name in plain if not torch.equal(actual[name], plain[name])] == []


def recomputed_ids(run: Run):
    """Expert ids that one rank's experts see, in call order, with a checkpointed block."""
    model = build(run)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    seen = []
    for layer in decoder_layers(model):
        layer.mlp.experts.register_forward_pre_hook(
            lambda module, args, layer=layer: seen.append((id(layer), args[1].clone()))
        )
    backward(run, model)
    by_layer: dict[int, list] = {}
    for key, ids in seen:
        by_layer.setdefault(key, []).append(ids)
    return [(len(ids), all(torch.equal(ids[0], other) for other in ids)) for ids in
            by_layer.values()]  # fmt: skip


def test_trap_11_recomputation_routes_alike(ranks):
    for layers in ranks(2).run(recomputed_ids, Run("fsdp2", 2, 2, model=UNEVEN)):
        assert layers == [(2, True), (2, True)]
