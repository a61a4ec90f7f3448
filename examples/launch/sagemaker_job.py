"""Start Mixtral 8x7B on SageMaker with the public package `sagemaker` (below 3).

    pip install 'sagemaker<3'
    python -m examples.launch.sagemaker_job --role ROLE --image_uri IMAGE --data s3://BUCKET/sst2 \
        --output s3://BUCKET/runs --instance_type ml.p4d.24xlarge --instance_count 2

`--data` is what `examples.prepare_data` wrote, copied to S3. The image is a stock PyTorch training
container with torch 2.11 or newer. `--dry_run 1` prints what would be asked for. docs/launch.md
says why the settings are what they are.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.smp_style.arguments import make_parser

ROOT = Path(__file__).parents[2]
PACKAGE = "torch_moe_ep_source"  # of this folder the container installs the package
PARTS = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "csrc",
    "torch_moe_ep",
)
CHECKPOINT_DIR = "/opt/ml/checkpoints"  # of each node; the platform copies it to and from S3
CHANNELS = ("train", "validation", "tokenizer")
PARAMETERS = 46.7e9
ROOM = 0.75  # of the GPU's memory, for weights, gradients and optimizer: activations want the rest

MIXTRAL = {
    "vocab_size": 32000,
    "max_context_width": 2048,
    "hidden_width": 4096,
    "intermediate_size": 14336,
    "num_layers": 32,
    "num_heads": 32,
    "num_key_value_heads": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "expert_parallel_degree": 8,  # one expert a GPU; token rows stay on the node's NVLink
    "moe_load_balancing": "sinkhorn",
    "train_batch_size": 1,
    "val_batch_size": 1,
    "max_steps": 1000,
    "checkpoint_freq": 200,
    "validation_freq": 200,
}


@dataclass(frozen=True)
class Instance:
    """One kind of machine: 8 GPUs of `gpu_gb` GB, and the architecture to compile for."""

    gpu_gb: int
    architecture: str
    num_gpus: int = 8


INSTANCES = {
    "ml.p4d.24xlarge": Instance(40, "8.0"),
    "ml.p4de.24xlarge": Instance(80, "8.0"),
    "ml.p5.48xlarge": Instance(80, "9.0a"),
    "ml.p5e.48xlarge": Instance(141, "9.0a"),
    "ml.p5en.48xlarge": Instance(141, "9.0a"),
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.launch.sagemaker_job",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--role", required=True, help="ARN of the role that the job runs as")
    add("--image_uri", required=True, help="a PyTorch training container, torch 2.11 or newer")
    add("--data", required=True, help="s3:// folder with train/, validation/ and tokenizer/")
    add("--output", required=True, help="s3:// folder for checkpoints and results")
    add("--instance_type", default="ml.p4d.24xlarge", choices=sorted(INSTANCES))
    add("--instance_count", type=int, default=2)
    add("--max_run_s", type=int, default=5 * 24 * 3600, help="seconds until the job is stopped")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", dest="settings",
        help="arguments of examples.smp_style.train")  # fmt: skip
    add("--dry_run", type=int, choices=(0, 1), default=0)
    return parser.parse_args(argv)


def param_dtype(instance: Instance, instance_count: int) -> str:
    """float32 (16 bytes a parameter) where it fits into ROOM of the GPUs, else bfloat16 (8).

    Raises:
        ValueError: neither fits.
    """
    total = instance.num_gpus * instance_count * instance.gpu_gb * 1e9
    for name, num_bytes in (("float32", 16), ("bfloat16", 8)):
        if num_bytes * PARAMETERS <= ROOM * total:
            return name
    raise ValueError(
        f"{instance_count} x {instance.num_gpus} GPUs have {total / 1e9:.0f} GB, but Mixtral 8x7B "
        f"takes {8 * PARAMETERS / 1e9:.0f} GB at 8 bytes a parameter, and activations; take more "
        f"--instance_count."
    )


def hyperparameters(arguments: argparse.Namespace) -> dict[str, Any]:
    """The training script's arguments, --set last.

    Raises:
        ValueError: an argument that the script does not have, or a model that does not fit.
    """
    instance = INSTANCES[arguments.instance_type]
    values: dict[str, Any] = {
        **MIXTRAL,
        "hybrid_shard_degree": arguments.instance_count * instance.num_gpus // 8,
        "param_dtype": param_dtype(instance, arguments.instance_count),
    }
    known = {action.dest for action in make_parser()._actions}
    for word in arguments.settings:
        name, _, value = word.partition("=")
        if name not in known or not value:
            raise ValueError(f"--set {word}: NAME=VALUE of examples.smp_style.train is wanted.")
        values[name] = value
    return values


def stage_source(folder: Path) -> None:
    """Fill the source folder of the job: entry point, examples, the package and what to install.

    The platform refuses torchrun for a folder with a setup.py in it, so the package lies one
    deeper and requirements.txt installs it, once a node, before the ranks start.
    """
    ignore = shutil.ignore_patterns("*.so", "_ops.*.json", "__pycache__")
    for name in PARTS:
        source, target = ROOT / name, folder / PACKAGE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignore)
        else:
            shutil.copy(source, target)
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=ignore)
    shutil.copy(Path(__file__).with_name("sagemaker_entry.py"), folder)
    (folder / "requirements.txt").write_text(
        f"transformers>=5.6\ntokenizers\nsafetensors\ntensorboard\ntqdm\n./{PACKAGE}\n"
    )


def estimator_arguments(arguments: argparse.Namespace, source: Path) -> dict[str, Any]:
    """What `sagemaker.pytorch.PyTorch` is given."""
    return {
        "role": arguments.role,
        "image_uri": arguments.image_uri,
        "entry_point": "sagemaker_entry.py",
        "source_dir": str(source),
        "instance_type": arguments.instance_type,
        "instance_count": arguments.instance_count,
        "distribution": {"torch_distributed": {"enabled": True}},
        "hyperparameters": hyperparameters(arguments),
        "environment": {
            "CHECKPOINT_DIR": CHECKPOINT_DIR,
            # pip's spelling of --no-build-isolation: the build needs the container's torch.
            "PIP_NO_BUILD_ISOLATION": "0",
            "TORCH_MOE_EP_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": INSTANCES[arguments.instance_type].architecture,
        },
        "output_path": arguments.output,
        "checkpoint_s3_uri": f"{arguments.output.rstrip('/')}/checkpoints",
        "checkpoint_local_path": CHECKPOINT_DIR,
        "base_job_name": "torch-moe-ep",
        "max_run": arguments.max_run_s,
        "disable_profiler": True,
        "debugger_hook_config": False,
    }


def channels(arguments: argparse.Namespace) -> dict[str, str]:
    """Name to S3 folder of each input channel."""
    return {name: f"{arguments.data.rstrip('/')}/{name}" for name in CHANNELS}


def start(arguments: argparse.Namespace, session: Any = None) -> None:
    """Upload the sources and ask for the job; returns once it is accepted."""
    from sagemaker.inputs import TrainingInput
    from sagemaker.pytorch import PyTorch

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        stage_source(source)
        estimator = PyTorch(**estimator_arguments(arguments, source), sagemaker_session=session)
        inputs = {
            name: TrainingInput(uri, input_mode="File") for name, uri in channels(arguments).items()
        }
        estimator.fit(inputs, wait=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Start the job, or print what would be asked for."""
    arguments = parse_arguments(argv)
    try:
        asked = {**estimator_arguments(arguments, Path("<staged>")), "inputs": channels(arguments)}
    except ValueError as error:
        print(f"sagemaker_job: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asked, indent=1))
    if not arguments.dry_run:
        start(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
