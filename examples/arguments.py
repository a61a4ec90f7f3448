"""The arguments of `examples.pretrain`; the names are those of the SMP v2 training scripts."""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch_moe_ep import MoEConfig


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; `--quick` only changes defaults, so other arguments still win."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.pretrain",
        description="Train a small Mixtral with expert parallelism on CPython's reference manual.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_run_arguments(parser)
    _add_model_arguments(parser)
    _add_training_arguments(parser)
    known, _ = parser.parse_known_args(argv)
    if known.quick:
        parser.set_defaults(max_steps=60, validation_freq=30, min_gain=0.2, name="quick")
    arguments = parser.parse_args(argv)
    if arguments.moe and arguments.expert_parallel_degree == 0:
        parser.error("--moe is for expert-parallel experts; --expert_parallel_degree 0 has none.")
    try:
        arguments.moe = MoEConfig(**dict(arguments.moe))
    except ValueError as error:
        parser.error(f"--moe: {error}")
    return arguments


def _moe_option(word: str) -> tuple[str, Any]:
    """Split NAME=VALUE; the value is a number, true or false, else a text."""
    name, _, value = word.partition("=")
    names = [field.name for field in fields(MoEConfig)]
    if name not in names or not value:
        raise argparse.ArgumentTypeError(
            f"NAME=VALUE with a name of MoEConfig is wanted, got {word}; names: {', '.join(names)}"
        )
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    run.add_argument("--name", default="pretrain", help="results go to runs/<name>/")
    run.add_argument("--runs_dir", type=Path, default=Path("runs"), help="the folder of all runs")
    run.add_argument(
        "--quick",
        action="store_true",
        help="few updates, a lower --min_gain, results in runs/quick/",
    )
    run.add_argument(
        "--ranks", type=int, help="ranks to launch: by default 4 on CPU, every GPU otherwise"
    )
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where")
    run.add_argument(
        "--training_dir", type=Path, help="what examples.prepare_data packed, instead of the manual"
    )
    run.add_argument("--tensorboard_dir", type=Path, help="by default runs/<name>/tensorboard")
    run.add_argument("--logging_freq", type=int, default=10, help="steps between log lines")
    run.add_argument("--checkpoint_freq", type=int, default=0, help="0: at the end only")
    run.add_argument("--num_kept_checkpoints", type=int, default=2, help="the newest ones")
    run.add_argument(
        "--resume_from_checkpoint",
        type=Path,
        help="a step folder to go on from, up to --max_steps, or the folder of all: the newest",
    )
    run.add_argument(
        "--min_gain",
        type=float,
        default=0.7,
        help="nats by which the validation loss must beat the unigram, else the exit status is 1",
    )


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model (a Mixtral; about 11 M parameters)")
    model.add_argument("--vocab_size", type=int, default=2048, help="of the byte-level BPE")
    model.add_argument("--max_context_width", type=int, default=256, help="tokens a block")
    model.add_argument("--hidden_width", type=int, default=256, help="H")
    model.add_argument("--intermediate_size", type=int, default=512, help="I, expert width")
    model.add_argument("--num_layers", type=int, default=3, help="decoder layers")
    model.add_argument("--num_heads", type=int, default=4, help="attention heads")
    model.add_argument("--num_key_value_heads", type=int, default=2, help="key-value heads")
    model.add_argument("--num_experts", type=int, default=8, help="E")
    model.add_argument("--num_experts_per_tok", type=int, default=2, help="K")
    model.add_argument("--initializer_range", type=float, default=0.05, help="std of the weights")
    model.add_argument(
        "--router_aux_loss_coef", type=float, default=0.02, help="Hugging Face's balancing loss"
    )


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("training")
    training.add_argument(
        "--expert_parallel_degree",
        type=int,
        help="P: by default 2 if it divides the ranks, else 1; 0 leaves the model unpatched",
    )
    training.add_argument(
        "--hybrid_shard_degree", type=int, default=0, help="S of the experts; 0 means W / P"
    )
    training.add_argument(
        "--moe",
        type=_moe_option,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="options of MoEConfig, such as num_chunks=2 transport=peer",
    )
    training.add_argument("--seed", type=int, default=12345, help="weights and order of the data")
    training.add_argument("--bf16", type=int, choices=(0, 1), help="by default 1 on GPUs, 0 on CPU")
    training.add_argument("--activation_checkpointing", type=int, choices=(0, 1), default=0)
    training.add_argument("--train_batch_size", type=int, default=2, help="blocks a rank and step")
    training.add_argument("--val_batch_size", type=int, default=4, help="blocks a rank")
    training.add_argument("--max_steps", type=int, default=160, help="optimizer steps")
    training.add_argument("--validation_freq", type=int, default=40, help="steps between")
    training.add_argument("--validation_batches", type=int, default=0, help="0: all held-out text")
    training.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    training.add_argument("--min_lr", type=float, default=1e-4, help="end of the cosine")
    training.add_argument("--lr_decay_iters", type=int, help="by default max_steps")
    training.add_argument("--warmup", type=float, default=0.05, help="share of lr_decay_iters")
    training.add_argument("--weight_decay", type=float, default=0.2, help="not on norms and biases")
    training.add_argument("--beta1", type=float, default=0.9, help="AdamW")
    training.add_argument("--beta2", type=float, default=0.95, help="AdamW")
    training.add_argument("--grad_clip", type=float, default=1.0, help="maximal gradient norm")
