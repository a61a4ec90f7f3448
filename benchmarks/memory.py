"""The planner's memory beside what torch reports, for whole training steps on one GPU.

    python -m benchmarks.memory   # GPU with 80 GB: 4 layers of 8x7B, T = 4096 and 16384, bf16

Forward, backward and fused AdamW of full-width Mixtral layers with our experts (P = 1), with and
without gradient checkpointing. Peak: torch.cuda.max_memory_allocated over a step after two others.
"""

import argparse
from typing import Any

import torch
from transformers import MixtralForCausalLM

from benchmarks import common
from benchmarks.step import add_model_arguments, stock_model, training_step, with_our_experts
from torch_moe_ep.plan import PRECISIONS, Batch, Layout, memory_of
from torch_moe_ep.plan.shape import from_config

CHECKPOINTING = ("none", "full")
SAMPLES = (1, 4)  # of --sequence tokens


def model_of(stock: MixtralForCausalLM, checkpointing: str) -> MixtralForCausalLM:
    """Our experts on the stock model's parameters."""
    model = with_our_experts(stock)
    if checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def predicted(stock: MixtralForCausalLM, checkpointing: str, batch: Batch) -> int:
    """Bytes at the planner's peak."""
    layout = Layout(1, 1, 1, 1, PRECISIONS["bf16"], checkpointing)
    return memory_of(from_config(stock.config.to_dict(), "stock"), layout, batch).total


def measured(
    model: MixtralForCausalLM, optimizer: torch.optim.Optimizer, tokens: torch.Tensor
) -> int:
    """Bytes at the peak of the third step."""
    for _ in range(2):
        training_step(model, optimizer, tokens)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    training_step(model, optimizer, tokens)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def rows_of(case: str, found: int, expected: int) -> list[dict[str, Any]]:
    """What torch reports and what the planner says, in GiB."""
    values = {"torch": found, "planner": expected}
    return [
        {
            "name": name,
            "case": case,
            "value": round(value / 2**30, 3),
            "unit": "GiB peak",
            "ratio_to_torch": round(value / found, 4),
        }
        for name, value in values.items()
    ]


def main() -> None:
    """Measure the four cases and keep the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_common_arguments(parser)
    add_model_arguments(parser)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type != "cuda":
        parser.error("torch reports a peak for GPUs alone: this benchmark needs one.")
    stock = stock_model(arguments, device)
    optimizer = torch.optim.AdamW(stock.parameters(), lr=1e-5, fused=True)
    rows = []
    for samples in SAMPLES:
        batch = Batch(arguments.sequence, samples)
        tokens = torch.randint(arguments.vocab_size, (samples, arguments.sequence), device=device)
        for checkpointing in CHECKPOINTING:
            found = measured(model_of(stock, checkpointing), optimizer, tokens)
            case = f"{arguments.layers} layers H={arguments.hidden} I={arguments.width} "
            case += f"T={batch.tokens} checkpointing={checkpointing}"
            rows += rows_of(case, found, predicted(stock, checkpointing, batch))
    common.finish("memory", rows, arguments)


if __name__ == "__main__":
    main()
