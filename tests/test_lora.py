"""LoRA of PEFT on attention, router and fused experts, against the unpatched PEFT model."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from torch_moe_ep import (
    apply_expert_parallel,
    average_gradients,
    clip_grad_norm_,
    export_hf,
    init_device_mesh,
    load_checkpoint,
    load_hf,
    save_checkpoint,
)
from torch_moe_ep.checkpoint.offline_export import export_stored
from torch_moe_ep.checkpoint.stored import StoredCheckpoint
from torch_moe_ep.integrations.peft import to_expert_major, to_peft_layout
from torch_moe_ep.testing import assert_close, batch_of, tiny_mixtral
from torch_moe_ep.testing.parallel import from_rank0, full_gradients, full_parameters, wrap

peft = pytest.importorskip("peft")
TOLERANCE = 1e-5
TARGETS = {
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["gate.weight", "experts.gate_up_proj", "experts.down_proj"],
}


# PEFT cannot adapt a router's weight under FSDP1: it is a view of a flat parameter there.
WITHOUT_ROUTER = {**TARGETS, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def targets_of(kind: str) -> dict[str, list[str]]:
    return WITHOUT_ROUTER if kind == "fsdp1" else TARGETS


def lora_mixtral(targets=TARGETS) -> nn.Module:
    """A tiny Mixtral with adapters whose B factors are not zero."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **targets)
    return peft.get_peft_model(tiny_mixtral(), config)


def trained(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapters' tensors, those of experts in PEFT's layout."""
    return {
        name: to_peft_layout(tensor, "lora_B" in name) if tensor.dim() == 3 else tensor
        for name, tensor in tensors.items()
        if "lora_" in name
    }


def patched(ep: int, kind: str, targets=TARGETS, shard: int = 0) -> nn.Module:
    mesh = init_device_mesh("cpu", ep, shard)
    return wrap(apply_expert_parallel(lora_mixtral(targets), mesh), kind, mesh)


def reference(targets) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, gradients and norm of one process that runs all batches."""
    model, world = lora_mixtral(targets), dist.get_world_size()
    total = 0.0
    for rank in range(world):
        loss = model(**batch_of(rank)).loss / world
        loss.backward()
        total += loss.item()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return total, grads, nn.utils.clip_grad_norm_(model.parameters(), 1e9)


def check_gradients(ep: int, kind: str, shard: int) -> None:
    targets = targets_of(kind)
    model = patched(ep, kind, targets, shard)
    loss = model(**batch_of(dist.get_rank())).loss
    loss.backward()
    if kind == "none":
        average_gradients(model)
    total, grads, norm = reference(targets)
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    assert abs(mean.item() / dist.get_world_size() - total) < 1e-5 * abs(total)
    ours = clip_grad_norm_(model, 1e9)
    assert abs(ours.item() - norm.item()) < 1e-5 * norm.item()
    found = trained(full_gradients(model))
    assert len(found) == (16 if kind == "fsdp1" else 20)  # q, v, router, gate_up, down; A and B
    assert_close(found, grads, TOLERANCE, f"gradients at P = {ep} under {kind}")
    from_rank0(found)


@pytest.mark.parametrize(
    ("world", "ep", "kind", "shard"),
    [
        (2, 2, "fsdp2", 0),
        (4, 2, "fsdp2", 0),
        (4, 2, "fsdp2", 1),  # two replicas of the experts
        (4, 4, "none", 0),
        (2, 2, "fsdp1", 0),
        (2, 2, "ddp", 0),
    ],
)
def test_gradients_equal_the_unpatched_model(ranks, world, ep, kind, shard):
    ranks(world).run(check_gradients, ep, kind, shard)


def check_sync() -> None:
    """Ranks that drew other factors than rank 0 take rank 0's, of the experts."""
    torch.manual_seed(3 + dist.get_rank())
    config = peft.LoraConfig(r=4, init_lora_weights=False, **WITHOUT_ROUTER)
    model = peft.get_peft_model(tiny_mixtral(), config)
    apply_expert_parallel(model, init_device_mesh("cpu", 2), sync_from_rank0=True)
    torch.manual_seed(3)
    wanted = peft.get_peft_model(tiny_mixtral(), config)
    found = trained(full_parameters(model))
    for name, param in wanted.named_parameters():
        if "lora_" in name and "experts" in name:
            assert torch.equal(found[name], param), name


def test_factors_come_from_rank_0_where_asked_for(ranks):
    ranks(2).run(check_sync)


def step(model: nn.Module, index: int = 0) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(**batch_of(dist.get_rank(), step=index)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch_of(0)["input_ids"]).logits


def check_files(folder: str) -> None:
    """Train, save in PEFT's format, load into the unpatched model and into a patched one."""
    model = patched(2, "fsdp2")
    step(model)
    model.save_pretrained(folder)
    expected = logits_of(model)
    plain = peft.PeftModel.from_pretrained(tiny_mixtral(), folder)
    assert_close({"logits": logits_of(plain)}, {"logits": expected}, TOLERANCE)
    shapes = {name: tuple(p.shape) for name, p in lora_mixtral().named_parameters()}
    assert {name: tuple(p.shape) for name, p in plain.named_parameters()} == shapes
    # From a full state dict, as Trainer passes it: the same file.
    options = torch.distributed.checkpoint.state_dict.StateDictOptions(full_state_dict=True)
    state = torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=options)
    model.save_pretrained(folder + "-again", state_dict=state)
    dist.barrier()
    files = [peft.load_peft_weights(path, device="cpu") for path in (folder, folder + "-again")]
    assert files[0].keys() == files[1].keys() and len(files[0]) == 20
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    # Back into a patched model, at another P.
    other = patched(1, "fsdp2")
    peft.set_peft_model_state_dict(other, files[0])
    assert_close({"logits": logits_of(other)}, {"logits": expected}, TOLERANCE)
    with other.disable_adapter():
        base = logits_of(other)
    assert_close({"logits": base}, {"logits": logits_of(tiny_mixtral())}, TOLERANCE)


