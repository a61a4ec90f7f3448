"""Memory during the step: selective checkpointing, routing fingerprints, activations on the host.

Trap 11 (the second run of a checkpointed block routes differently).
"""

import pytest
import torch
import torch.distributed as dist
from parallel_cases import UNEVEN, Run, backward, build
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import torch_moe_ep
from torch_moe_ep.memory import checkpoint_contexts, offload, offload_activations
from torch_moe_ep.memory.fingerprint import fingerprint
from torch_moe_ep.testing import batch_of
from torch_moe_ep.testing.parallel import decoder_layers, from_rank0, full_gradients

RUN = Run("fsdp2", 2, 2, model=UNEVEN)


def is_layer(module) -> bool:
    return type(module).__name__.endswith("DecoderLayer")


def add_checkpointing(model, how: str, keep: str | None) -> None:
    """Hugging Face's or torch's checkpointing; `keep` None: without our contexts."""
    options = {} if keep is None else {"context_fn": checkpoint_contexts(keep)}
    if how == "wrapper":
        apply_activation_checkpointing(
            model, checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, **options),
            check_fn=is_layer,
        )  # fmt: skip
    elif how != "none":
        inner = getattr(model, "module", model)
        settings = {"use_reentrant": how == "hf_reentrant", **options}
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        inner.train()


