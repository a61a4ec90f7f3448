"""What activations on the host save on the GPU, and what they cost in time.

    python -m benchmarks.offload   # GPU: 4 layers of 8x7B, sequence 4096, batch 4, bf16

Forward + backward of full-width Mixtral layers with our experts (P = 1), with and without gradient
checkpointing, activations on the GPU or on the host. Held: what a forward leaves allocated on the
GPU for its backward, the logits and their loss included. Peak: over forward and backward, beside
weights and gradients.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from benchmarks import common
from benchmarks.step import add_model_arguments, case_of, stock_model, with_our_experts
from torch_moe_ep.memory import offload_activations

PLAIN = "on the GPU"


def models_of(stock: MixtralForCausalLM) -> dict[str, MixtralForCausalLM]:
    """Name to model, all on the same parameters."""
    models = {}
    for checkpointing in (False, True):
        for horizon in (None, 1, 2):
            model = with_our_experts(stock)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            if horizon is not None:
                offload_activations(
                    model, lambda m: isinstance(m, MixtralDecoderLayer), horizon=horizon
                )
            where = PLAIN if horizon is None else f"on the host, horizon {horizon}"
            models[f"{where}, checkpointing" if checkpointing else where] = model
    return models


def memory_rows(
    name: str, model: MixtralForCausalLM, tokens: torch.Tensor, case: str
) -> list[dict[str, Any]]:
    """GiB held after forward, and at the peak, in the second run."""
    step = step_of(model, tokens)
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss = model(input_ids=tokens, labels=tokens).loss
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    loss.backward()
    del loss
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    found = {"GiB held": held, "GiB peak": peak}
    return [
        {"name": name, "case": case, "value": round(value / 2**30, 3), "unit": unit}
        for unit, value in found.items()
    ]


def step_of(model: MixtralForCausalLM, tokens: torch.Tensor) -> Callable[[], object]:
    """Forward and backward; gradients stay and are added to."""

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()

    return step


def main() -> None:
    """Measure memory, then time all models turn about."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_common_arguments(parser)
    add_model_arguments(parser)
    arguments = parser.parse_args()
    if torch.device(arguments.device).type != "cuda":
        parser.error("activations are on the host already: this benchmark needs a GPU.")
    device = torch.device(arguments.device)
    models = models_of(stock_model(arguments, device))
    tokens = torch.randint(
        arguments.vocab_size, (arguments.batch, arguments.sequence), device=device
    )
    case = case_of(arguments)
    rows = []
    for name, model in models.items():
        rows += memory_rows(name, model, tokens, case)
    candidates = [
        common.Candidate(name, step_of(model, tokens), float(tokens.numel()))
        for name, model in models.items()
    ]
    timings = common.time_turn_about(
        candidates, device, min_seconds=arguments.min_seconds, turns=arguments.turns
    )
    rows += common.speed_rows(timings, case, "tokens/s", 1.0, reference=PLAIN)
    common.finish("offload", rows, arguments)


if __name__ == "__main__":
    main()