def test_adapters_are_saved_and_loaded_in_pefts_format(ranks, tmp_path):
    ranks(2).run(check_files, str(tmp_path / "adapter"))


def check_base_load(folder: str) -> None:
    """`load_hf` fills the base model under the adapters."""
    other = lora_mixtral()
    with torch.no_grad():
        for name, param in other.named_parameters():
            if "lora_" not in name:
                param.zero_()
    mesh = init_device_mesh("cpu", 2)
    other = wrap(apply_expert_parallel(other, mesh), "fsdp2", mesh)
    load_hf(other, folder)
    assert_close({"logits": logits_of(other)}, {"logits": logits_of(lora_mixtral())}, TOLERANCE)


def test_base_weights_are_loaded_under_adapters(ranks, tmp_path):
    tiny_mixtral().save_pretrained(tmp_path)
    ranks(2).run(check_base_load, str(tmp_path))


def check_resume(folder: str) -> None:
    """A checkpoint of P = 2 under FSDP2 goes on at P = 1, under FSDP1 and without FSDP."""
    model = patched(2, "fsdp2", WITHOUT_ROUTER)
    step(model)
    save_checkpoint(folder, model)
    dist.barrier()
    with pytest.raises(ValueError, match="holds a model with adapters"):
        export_stored(StoredCheckpoint(Path(folder)), Path(folder), lambda _bytes: None)
    step(model, 1)
    wanted = trained(full_parameters(model))
    for ep, kind in ((1, "fsdp2"), (2, "fsdp1")):
        other = patched(ep, kind, WITHOUT_ROUTER)
        load_checkpoint(folder, other)
        step(other, 1)
        assert_close(trained(full_parameters(other)), wanted, 1e-6, f"P = {ep} under {kind}")


def test_adapters_resume_at_another_degree(ranks, tmp_path):
    ranks(2).run(check_resume, str(tmp_path / "checkpoint"))


def refusals_on_rank() -> dict[str, str]:
    mesh = init_device_mesh("cpu", 2)
    patched_model = apply_expert_parallel(tiny_mixtral(), mesh)
    with_lora = apply_expert_parallel(lora_mixtral(), mesh)
    inner = lora_mixtral().get_base_model()
    merged = lora_mixtral()
    merged.merge_adapter()
    attention = {"target_modules": ["q_proj"]}
    cases = {
        "call get_peft_model first, then": lambda: peft.get_peft_model(
            patched_model, peft.LoraConfig(**attention)
        ),
        "pass the PeftModel": lambda: apply_expert_parallel(inner, mesh),
        "has merged adapters": lambda: apply_expert_parallel(merged, mesh),
        "cannot be added, merged or removed": with_lora.merge_and_unload,
        "merge the adapters": lambda: export_hf(with_lora, "/nowhere"),
        "do not work under FSDP1": lambda: patched(2, "fsdp1")(**batch_of(0)),
    }
    messages = {}
    for words, call in cases.items():
        with pytest.raises(ValueError) as caught:
            call()
        messages[words] = str(caught.value)
    return messages


def test_what_adapters_cannot_do_is_refused(ranks):
    for messages in ranks(2).run(refusals_on_rank):
        for words, message in messages.items():
            assert words in message


def test_layouts_are_each_others_inverse():
    """PEFT reads B ``[out, r * E]`` as ``[out, r, E]``: the expert's index is innermost."""
    weight = torch.arange(6 * 3 * 4.0).view(6, 12)  # out = 6, r = 3, E = 4
    major = to_expert_major(weight, 4, is_b=True)
    assert major.shape == (4, 6, 3)
    assert major[2, 5, 1] == weight.view(6, 3, 4)[5, 1, 2]
    assert torch.equal(to_peft_layout(major, is_b=True), weight)