def exchanges_of_a_step(run: Run, model) -> int:
    """Exchanges of expert parallelism in one forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        backward(run, model)
    return sum(event.name == "gloo:all_to_all" for event in profile.events())


def checkpointed(run: Run, how: str, keep: str | None):
    model = build(run)
    add_checkpointing(model, how, keep)
    backward(run, model)
    model.zero_grad()
    num_exchanges = exchanges_of_a_step(run, model)
    return from_rank0(full_gradients(model)), num_exchanges


@pytest.mark.parametrize("how", ["hf", "wrapper"])
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "none"])
def test_selective_checkpoint_is_bit_equal_and_with_rows_sends_nothing_again(ranks, kind, how):
    run = Run(kind, 2, 2, model=UNEVEN)
    plain, once = ranks(2).run(checkpointed, run, "none", None)[0]
    _, all_again = ranks(2).run(checkpointed, run, how, None)[0]
    routing, rows_again = ranks(2).run(checkpointed, run, how, "routing")[0]
    rows, none_again = ranks(2).run(checkpointed, run, how, "rows")[0]
    for found in (routing, rows):
        assert set(found) == set(plain)
        assert [name for name in plain if not torch.equal(found[name], plain[name])] == []
    assert once > 0
    assert none_again == once
    assert once < rows_again <= all_again


def disturbed_ids(how: str, keep: str | None):
    """Expert ids of both runs of each block, when the router errs in the second one."""
    model = build(RUN)
    add_checkpointing(model, how, keep)
    seen: list[list[torch.Tensor]] = []
    for layer in decoder_layers(model):
        ids: list[torch.Tensor] = []
        seen.append(ids)
        layer.mlp.experts.register_forward_pre_hook(
            lambda _module, args, ids=ids: ids.append(args[1].clone())
        )
        layer.mlp.gate.register_forward_pre_hook(
            # The same operation in both runs, as torch 2.15 wants it.
            lambda _module, args, ids=ids: (args[0].roll(1 if ids else 0, -1),)
        )
    try:
        backward(RUN, model)
    except RuntimeError as error:
        return str(error)
    return [[torch.equal(ids[0], other) for other in ids] for ids in seen]


@pytest.mark.parametrize("keep", ["routing", "rows"])
def test_trap_11_selective_recomputation_cannot_route_again(ranks, keep):
    for layers in ranks(2).run(disturbed_ids, "hf", keep):
        assert layers == [[True, True], [True, True]]


def test_trap_11_reentrant_recomputation_that_routes_differently_raises(ranks):
    for message in ranks(2).run(disturbed_ids, "hf_reentrant", None):
        assert "model.layers.1.mlp.experts routed differently when activation" in message
        assert "context_fn=torch_moe_ep.memory.checkpoint_contexts()" in message


def scored_then_trained(how: str):
    """A run without gradients in training mode is no first run of a checkpoint."""
    model = build(Run("none", 2, 2, model=UNEVEN))
    add_checkpointing(model, how, None)
    model.train()
    with torch.no_grad():
        model(**batch_of(dist.get_rank(), step=7))
    losses = [model(**batch_of(dist.get_rank(), step=step)).loss for step in (0, 1, 2)]
    for loss in losses:  # three micro-batches in flight, the first one first
        loss.backward()
    torch_moe_ep.average_gradients(model)
    return from_rank0(full_gradients(model))


def test_fingerprints_do_not_mistake_runs_without_gradients(ranks):
    plain = ranks(2).run(scored_then_trained, "none")[0]
    for how in ("hf", "hf_reentrant"):
        found = ranks(2).run(scored_then_trained, how)[0]
        assert [name for name in plain if not torch.equal(found[name], plain[name])] == []


def test_fingerprint_tells_swapped_tokens_and_changed_ids():
    ids = torch.randint(0, 8, (500, 2), generator=torch.Generator().manual_seed(0))
    base = int(fingerprint(ids))
    assert int(fingerprint(ids.clone())) == base
    assert int(fingerprint(torch.zeros(0, 2, dtype=torch.int64))) == 0
    others = set()
    for row in range(499):
        other = ids.clone()
        other[[row, row + 1]] = other[[row + 1, row]]
        if not torch.equal(other, ids):
            others.add(int(fingerprint(other)))
        changed = ids.clone()
        changed[row, 0] = (changed[row, 0] + 1) % 8
        others.add(int(fingerprint(changed)))
    assert base not in others
    assert len(others) > 900


def test_another_word_for_what_is_kept_is_refused():
    with pytest.raises(ValueError, match='keep must be "routing" or "rows", got \'all\''):
        checkpoint_contexts("all")


def offloaded(run: Run, how: str, horizon: int, as_on_gpu: bool):
    """Gradients, frames in the order in which they were loaded, shapes that were moved, names."""
    model = build(run)
    add_checkpointing(model, how, None)
    loads: list[int] = []
    shapes: set[tuple[int, ...]] = set()
    with pytest.MonkeyPatch.context() as patch:
        if as_on_gpu:
            patch.setattr(offload, "_is_on_device", lambda _tensor: True)
        load, pack = offload.Frame.load, offload.Packed.__init__

        def watched_load(frame):
            loads.append(next(i for i, ref in enumerate(frame.line.frames) if ref() is frame))
            load(frame)

        def watched_pack(packed, frame, tensor):
            shapes.add(tuple(tensor.shape))
            pack(packed, frame, tensor)

        patch.setattr(offload.Frame, "load", watched_load)
        patch.setattr(offload.Packed, "__init__", watched_pack)
        names = dict.fromkeys(model.state_dict())
        offload_activations(model, is_layer, horizon=horizon, min_bytes=0)
        assert dict.fromkeys(model.state_dict()) == names
        backward(run, model)
        model.zero_grad()
        loads.clear()
        backward(run, model)
    return from_rank0(full_gradients(model)), loads, shapes


@pytest.mark.parametrize(
    ("kind", "how"), [("fsdp2", "none"), ("fsdp2", "hf"), ("fsdp2", "hf_reentrant"),
                      ("fsdp1", "hf"), ("none", "none")],
)  # fmt: skip
@pytest.mark.parametrize("horizon", [0, 2])
def test_offloaded_activations_are_bit_equal(ranks, kind, how, horizon):
    run = Run(kind, 2, 2, model={**UNEVEN, "num_hidden_layers": 4})
    plain = ranks(2).run(checkpointed, run, "none", None)[0][0]
    found, loads, shapes = ranks(2).run(offloaded, run, how, horizon, True)[0]
    assert [name for name in plain if not torch.equal(found[name], plain[name])] == []
    expected = [3, 2, 1, 0] if horizon == 0 else [3, 2, 1, 2, 1, 0, 1, 0, 0]
    assert loads == expected
    hidden = (2, 12, 64)
    assert hidden in shapes
    assert shapes == {hidden} if how != "none" else len(shapes) > 3
    assert (4, 256, 64) not in shapes and (4, 64, 128) not in shapes  # experts' weights
    assert (64, 64) not in shapes  # attention's


def test_offload_on_the_cpu_moves_nothing(ranks):
    plain = ranks(2).run(checkpointed, RUN, "none", None)[0][0]
    found, _, shapes = ranks(2).run(offloaded, RUN, "none", 1, False)[0]
    assert shapes == set()
    assert [name for name in plain if not torch.equal(found[name], plain[name])] == []


def test_retained_graph_loads_again(monkeypatch):
    monkeypatch.setattr(offload, "_is_on_device", lambda _tensor: True)
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    model = torch.nn.Sequential(layer)
    x = torch.randn(3, 4, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    offload_activations(model, lambda module: module is layer, min_bytes=0)
    loss = model(x).square().sum()
    for retain in (True, False):
        assert torch.equal(torch.autograd.grad(loss, x, retain_graph=retain)[0], expected)


def test_offload_that_finds_no_module_or_a_negative_number_is_refused():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="chose no module of a Linear"):
        torch_moe_ep.memory.offload_activations(model, lambda _module: False)
    with pytest.raises(ValueError, match="must be at least 0, got -1"):
        offload_activations(model, lambda _module: True, horizon=-1)
