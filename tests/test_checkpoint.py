"""Saving, loading and exporting.

Trap 13 (a checkpoint loses, duplicates or reorders experts): every expert carries its id in its
weights, 12 experts, so that "experts.10" sorts before "experts.2" if anybody sorts.
"""

import os
import warnings
from pathlib import Path

import pytest
import torch
from parallel_cases import Run, backward, build
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FullStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from transformers import MixtralForCausalLM
from transformers.utils import logging

import torch_moe_ep
from torch_moe_ep import apply_expert_parallel, init_device_mesh
from torch_moe_ep.checkpoint.hub_writer import save_config
from torch_moe_ep.checkpoint.weights import inner_model
from torch_moe_ep.testing import tiny_mixtral
from torch_moe_ep.testing.parallel import from_rank0, full_parameters, wrap

TWELVE = {"num_local_experts": 12, "num_experts_per_tok": 3, "intermediate_size": 32}


def tagged_mixtral(**overrides):
    """Layer l, expert e: every element of its weights is 100 l + e, plus 0.5 in down_proj."""
    model = tiny_mixtral(**overrides)
    with torch.no_grad():
        for place, layer in enumerate(model.model.layers):
            tags = 100 * place + torch.arange(12.0).view(12, 1, 1)
            layer.mlp.experts.gate_up_proj.copy_(tags.expand_as(layer.mlp.experts.gate_up_proj))
            layer.mlp.experts.down_proj.copy_(tags.expand_as(layer.mlp.experts.down_proj) + 0.5)
    return model


def tagged_build(run: Run):
    mesh = init_device_mesh("cpu", run.ep, run.shard)
    return wrap(apply_expert_parallel(tagged_mixtral(**run.model), mesh), run.wrap, mesh)


def save_tagged(run: Run, folder: str) -> None:
    torch_moe_ep.save_checkpoint(f"{folder}/tagged", tagged_build(run), step=3)
    torch_moe_ep.export_hf(tagged_build(run), f"{folder}/hf")


def load_tagged(run: Run, folder: str):
    model = build(run)
    step = torch_moe_ep.load_checkpoint(f"{folder}/tagged", model)
    return step, from_rank0(full_parameters(model))


@pytest.mark.parametrize("save_wrap", ["fsdp2", "fsdp1"])
@pytest.mark.parametrize("save_ep", [1, 2, 4])
def test_trap_13_experts_are_saved_once_and_load_at_every_p(ranks, tmp_path, save_wrap, save_ep):
    ranks(4).run(save_tagged, Run(save_wrap, 4, save_ep, model=TWELVE), str(tmp_path))
    expected = dict(tagged_mixtral(**TWELVE).named_parameters())
    exported = MixtralForCausalLM.from_pretrained(tmp_path / "hf")
    for name, param in exported.named_parameters():
        assert torch.equal(param, expected[name]), name
    for load_ep in (1, 2, 4):
        run = Run(save_wrap, 4, load_ep, model=TWELVE)
        step, loaded = ranks(4).run(load_tagged, run, str(tmp_path))[0]
        assert step == 3
        for name, param in expected.items():
            assert torch.equal(loaded[name], param), f"{name} at P = {load_ep}"


def load_plain_on_rank(run: Run):
    """Parameters after loading a plain full state dict, as Hugging Face and torch.load give it."""
    model = build(run)
    plain = tagged_mixtral(**run.model).state_dict()
    if isinstance(model, FSDP1):
        with FSDP1.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
            model.load_state_dict(plain)
    elif run.wrap == "fsdp2":
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, plain, options=options)
    else:
        model.load_state_dict(plain)
    return from_rank0(full_parameters(model))


@pytest.mark.parametrize("load_wrap", ["fsdp2", "fsdp1", "none"])
@pytest.mark.parametrize("load_ep", [1, 2, 4])
def test_trap_13_plain_full_state_dict_loads_at_every_p(ranks, load_wrap, load_ep):
    run = Run(load_wrap, 4, load_ep, model=TWELVE)
    loaded = ranks(4).run(load_plain_on_rank, run)[0]
    for name, param in tagged_mixtral(**TWELVE).named_parameters():
        assert torch.equal(loaded[name], param), f"{name} at P = {load_ep}"


