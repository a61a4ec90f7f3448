"""A whole training step (forward, backward, fused AdamW) of full-width Mixtral layers on one rank.

    python -m benchmarks.step               # GPU: 4 layers of 8x7B, sequence 4096, batch 4, bf16
    python -m benchmarks.step --no-compile  # leaves the compiled pair out

Two models share one set of parameters and one optimizer: stock transformers with grouped_mm, and
the same with our experts module in it (P = 1). The compiled pair is torch.compile of each.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks import common
from torch_moe_ep.testing import make_local_expert_parallel

OURS = "torch_moe_ep"
PEER = "transformers grouped_mm"


def stock_model(arguments: argparse.Namespace, device: torch.device) -> MixtralForCausalLM:
    """A stock Mixtral with random weights in the training dtype."""
    config = MixtralConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=max(1, arguments.heads // 4),
        max_position_embeddings=arguments.sequence,
        use_cache=False,
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    with torch.device(device):
        model = MixtralForCausalLM(config)
    nn.Module.to(model, torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.train()
    return model


def with_our_experts(stock: MixtralForCausalLM) -> MixtralForCausalLM:
    """A second model on the same parameters, its experts modules swapped for ours at P = 1."""
    with torch.device("meta"):
        model = MixtralForCausalLM(stock.config)
    model.train()
    for name, parameter in stock.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameter)
    for name, buffer in stock.named_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    for layer in model.model.layers:
        make_local_expert_parallel(layer.mlp.experts)
    return model


def training_step(
    model: Callable[..., Any], optimizer: torch.optim.Optimizer, tokens: torch.Tensor
) -> torch.Tensor:
    """One update; the loss stays on the device."""
    loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def check_alike(models: Sequence[MixtralForCausalLM], tokens: torch.Tensor) -> None:
    """Both models must give the same loss before anything is trained.

    Raises:
        RuntimeError: they differ by more than 1e-2 (bf16) or 1e-5 (fp32), relative.
    """
    with torch.no_grad():
        losses = [float(model(input_ids=tokens, labels=tokens).loss) for model in models]
    limit = 1e-5 if models[0].dtype == torch.float32 else 1e-2
    if not abs(losses[0] - losses[1]) <= limit * abs(losses[0]):
        raise RuntimeError(f"the models' losses differ: {losses[0]} and {losses[1]}; not timed.")


def pair(
    models: dict[str, Callable[..., Any]],
    optimizer: torch.optim.Optimizer,
    tokens: torch.Tensor,
    case: str,
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Time ours and transformers' turn about; the figure is tokens per second."""
    candidates = [
        common.Candidate(
            name, partial(training_step, model, optimizer, tokens), float(tokens.numel())
        )
        for name, model in models.items()
    ]
    timings = common.time_turn_about(
        candidates, tokens.device, min_seconds=arguments.min_seconds, turns=arguments.turns
    )
    ratio = timings[0].ratios(timings[1])
    print(f"{case}: {OURS} is {ratio[1]:.3f} times {PEER} ({ratio[0]:.3f} to {ratio[2]:.3f})")
    return common.speed_rows(timings, case, "tokens/s", 1.0, reference=PEER)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sizes of the model and of its batch."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--layers", type=int, default=4 if on_gpu else 2)
    parser.add_argument("--hidden", type=int, default=4096 if on_gpu else 256)
    parser.add_argument("--width", type=int, default=14336 if on_gpu else 512)
    parser.add_argument("--heads", type=int, default=32 if on_gpu else 4)
    parser.add_argument("--vocab_size", type=int, default=32000 if on_gpu else 2048)
    parser.add_argument("--sequence", type=int, default=4096 if on_gpu else 256)
    parser.add_argument("--batch", type=int, default=4 if on_gpu else 2)


def case_of(arguments: argparse.Namespace) -> str:
    """The sizes as result files name them."""
    case = f"{arguments.layers} layers H={arguments.hidden} I={arguments.width} "
    return case + f"batch={arguments.batch} sequence={arguments.sequence}"


def main() -> None:
    """Time the eager pair and the compiled pair, keep the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_common_arguments(parser)
    add_model_arguments(parser)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available()
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    stock = stock_model(arguments, device)
    ours = with_our_experts(stock)
    optimizer = torch.optim.AdamW(stock.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(
        arguments.vocab_size, (arguments.batch, arguments.sequence), device=device
    )
    check_alike([stock, ours], tokens)
    case = case_of(arguments)
    rows = pair({OURS: ours, PEER: stock}, optimizer, tokens, f"{case} eager", arguments)
    if arguments.compile:
        compiled = {OURS: torch.compile(ours), PEER: torch.compile(stock)}
        rows += pair(compiled, optimizer, tokens, f"{case} compiled", arguments)
    common.finish("step", rows, arguments)


if __name__ == "__main__":
    main()
