"""Folders that load_hf refuses: on every rank alike, and before anything is changed."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hub_cases import patched, save_hub_folder
from parallel_cases import TIED, Run
from safetensors.torch import load_file, save_file

import torch_moe_ep
from torch_moe_ep.testing import tiny_mixtral
from torch_moe_ep.testing.parallel import full_parameters

EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
FUSED = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hub_folder(tmp_path_factory.mktemp("hub"))


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-8])


def edit(folder: Path, change) -> None:
    """Change the tensors of the file that holds expert 3 of layer 1, and its index."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    name = index["weight_map"][EXPERT]
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    kept = {key: file for key, file in index["weight_map"].items() if file != name}
    index["weight_map"] = {**kept, **dict.fromkeys(tensors, name)}
    index_path.write_text(json.dumps(index))


def point_to(folder: Path, name: str) -> None:
    """Let the index name a file that exists: nothing but its name is wrong."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    shutil.copy(folder / index["weight_map"][EXPERT], file)
    index["weight_map"][EXPERT] = name
    path.write_text(json.dumps(index))


def differ(tensors) -> None:
    tensors[EXPERT] = tensors[EXPERT].t().contiguous()


FAULTS = {
    "truncated": (truncate, "is truncated or no safetensors file"),
    "missing_file": (
        lambda folder: sorted(folder.glob("*.safetensors"))[0].unlink(),
        "names model-00001-of-",
    ),
    "missing_expert": (
        lambda folder: edit(folder, lambda tensors: tensors.pop(EXPERT)),
        r"gate_up_proj is made of experts 0 to 7 .*lacks \[3\]",
    ),
    "wrong_shape": (lambda folder: edit(folder, differ), r"has shape \(64, 128\)"),
    "wrong_kind": (
        lambda folder: edit(folder, lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)})),
        "is stored as I8",
    ),
    "quantised": (
        lambda folder: edit(
            folder, lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)})
        ),
        "is stored as F8_E4M3",
    ),
    "extra_key": (
        lambda folder: edit(folder, lambda t: t.update({"model.more": torch.zeros(2)})),
        "holds model.more, which the model does not have",
    ),
    "extra_expert": (
        lambda folder: edit(
            folder, lambda t: t.update({EXPERT.replace(".3.", ".8."): t[EXPERT].clone()})
        ),
        "holds 9",
    ),
    "fused_twice": (
        lambda folder: edit(
            folder, lambda t: t.update({FUSED: torch.zeros(8, 256, 64)})
        ),
        "twice",
    ),
    "outside": (
        lambda folder: point_to(folder, "../other/model.safetensors"),
        "must name safetensors files inside the folder",
    ),
    "pickle": (
        lambda folder: point_to(folder, "pytorch_model.bin"),
        "must name safetensors files inside the folder",
    ),
    "no_weights": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        "holds neither model.safetensors nor",
    ),
}  # fmt: skip


def refused_on_rank(run: Run, folders: list[str], is_meta: bool):
    """Load a faulty folder, on rank 1 alone where there are two; nothing may change."""
    model = patched(run, is_meta=is_meta)
    before = None if is_meta else full_parameters(model)
    folder = folders[-1] if dist.get_rank() == 1 else folders[0]
    message = ""
    try:
        torch_moe_ep.load_hf(model, folder)
    except ValueError as error:
        message = str(error)
    if is_meta:
        assert all(param.is_meta for param in model.parameters())
    else:
        after = full_parameters(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
    return message


@pytest.mark.parametrize("fault", FAULTS)
def test_load_hf_refuses_a_folder_that_does_not_fit_on_every_rank(ranks, folder, tmp_path, fault):
    spoil, words = FAULTS[fault]
    faulty = tmp_path / "hub"
    shutil.copytree(folder, faulty)
    spoil(faulty)
    messages = ranks(2).run(refused_on_rank, Run("fsdp2", 2, 2), [str(faulty)], fault == "outside")
    assert messages[0] == messages[1]
    assert re.search(words, messages[0]), messages[0]


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_load_hf_fault_on_one_rank_is_raised_on_all(ranks, folder, tmp_path, kind):
    faulty = tmp_path / "hub"
    shutil.copytree(folder, faulty)
    truncate(faulty)
    both = [str(folder), str(faulty)]
    messages = ranks(2).run(refused_on_rank, Run(kind, 2, 2), both, False)
    assert messages[0] == messages[1]
    assert messages[0].startswith("rank 1: ") and "truncated" in messages[0]


def test_load_hf_tied_model_refuses_different_copies_and_takes_equal_ones(ranks, tmp_path):
    run = Run("fsdp2", 2, 2, model=TIED)
    for is_equal in (True, False):
        folder = tmp_path / str(is_equal)
        model = tiny_mixtral(seed=7)
        if is_equal:
            model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
        model.save_pretrained(folder)
        messages = ranks(2).run(message_of, run, str(folder))
        assert messages[0] == messages[1]
        assert ("ties them" in messages[0]) is not is_equal, messages[0]


def message_of(run: Run, folder: str) -> str:
    try:
        torch_moe_ep.load_hf(patched(run), folder)
    except ValueError as error:
        return str(error)
    return ""


def unpatched_on_rank(folder: str) -> None:
    with pytest.raises(ValueError, match="apply_expert_parallel"):
        torch_moe_ep.load_hf(tiny_mixtral(), folder)


def test_load_hf_refuses_an_unpatched_model(ranks, folder):
    ranks(1).run(unpatched_on_rank, str(folder))


def test_load_hf_says_how_a_model_of_the_hub_becomes_a_folder(ranks):
    name = "mistralai/Mixtral-8x7B-v0.1"
    for said in ranks(2).run(message_of, Run("none", 2, 2), name):
        assert f"{name} is no folder" in said and "snapshot_download" in said
