"""Ways to start: meta device, weights from rank 0, frozen experts, every layer's class kept."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from parallel_cases import Run, backward, build, reference_of
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from torch_moe_ep import apply_expert_parallel, init_device_mesh
from torch_moe_ep.parallel import initialize_experts
from torch_moe_ep.parallel.state import iter_experts
from torch_moe_ep.testing import assert_close, batch_of, tiny_mixtral
from torch_moe_ep.testing.parallel import from_rank0, full_gradients, full_parameters, wrap


def synced_gradients(run: Run, others: str):
    """Only rank 0 holds the right experts; the others random ones, or meta tensors."""
    model = tiny_mixtral(**run.model)
    if dist.get_rank() != 0:
        for layer in model.model.layers:
            if others == "meta":
                layer.mlp.experts.to("meta")
            else:
                torch.nn.init.normal_(layer.mlp.experts.gate_up_proj)
                torch.nn.init.normal_(layer.mlp.experts.down_proj)
    mesh = init_device_mesh("cpu", run.ep)
    model = apply_expert_parallel(model, mesh, sync_from_rank0=True)
    model = wrap(model, run.wrap, mesh)
    model(**batch_of(dist.get_rank())).loss.backward()
    return from_rank0(full_gradients(model))


@pytest.mark.parametrize("others", ["random", "meta"])
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_sync_from_rank0_gives_every_rank_its_slice(ranks, kind, others):
    run = Run(kind, 4, 2)
    grads = ranks(4).run(synced_gradients, run, others)[0]
    assert_close(grads, reference_of(run)[1], 1e-5)


def warnings_of_weights(seed: int, is_synced: bool) -> list[str]:
    """Messages of the patch on one rank; `is_synced` takes rank 0's experts."""
    model = tiny_mixtral()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.startswith("model.layers.1.mlp.experts"):
                param.add_(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        apply_expert_parallel(model, init_device_mesh("cpu", 2), sync_from_rank0=is_synced)
    return [str(w.message) for w in caught if "different weights" in str(w.message)]


def test_ranks_with_different_weights_are_warned_of_on_rank_0(ranks):
    said = ranks(4).run(warnings_of_weights, False, arg_of_rank=[0, 0, 7, 8])
    assert said[1:] == [[], [], []] and len(said[0]) == 1
    assert "ranks 0 and 2 hold different weights" in said[0][0]
    assert "model.layers.1.mlp.experts.gate_up_proj" in said[0][0]
    for seeds, is_synced in (([0] * 4, False), ([0, 1, 2, 3], True)):
        assert ranks(4).run(warnings_of_weights, is_synced, arg_of_rank=seeds) == [[]] * 4


def from_meta(run: Run):
    """A model built on meta, materialised after fully_shard, loaded from a full state dict."""
    full = tiny_mixtral(**run.model).state_dict()
    with torch.device("meta"):
        model = tiny_mixtral(**run.model)
    mesh = init_device_mesh("cpu", run.ep)
    model = wrap(apply_expert_parallel(model, mesh), "fsdp2", mesh)
    with pytest.raises(RuntimeError, match="meta device"):  # FSDP2 looks before our guard can
        model(**batch_of(0))
    model.to_empty(device="cpu")
    initialize_experts(model)
    options = torch.distributed.checkpoint.state_dict.StateDictOptions(full_state_dict=True)
    torch.distributed.checkpoint.state_dict.set_model_state_dict(
        model,
        dict(full),
        options=options,
    )
    loaded = full_parameters(model)
    return [name for name in loaded if not torch.equal(loaded[name], full[name])]


def test_meta_model_takes_a_full_state_dict(ranks):
    assert ranks(4).run(from_meta, Run("fsdp2", 4, 2))[0] == []


def frozen_gradients(run: Run):
    model = build(run)
    backward(run, model)
    assert all(p.grad is None for e in iter_experts(model) for p in e.parameters())
    return from_rank0(full_gradients(model))


def test_frozen_experts_pass_gradients_on(ranks):
    run = Run("fsdp2", 2, 2, frozen=(".experts.",))
    assert_close(ranks(2).run(frozen_gradients, run)[0], reference_of(run)[1], 1e-5)


def identity_on_rank():
    """What stays of the module: its class as a base, names, signature of forward."""
    import inspect

    model = tiny_mixtral()
    names = list(model.state_dict())
    signature = inspect.signature(model.forward)
    experts = model.model.layers[0].mlp.experts
    apply_expert_parallel(model, init_device_mesh("cpu", 2))
    assert model.model.layers[0].mlp.experts is experts
    assert isinstance(experts, MixtralExperts)
    assert list(model.state_dict()) == names
    assert inspect.signature(model.forward) == signature
    unbound = list(inspect.signature(model.forward.__func__).parameters)
    assert unbound == ["self", *signature.parameters]  # what TRL and accelerate look at
    assert model.forward.__self__ is model
    assert experts.gate_up_proj.shape == (8, 256, 64)
    with pytest.raises(AssertionError):
        copy.deepcopy(model)


def test_patched_module_keeps_class_names_and_signature(ranks):
    ranks(2).run(identity_on_rank)
