"""``python -m torch_moe_ep.checkpoint``: info, verify, reshard, export, without process group."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_cases import TIED, Run, backward, build
from safetensors.torch import load_file
from torch.distributed.checkpoint import filesystem

import torch_moe_ep
from torch_moe_ep.checkpoint.__main__ import main
from torch_moe_ep.testing import batch_of
from torch_moe_ep.testing.parallel import from_rank0, full_parameters

TWELVE = {"num_local_experts": 12, "intermediate_size": 32}
SAVER = Run("fsdp2", 2, 2, model=TWELVE)


def saved_on_rank(run: Run, folder: str) -> None:
    """One trained step, a checkpoint with everything, and the export of the live model."""
    model = build(run)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    backward(run, model)
    optimizer.step()
    torch_moe_ep.save_checkpoint(
        f"{folder}/run/step-1", model, optimizer, step=1, scheduler=scheduler,
        data_state={"rank": dist.get_rank()},
    )  # fmt: skip
    torch_moe_ep.export_hf(model, f"{folder}/hf")


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    ranks(2).run(saved_on_rank, SAVER, str(folder))
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    shutil.copytree(saved / "run" / "step-1", tmp_path / "step-1")
    return tmp_path / "step-1"


def test_info_says_what_a_checkpoint_holds(saved):
    command = [sys.executable, "-m", "torch_moe_ep.checkpoint", "info", str(saved / "run")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "step-1: step 1, complete" in shown
    assert "saved by 2 ranks" in shown
    assert "laid out for 1 replicate x 1 shard x 2 ep; 2 layers of experts" in shown


def test_info_for_programs_counts_tensors(saved, capsys):
    assert main(["info", "--json", str(saved / "run" / "step-1")]) == 0
    found = json.loads(capsys.readouterr().out)
    names = load_file(saved / "hf" / "model.safetensors")
    elements = sum(tensor.numel() for tensor in names.values())
    assert found["parts"]["model"]["elements"] == elements
    assert found["parts"]["model"]["bytes"] == 4 * elements
    assert found["parts"]["optimizer"]["elements"] > 2 * elements  # two moments and the steps
    assert found["dtypes"] == ["torch.float32"]


def test_verify_of_a_whole_checkpoint_finds_nothing(saved, capsys):
    assert main(["verify", str(saved / "run" / "step-1")]) == 0
    captured = capsys.readouterr()
    assert "no problem" in captured.out
    assert "verify: 100%" in captured.err


def cut(folder: Path) -> None:
    path = folder / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path) -> None:
    """One bit of an expert's weights: no size and no structure tells."""
    path = folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "__1_0.distcp has "),
        (flip, "checksum of "),
        (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda folder: (folder / "hf" / "config.json").unlink(), "hf/config.json is missing"),
    ],
    ids=["cut", "flip", "missing", "config"],
)
def test_verify_names_what_is_damaged(copy, capsys, damage, message):
    damage(copy)
    assert main(["verify", str(copy)]) == 1
    shown = capsys.readouterr().out
    assert message in shown
    assert "take an earlier checkpoint" in shown


def loaded_on_rank(run: Run, path: str):
    """What is loaded, and which files this rank's weights came from."""
    model = build(run)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    files = set()
    read = filesystem.FileSystemReader.read_data

    def watched(self, plan, planner):
        files.update(
            self.storage_data[item.storage_index].relative_path
            for item in plan.items
            if item.storage_index.fqn.startswith("model.")
        )
        return read(self, plan, planner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filesystem.FileSystemReader, "read_data", watched)
        assert torch_moe_ep.load_checkpoint(path, model, optimizer) == 1
    assert torch_moe_ep.load_data_state(path, rank=1) == {"rank": 1}
    moments = {
        name: optimizer.state[param]["exp_avg"].full_tensor()
        for name, param in model.named_parameters()
    }
    return files, from_rank0(full_parameters(model)), from_rank0(moments)


