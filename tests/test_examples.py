"""The examples do what README says of them."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import MixtralConfig

import torch_moe_ep
from examples import corpus, pretrain
from examples.arguments import parse_arguments
from examples.prepare_data import main as prepare_data
from examples.run_log import model_flops_per_step
from torch_moe_ep.report import read_run

ROOT = Path(__file__).parent.parent


def _torchrun(num_ranks: int, *command: str, cwd: Path = ROOT) -> str:
    """Run a program under torchrun and return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, f"--nproc-per-node={num_ranks}", *command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("fsdp", ["2", "1", "none"])
def test_patch_your_model_each_kind_of_fsdp_trains_alike(fsdp: str) -> None:
    """Losses fall, whatever shards the dense parameters."""
    printed = _torchrun(2, "examples/patch_your_model.py", "--fsdp", fsdp)
    losses = [
        float(line.split("loss ")[1].split(",")[0])
        for line in printed.splitlines()
        if line.startswith(f"fsdp {fsdp}, step")
    ]
    assert len(losses) == 3
    assert losses[2] < losses[0]


def test_patch_your_model_is_short() -> None:
    """The file stays small enough to read in one go."""
    assert len((ROOT / "examples/patch_your_model.py").read_text().splitlines()) < 60


def test_pretrain_few_steps_writes_every_result(tmp_path: Path) -> None:
    """Two updates on text packed before end with every file that README names."""
    packing = ["--output", str(tmp_path / "packed"), "--source", "manual"]
    assert prepare_data([*packing, "--vocab_size=384", "--block_size=32"]) == 0
    earlier = tmp_path / "runs" / "tiny" / "checkpoint" / "step-999"
    earlier.mkdir(parents=True)
    _torchrun(
        2,
        "-m",
        "examples.pretrain",
        "--name=tiny",
        "--max_steps=2",
        "--hidden_width=32",
        "--intermediate_size=32",
        "--num_layers=2",
        "--training_dir=packed",
        "--max_context_width=32",
        "--validation_batches=1",
        "--min_gain=-10",
        "--device=cpu",
        "--moe",
        "num_chunks=2",
        "z_loss_coeff=0.001",
        cwd=tmp_path,
    )
    last = (tmp_path / "runs" / "tiny" / "experts.jsonl").read_text().splitlines()[-1]
    assert '"z_loss"' in last  # --moe reached the routers
    results = {path.name for path in (tmp_path / "runs" / "tiny").iterdir()}
    wanted = {"loss.png", "expert_load.png", "checkpoint", "hf", "sample.txt", "tensorboard"}
    assert wanted <= results
    assert not earlier.exists()  # of a run of the same name, which this one did not go on from


def test_pretrain_that_is_done_is_not_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained, so nothing may be written over: not the loss, not the pictures."""
    arguments = parse_arguments(["--max_steps=5", "--resume_from_checkpoint=runs/a/step-5"])
    monkeypatch.setattr(torch_moe_ep, "load_checkpoint", lambda *_, **__: 5)
    with pytest.raises(ValueError, match=r"step-5 is at step 5 already, .*pass a larger --max"):
        pretrain.train(arguments, torch.nn.Linear(2, 2), None, None, Path("runs/a"))


def test_pretrain_resumes_from_the_newest_step_of_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = parse_arguments(["--max_steps=5", f"--resume_from_checkpoint={tmp_path}"])
    monkeypatch.setattr(torch_moe_ep, "latest_checkpoint", lambda folder: folder / "step-5")
    monkeypatch.setattr(torch_moe_ep, "load_checkpoint", lambda path, *_, **__: int(path.name[-1]))
    with pytest.raises(ValueError, match="step-5 is at step 5 already"):
        pretrain.train(arguments, torch.nn.Linear(2, 2), None, None, tmp_path)


def test_trainer_mixtral_logs_expert_load_and_exports(tmp_path: Path) -> None:
    """Four updates under DDP, evaluated, with the experts' load in the log."""
    printed = _torchrun(
        2,
        str(ROOT / "examples/trainer_mixtral.py"),
        "--use_cpu",
        "--max_steps=4",
        "--logging_steps=2",
        "--save_strategy=no",
        "--report_to=none",
        "--output_dir=out",
        "--vocab_size=512",
        "--per_device_eval_batch_size=64",
        cwd=tmp_path,
    )
    assert printed.count("'expert_imbalance'") == 2
    assert printed.count("corpus: ") == 1  # a second rank would write what the first one reads
    assert "eval_loss" in printed
    assert (tmp_path / "out" / "hf" / "model.safetensors").is_file()


def test_accelerate_configuration_is_one_that_accelerate_reads() -> None:
    """Its keys are accelerate's, and efficient loading, which would be refused, is off."""
    path = ROOT / "examples/accelerate_fsdp2.yaml"
    config = load_config_from_file(str(path))
    assert config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) <= known


def _losses(printed: str) -> dict[str, float]:
    """Losses of the log lines ``Batch 3 Loss: 4.2, ...`` by what stands before them."""
    lines = [line for line in printed.splitlines() if line.startswith("Batch ")]
    return {line.split(": ")[0]: float(line.split(": ")[1].split(",")[0]) for line in lines}