def refuse_without_wrapper(run: Run, folder: str) -> list[str]:
    """What saving and loading say of the model inside its wrapper; both take the wrapper."""
    wrapped = build(run)
    model = inner_model(wrapped)
    said = []
    for call in (torch_moe_ep.save_checkpoint, torch_moe_ep.load_checkpoint):
        with pytest.raises(ValueError, match="inside FullyShardedDataParallel") as caught:
            call(f"{folder}/{run}", model)
        assert not Path(folder, str(run)).exists()
        said.append(str(caught.value))
    torch_moe_ep.save_checkpoint(f"{folder}/{run}", wrapped, step=5)
    assert torch_moe_ep.load_checkpoint(f"{folder}/{run}", wrapped) == 5
    return said


def test_model_without_its_fsdp1_wrapper_is_refused(ranks, tmp_path):
    said = ranks(2).run(refuse_without_wrapper, Run("fsdp1", 2, 2), str(tmp_path))
    assert "pass the wrapper" in said[0][0]
    assert said[0] == said[1]


def refuse_misfits(folder: str) -> list[str]:
    """What `load_checkpoint` says to another model, another optimizer and swapped arguments."""
    run = Run("fsdp2", 2, 2)
    model = build(run)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch_moe_ep.save_checkpoint(folder, model, sgd)
    wider = build(Run("fsdp2", 2, 2, model={"vocab_size": 512}))
    before = full_parameters(wider)
    attempts = (
        lambda: torch_moe_ep.load_checkpoint(folder, wider),
        lambda: torch_moe_ep.load_checkpoint(folder, model, torch.optim.AdamW(model.parameters())),
        lambda: torch_moe_ep.load_checkpoint(model, folder),
        lambda: torch_moe_ep.save_checkpoint(model, folder),
        lambda: torch_moe_ep.export_hf(folder, model),
        lambda: torch_moe_ep.load_hf(folder, model),
    )
    said = []
    for attempt in attempts:
        with pytest.raises(ValueError) as caught:
            attempt()
        said.append(str(caught.value))
    after = full_parameters(wider)
    assert all(torch.equal(before[name], after[name]) for name in before)
    return said


def test_checkpoint_that_does_not_fit_is_refused_in_a_sentence_on_every_rank(ranks, tmp_path):
    folder = str(tmp_path / "step-1")
    said, other = ranks(2).run(refuse_misfits, folder)
    assert said == other
    assert f"{folder} does not fit" in said[0] and "Size mismatch" in said[0]
    assert "embed_tokens" in said[0] and f"its config is in {folder}/hf" in said[0]
    assert "Missing key" in said[1] and "Traceback" not in said[0] + said[1]
    assert all("model must be a torch.nn.Module, got str" in words for words in said[2:])


def test_save_writes_no_progress_bar_for_a_config_and_leaves_the_users_on(capfd, tmp_path):
    save_config(tiny_mixtral(), tmp_path)
    assert (tmp_path / "config.json").is_file() and "0it" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()


def refuse_different_names(rank: int, folder: str) -> str:
    """The same on two nodes, as torchrun numbers them."""
    os.environ["GROUP_RANK"] = str(rank)
    try:
        with pytest.raises(ValueError) as caught:
            torch_moe_ep.save_checkpoint(
                f"{folder}/node{rank}/at-{rank}", build(Run("fsdp2", 2, 2))
            )
    finally:
        del os.environ["GROUP_RANK"]
    return str(caught.value)


def test_nodes_that_save_to_folders_of_different_names_are_refused(ranks, tmp_path):
    """Their parents may differ: see tests/test_launch.py."""
    said, other = ranks(2).run(refuse_different_names, str(tmp_path), arg_of_rank=[0, 1])
    assert said == other
    assert "ranks 0 and 1 differ in the folder's name: at-0 and at-1; make" in said
    assert list(tmp_path.iterdir()) == []


