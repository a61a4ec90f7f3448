"""Train a Mixtral with Hugging Face Trainer and expert parallelism, under FSDP or DDP.

accelerate launch --config_file examples/accelerate_fsdp2.yaml examples/trainer_mixtral.py
torchrun --nproc-per-node 2 examples/trainer_mixtral.py --use_cpu --max_steps 20 --save_strategy no

Every argument of TrainingArguments is one of this script. Without --model a small Mixtral is
trained from its initial weights; the text is CPython's manual, which needs no download.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `examples`, however it is launched

import torch_moe_ep
from examples import corpus
from examples.leave import leave
from torch_moe_ep.integrations.trainer import log_expert_load


@dataclass
class ScriptArguments:
    """What Trainer has no argument for."""

    model: str = field(default="", metadata={"help": "a folder or hub name; empty: a small one"})
    expert_parallel_degree: int = field(default=2, metadata={"help": "ranks that share experts"})
    block_size: int = field(default=128, metadata={"help": "tokens of a sequence"})
    vocab_size: int = field(default=2048, metadata={"help": "of the small model's tokenizer"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint"})


def blocks_as_rows(blocks: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Blocks [n, block_size] as Trainer's rows; labels are the inputs."""
    return [{"input_ids": block, "labels": block} for block in blocks]


def build_model(script: ScriptArguments, vocab_size: int) -> PreTrainedModel:
    """The same weights on every rank; fp32, since optimizers need fp32 masters."""
    if script.model:
        return AutoModelForCausalLM.from_pretrained(script.model, dtype=torch.float32)
    config = MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=script.block_size,
        output_router_logits=True,
        use_cache=False,
    )
    return MixtralForCausalLM(config)


def main() -> None:
    """Train, evaluate, and write the model in Hugging Face's layout to <output_dir>/hf."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    script, arguments = parser.parse_args_into_dataclasses()
    folder = Path(arguments.output_dir) / "data"
    with arguments.main_process_first(desc="preparing the text"):  # joins the process group too
        if arguments.local_process_index == 0:
            print(corpus.prepare(folder, script.vocab_size, script.block_size))
    data = corpus.load(folder)
    set_seed(arguments.seed)
    model = build_model(script, data.vocab_size)

    mesh = torch_moe_ep.init_device_mesh(arguments.device.type, script.expert_parallel_degree)
    torch_moe_ep.apply_expert_parallel(model, mesh)  # before Trainer is made

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=blocks_as_rows(data.train),
        eval_dataset=blocks_as_rows(data.validation),
    )
    log_expert_load(trainer)
    trainer.train(resume_from_checkpoint=script.resume or None)
    trainer.log_metrics("eval", trainer.evaluate())  # prints on rank 0
    torch_moe_ep.export_hf(trainer.model, Path(arguments.output_dir) / "hf")  # under any wrapper
    leave()


if __name__ == "__main__":
    main()