@pytest.mark.parametrize(
    ("run", "degrees"),
    [
        (Run("fsdp2", 4, 2, model=TWELVE), ["--expert-parallel-degree", "2"]),
        (Run("fsdp2", 4, 4, model=TWELVE), ["--expert-parallel-degree", "4"]),
        (
            Run("fsdp2", 4, 2, 1, model=TWELVE),
            ["--expert-parallel-degree", "2", "--hybrid-shard-degree", "1"],
        ),
    ],
    ids=str,
)
def test_resharded_files_hold_the_same_and_each_rank_reads_its_own(
    ranks, saved, tmp_path, run, degrees
):
    source, output = str(saved / "run" / "step-1"), tmp_path / "out"
    assert main(["reshard", source, str(output), "--world-size", "4", *degrees]) == 0
    assert main(["verify", str(output)]) == 0
    assert len(list(output.glob("*.distcp"))) == 4
    before = ranks(4).run(loaded_on_rank, run, source)
    after = ranks(4).run(loaded_on_rank, run, str(output))
    for old, new in zip(before[0][1:], after[0][1:], strict=True):
        assert set(old) == set(new)
        assert all(torch.equal(old[name], new[name]) for name in old)
    for rank, (files, *_) in enumerate(after):
        experts_of = rank % 2 if run.shard == 1 else rank  # replicas read the first one's experts
        assert files == {f"__{rank}_0.distcp", f"__{experts_of}_0.distcp"}
    assert set().union(*(files for files, *_ in before)) == {"__0_0.distcp", "__1_0.distcp"}


def test_export_writes_what_the_live_model_writes(saved, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    output = tmp_path / "out"
    arguments = ["export", str(saved / "run"), str(output), "--tokenizer", str(tokenizer)]
    assert main([*arguments, "--max-shard-bytes", "200000"]) == 0
    found = {}
    for path in output.glob("*.safetensors"):
        found.update(load_file(path))
    wanted = load_file(saved / "hf" / "model.safetensors")
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (output / "tokenizer.json").read_text() == "{}"
    for name in ("config.json", "generation_config.json"):
        assert json.loads((output / name).read_text()) == json.loads(
            (saved / "hf" / name).read_text()
        )


@pytest.mark.parametrize(
    "run",
    [Run("fsdp1", 2, 2, model={**TIED, **TWELVE}), Run("ddp", 2, 1, model=TWELVE)],
    ids=str,
)
def test_export_of_other_wraps_computes_what_was_trained(ranks, tmp_path, run):
    from transformers import AutoModelForCausalLM

    ranks(2).run(saved_on_rank, run, str(tmp_path))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("hf", "out")]
    logits = [model(**batch_of(0)).logits for model in models]
    assert torch.equal(*logits)


GRID = ["--world-size", "4", "--expert-parallel-degree"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "{root}"], "holds no complete checkpoint"),
        (["verify", "{root}/nothing"], "holds no complete checkpoint"),
        (["reshard", "{copy}", "{copy}", *GRID, "2"], "exists; name a folder that does not"),
        (["reshard", "{copy}", "{root}/out", *GRID, "3"], "3 does not divide 4"),
        (
            ["reshard", "{copy}", "{root}/out", "--world-size", "8", *GRID[2:], "8"],
            "has 12 experts, got 8",
        ),
        (["export", "{copy}", "{root}/out", "--tokenizer", "{root}"], "holds no tokenizer files"),
        (["export", "{copy}", "{root}/out", "--config", "{root}"], "holds no config.json"),
    ],
    ids=["around", "missing", "exists", "degree", "experts", "tokenizer", "config"],
)
def test_command_that_cannot_be_done_says_why(copy, capsys, arguments, message):
    root = copy.parent / "empty"
    root.mkdir()
    filled = [argument.format(root=root, copy=copy) for argument in arguments]
    assert main(filled) == 2
    assert message in capsys.readouterr().err
    assert list(root.iterdir()) == []


def test_export_with_the_config_of_another_model_is_refused(copy, tmp_path, capsys):
    config = json.loads((copy / "hf" / "config.json").read_text())
    for change, message in (
        ({"num_hidden_layers": 3}, "holds nothing for model.layers.2."),
        ({"hidden_size": 32}, "by its config; pass the config of this model"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        arguments = ["export", str(copy), str(tmp_path / "out"), "--config", str(tmp_path)]
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_damaged_metadata_is_an_error_and_no_traceback(copy, capsys):
    (copy / ".metadata").write_bytes(b"nothing")
    assert main(["info", str(copy)]) == 2
    assert "take an earlier checkpoint" in capsys.readouterr().err