def refuse_different_calls(rank: int, folder: str) -> list[str]:
    """What `save_checkpoint` says where ranks name different folders, steps or optimizers."""
    model = build(Run("fsdp2", 2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attempts = (
        {"path": f"{folder}/at-{rank}", "step": 1},
        {"path": f"{folder}/step-1", "step": rank},
        {"path": f"{folder}/step-1", "optimizer": optimizer if rank else None},
    )
    said = []
    for arguments in attempts:
        with pytest.raises(ValueError) as caught:
            torch_moe_ep.save_checkpoint(model=model, **arguments)
        said.append(str(caught.value))
    return said


def test_ranks_that_save_to_different_folders_are_refused_before_anything_is_written(
    ranks, tmp_path
):
    folder = str(tmp_path)
    said, other = ranks(2).run(refuse_different_calls, folder, arg_of_rank=[0, 1])
    assert said == other
    assert f"ranks 0 and 1 differ in path: {folder}/at-0 and {folder}/at-1; make" in said[0]
    assert "differ in step: 0 and 1" in said[1]
    assert "differ in optimizer: no optimizer and SGD" in said[2]
    assert list(tmp_path.iterdir()) == []


def warnings_of_a_save(folder: str) -> list[str]:
    """Messages while an FSDP1 model is saved and loaded."""
    model = build(Run("fsdp1", 2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch_moe_ep.save_checkpoint(folder, model, optimizer)
        torch_moe_ep.load_checkpoint(folder, model, optimizer)
    return [str(w.message) for w in caught if "ShardedTensor" in str(w.message)]


def test_save_and_load_under_fsdp1_leave_out_torchs_warnings_about_itself(ranks, tmp_path):
    assert ranks(2).run(warnings_of_a_save, str(tmp_path / "step-1")) == [[], []]


def resumed_on_rank(run: Run, folder: str):
    """Three steps; and one step, a save, a load into a fresh model, two steps."""
    path = f"{folder}/{run}"

    def make():
        model = build(run)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)

    def train(model, optimizer, steps):
        for step in steps:
            backward(run, model, step)
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = make()
    train(model, optimizer, range(1))
    torch_moe_ep.save_checkpoint(path, model, optimizer, step=1)
    train(model, optimizer, range(1, 3))
    straight = full_parameters(model)
    model, optimizer = make()
    assert torch_moe_ep.load_checkpoint(path, model, optimizer) == 1
    train(model, optimizer, range(1, 3))
    resumed = full_parameters(model)
    return [name for name in straight if not torch.equal(straight[name], resumed[name])]


@pytest.mark.parametrize(
    "run",
    [Run("fsdp2", 4, 2), Run("fsdp2", 2, 2), Run("fsdp1", 2, 2), Run("none", 2, 2),
     Run("ddp", 2, 2), Run("hsdp2", 4, 2, 1)],
    ids=str,
)  # fmt: skip
def test_resumed_training_is_bit_equal(ranks, tmp_path, run):
    assert ranks(run.world).run(resumed_on_rank, run, str(tmp_path))[0] == []


def full_state_dicts(run: Run):
    """FSDP1's own full state dict and torch's, compared with the model's weights; then loaded."""
    model = build(run)
    expected = dict(tiny_mixtral(**run.model).state_dict())
    options = StateDictOptions(full_state_dict=True)
    found = [get_model_state_dict(model, options=options)]
    if isinstance(model, FSDP1):
        with FSDP1.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
            found.append(model.state_dict())
    for state in found:
        assert set(state) == set(expected)
        for name, value in state.items():
            assert type(value) is torch.Tensor, f"{name} is a {type(value).__name__}"
            assert torch.equal(value, expected[name]), name
    other = tiny_mixtral(seed=1, **run.model).state_dict()
    if isinstance(model, FSDP1):
        with FSDP1.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
            model.load_state_dict(other)
        loaded = full_parameters(model)
        assert all(torch.equal(loaded[name], other[name]) for name in loaded)


@pytest.mark.parametrize(
    "run",
    [
        Run("fsdp2", 4, 2),
        Run("fsdp1", 4, 2),
        Run("fsdp1_no_shard", 2, 2),
        Run("fsdp1", 2, 2, model={"tie_word_embeddings": True}, label="tied"),
    ],
    ids=str,
)
def test_full_state_dict_is_plain_and_complete(ranks, run):
    ranks(run.world).run(full_state_dicts, run)


def incomplete_on_rank(folder: str) -> None:
    model = build(Run("fsdp2", 2, 2))
    for step in (1, 2, 3):
        torch_moe_ep.save_checkpoint(f"{folder}/step{step}", model, step=step, num_kept=2)
    (Path(folder) / "step3" / "complete.json").unlink(missing_ok=True)
    torch.distributed.barrier()
    assert torch_moe_ep.latest_checkpoint(folder) == Path(folder) / "step2"
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        torch_moe_ep.load_checkpoint(f"{folder}/step3", model)


def test_interrupted_checkpoint_is_passed_over(ranks, tmp_path):
    ranks(2).run(incomplete_on_rank, str(tmp_path))
    assert not (tmp_path / "step1").exists()