def test_smp_style_resumes_at_another_degree_with_the_same_losses(tmp_path: Path) -> None:
    """Trains, validates and saves at P = 2; goes on from the middle at P = 4 likewise."""
    common = ("-m", "examples.smp_style.train", "--bf16=0", "--lr_decay_iters=10", "--warmup=0.2",
              "--max_steps=4", "--checkpoint_freq=2", "--validation_batches=1",
              "--hidden_width=32", "--intermediate_size=32", "--vocab_size=384",
              "--max_context_width=32", "--moe_load_balancing=none")  # fmt: skip
    boards = tmp_path / "boards"
    whole = _losses(
        _torchrun(4, *common, "--checkpoint_dir=whole", f"--tensorboard_dir={boards}", cwd=tmp_path)
    )
    resumed = _losses(
        _torchrun(
            4,
            *common,
            "--checkpoint_dir=resumed",
            "--training_dir=whole/data",
            "--resume_from_checkpoint=whole/mixtral-2steps",
            "--expert_parallel_degree=4",
            "--hybrid_shard_degree=0",
            cwd=tmp_path,
        )
    )
    assert {"Batch 0 Loss", "Batch 3 Loss", "Batch 3 Validation loss"} <= set(whole)
    assert set(resumed) == {"Batch 2 Loss", "Batch 3 Loss", "Batch 3 Validation loss"}
    for name, loss in resumed.items():
        assert math.isclose(loss, whole[name], rel_tol=1e-4)
    assert any(boards.iterdir())
    kept = {path.name for path in (tmp_path / "whole").iterdir()}
    files = {"history.jsonl", "experts.jsonl"}
    assert kept == {"data", "mixtral-2steps", "mixtral-4steps", *files}
    for folder, steps in (("whole", [0, 1, 2, 3]), ("resumed", [2, 3])):
        run = read_run(tmp_path / folder)
        assert run.curves["loss"][0] == run.load_steps == steps
        assert run.num_steps == 4


def test_corpus_packing_cuts_blocks_and_holds_out_text(tmp_path: Path) -> None:
    """Blocks have one length; held-out paragraphs do not occur in the training text."""
    corpus.prepare(tmp_path, vocab_size=512, block_size=64)
    data = corpus.load(tmp_path)
    assert data.vocab_size == 512
    assert data.train.shape[1] == data.validation.shape[1] == 64
    share = len(data.validation) / (len(data.train) + len(data.validation))
    assert 0.08 < share < 0.16
    assert 4.0 < data.unigram_cross_entropy() < math.log(512)
    training, validation = corpus.split(corpus.documents(), 0.1)
    paragraphs = {p for text in training for p in text.split("\n\n")}
    assert not paragraphs & {p for text in validation for p in text.split("\n\n")}


def test_batch_of_step_two_ranks_see_every_block_once_an_epoch() -> None:
    """EP ranks are data-parallel ranks: no block twice in an epoch, none left out."""
    blocks = torch.arange(12).unsqueeze(1)
    seen = [
        corpus.batch_of_step(blocks, step, 3, rank, 2, seed=0) for step in (0, 1) for rank in (0, 1)
    ]
    assert sorted(torch.cat(seen).flatten().tolist()) == list(range(12))
    again = corpus.batch_of_step(blocks, 1, 3, 1, 2, seed=0)
    assert torch.equal(again, seen[3])


def test_model_flops_mixtral_8x7b_is_the_published_figure() -> None:
    """79.7 GFLOP a token at sequence 2048."""
    flops = model_flops_per_step(MixtralConfig(), batch_size=1, block_size=2048)
    assert flops / 2048 == pytest.approx(79.7e9, rel=2e-3)


def test_quick_only_changes_defaults() -> None:
    """`--quick` is overruled by what is asked for explicitly."""
    assert parse_arguments(["--quick"]).max_steps < parse_arguments([]).max_steps
    assert parse_arguments(["--quick", "--max_steps", "7"]).max_steps == 7


def test_pretrain_moe_options_become_a_configuration() -> None:
    """Numbers, booleans and texts as MoEConfig wants them; nothing gives its defaults."""
    assert parse_arguments([]).moe == torch_moe_ep.MoEConfig()
    words = ["num_chunks=2", "transport=collective", "global_token_shuffle=true", "routing=none"]
    wanted = torch_moe_ep.MoEConfig(
        num_chunks=2, transport="collective", global_token_shuffle=True, routing="none"
    )
    assert parse_arguments(["--moe", *words, "--max_steps=5"]).moe == wanted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--moe", "num_chunk=2"], "a name of MoEConfig is wanted, got num_chunk=2; names: grad"),
        (["--moe", "num_chunks"], "a name of MoEConfig is wanted, got num_chunks;"),
        (["--moe", "transport=pigeon"], 'transport must be "auto" or .*, got .pigeon'),
        (["--moe", "seed=1", "--expert_parallel_degree=0"], "--moe is for expert-parallel experts"),
    ],
)
def test_pretrain_moe_options_that_do_not_fit_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(words)
    assert re.search(message, capsys.readouterr().err)
