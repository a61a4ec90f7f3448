"""Arguments of the SMP-style script: names and defaults that such scripts have."""

import argparse
from pathlib import Path

LATEST = Path("latest")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return make_parser().parse_args(argv)


def make_parser() -> argparse.ArgumentParser:
    """All arguments. Sizes default to a small model; Mixtral 8x7B's are in the help."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    _add_training(parser)
    _add_files(parser)
    _add_model(parser)
    return parser


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--train_batch_size", type=int, default=2, help="sequences a rank and step")
    add("--val_batch_size", type=int, default=2, help="sequences a rank and validation batch")
    add("--max_steps", type=int, default=8)
    add("--seed", type=int, default=12345)
    add("--lr", type=float, default=1e-4)
    add("--min_lr", type=float, default=1e-5)
    add("--warmup", type=float, default=0.0032, help="part of lr_decay_iters")
    add("--lr_decay_iters", type=int, default=47683)
    add("--beta1", type=float, default=0.9)
    add("--beta2", type=float, default=0.95)
    add("--weight_decay", type=float, default=0.2, help="none on norms and biases")
    add("--grad_clip", type=float, default=1.0)
    add("--bf16", type=int, default=1, choices=(0, 1))
    add("--param_dtype", default="float32", choices=("float32", "bfloat16"), help="of weights, "
        "gradients and AdamW's state: 16 or 8 bytes a parameter")  # fmt: skip
    add("--activation_checkpointing", type=int, default=1, choices=(0, 1))
    add("--delayed_param", type=int, default=1, choices=(0, 1), help="start on the meta device")
    add("--logging_freq", type=int, default=1, help="steps")
    add("--validation_freq", type=int, default=0, help="steps; 0: at the end only")
    add("--validation_batches", type=int, default=4)


def _add_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("files").add_argument
    add("--training_dir", type=Path, help="what examples.prepare_data packed (SST-2, say): train/, "
        "validation/ and tokenizer/; else CPython's manual")  # fmt: skip
    add("--checkpoint_dir", type=Path, default=Path("runs/smp-example"))
    add("--checkpoint_freq", type=int, default=0, help="steps; 0: at the end only")
    add("--num_kept_checkpoints", type=int, default=2)
    add("--resume_from_checkpoint", type=Path, help="a checkpoint, the folder of several, or "
        f"{LATEST}: the newest in checkpoint_dir, if there is any")  # fmt: skip
    add("--checkpoints_per_node", type=int, default=0, choices=(0, 1), help="checkpoint_dir "
        "is a folder of each node; something gathers what they write (SageMaker does)")  # fmt: skip
    add("--stop_file", type=Path, help="once it is there, save at the next log line and end")
    add("--tensorboard_dir", type=Path)
    add("--hf_pretrained_model_name_or_dir", default="", help="finetune; read on rank 0 alone")


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model, in brackets Mixtral 8x7B").add_argument
    add("--expert_parallel_degree", type=int, default=2)
    add("--hybrid_shard_degree", type=int, default=2)
    add("--moe_load_balancing", default="sinkhorn")
    add("--max_context_width", type=int, default=128, help="tokens a sequence [2048]")
    add("--vocab_size", type=int, default=2048, help="of the packed manual's tokenizer [32000]")
    add("--hidden_width", type=int, default=128, help="[4096]")
    add("--intermediate_size", type=int, default=256, help="[14336]")
    add("--num_layers", type=int, default=2, help="[32]")
    add("--num_heads", type=int, default=4, help="[32]")
    add("--num_key_value_heads", type=int, default=2, help="[8]")
    add("--num_experts", type=int, default=8, help="[8]")
    add("--num_experts_per_tok", type=int, default=2, help="[2]")
    add("--initializer_range", type=float, default=0.02)
