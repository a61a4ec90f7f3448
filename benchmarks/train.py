"""Training steps of a whole Mixtral on all GPUs of a host: expert parallel, and stock FSDP2.

    python -m benchmarks.train                        # 8x7B: as many of its layers as fit
    python -m benchmarks.train --layers 2 --hidden 512 --width 1024   # small: does it run?

Both are FSDP2 over every decoder layer, bf16 computation and fused AdamW; the peer holds the same
model with transformers' grouped_mm experts, sharded by FSDP2 like everything else. Parameters are
kept in fp32 where 16 bytes a parameter fit the GPUs, else in bf16 (8 bytes); activation
checkpointing is on where activations would not fit. FLOPs: 6 for each active parameter but the
embedding's and each token, 6 H for each position that a token attends to and each layer;
recomputation does not count. Exposed communication is the share of a profiled step in which
communication kernels ran on rank 0 and no other did. One GPU: two small ranks share it, and
nothing is a speed.
"""

import argparse
import gc
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from benchmarks import common
from benchmarks.step import OURS, PEER, training_step
from benchmarks.transport import NOT_A_SPEED, PEER_KERNELS, enter_gpu
from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh
from torch_moe_ep.testing import RankPool

PEER_FSDP2 = f"{PEER}, FSDP2"
WHOLE_LAYERS = 32
RESERVE = 0.78  # of a GPU's memory; the rest is NCCL's, the allocator's and the all-gathers'
LABELS = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Case:
    """The model, the batch of a rank, and how they are kept in memory."""

    layers: int
    hidden: int
    width: int
    sequence: int
    batch: int
    ranks: int
    parameters: str = "float32"
    checkpointing: bool = False
    transport: str = "auto"
    num_chunks: int = 1
    steps: int = 4
    has_own_gpu: bool = True
    vocab: int = 32000

    def __str__(self) -> str:
        """The case as result files name it."""
        what = f"{self.layers} layers H={self.hidden} I={self.width} W={self.ranks}"
        kept = f"{LABELS[self.parameters]} parameters"
        how = ", activation checkpointing" if self.checkpointing else ""
        label = f"{what} batch={self.batch} sequence={self.sequence} a GPU, {kept}{how}"
        return label if self.has_own_gpu else f"{label} ({NOT_A_SPEED})"

    @property
    def config(self) -> MixtralConfig:
        """Mixtral of these sizes, with 8 experts, 2 for each token."""
        heads = max(4, self.hidden // 128)
        config = MixtralConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            max_position_embeddings=self.sequence,
            use_cache=False,
        )
        config._experts_implementation = "grouped_mm"
        return config

    @property
    def tokens(self) -> int:
        """Tokens of a rank in a step."""
        return self.batch * self.sequence

    def num_parameters(self, experts: int = 8) -> int:
        """Parameters of the model with so many experts a layer; 2: the active ones."""
        attention = self.hidden * self.hidden * 5 // 2  # q, o, and k and v of a quarter each
        layer = attention + 3 * experts * self.hidden * self.width + 8 * self.hidden
        return self.layers * layer + 2 * self.vocab * self.hidden

    @property
    def flops(self) -> float:
        """Model FLOPs of a rank in a step."""
        active = self.num_parameters(experts=2) - self.vocab * self.hidden
        attended = self.layers * self.hidden * self.sequence  # the causal half of 12 H S
        return 6.0 * self.tokens * (active + attended)

    def state_bytes(self) -> float:
        """Bytes of parameters, gradients and AdamW's state on each GPU."""
        return self.num_parameters() * (16 if self.parameters == "float32" else 8) / self.ranks

    def activation_bytes(self) -> float:
        """Bytes that forward keeps for backward on each GPU, and the logits."""
        layer = self.hidden * 2.0 if self.checkpointing else 28.0 * self.hidden + 8 * self.width
        whole = 28.0 * self.hidden + 8 * self.width if self.checkpointing else 0.0
        return self.tokens * (self.layers * layer + whole + 10.0 * self.vocab)


def fitted(case: Case, gpu_bytes: float) -> Case:
    """The case with fp32 parameters if they fit, checkpointing if it must be, layers that fit."""
    room = RESERVE * gpu_bytes
    for layers in range(case.layers, 0, -1):
        for parameters in ("float32", "bfloat16"):
            for checkpointing in (False, True):
                found = replace(
                    case, layers=layers, parameters=parameters, checkpointing=checkpointing
                )
                if found.state_bytes() + found.activation_bytes() < room:
                    return found
    raise ValueError(f"not one layer of {case} fits a GPU of {gpu_bytes / 2**30:.0f} GiB.")


@dataclass(frozen=True)
class Measured:
    """One rank's seconds a step, its loss at the end, peak bytes, and exposed communication."""

    seconds: list[float]
    loss: float
    peak_bytes: int
    exposed: float


def train(case: Case, is_ours: bool) -> Measured:
    """Build the model of a candidate on this rank and run its steps. Collective."""
    device = enter_gpu()
    torch.cuda.reset_peak_memory_stats()
    model = build(case, device, is_ours)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    shape = (case.batch, case.sequence)
    tokens = torch.randint(case.vocab, shape, device=device, generator=generator)
    step = partial(training_step, model, optimizer, tokens)
    for _ in range(2):
        loss = step()
    seconds = []
    for _ in range(case.steps):
        dist.barrier()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        loss = step()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    exposed = exposed_communication(step)
    found = Measured(seconds, float(loss), torch.cuda.max_memory_allocated(), exposed)
    del model, optimizer, step, loss
    gc.collect()
    torch.cuda.empty_cache()
    return found


def build(case: Case, device: torch.device, is_ours: bool) -> nn.Module:
    """The model of a candidate, sharded, with random weights. Collective."""
    with torch.device("meta"):
        model: Any = MixtralForCausalLM(case.config).to(getattr(torch, case.parameters))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    if is_ours:
        mesh = init_device_mesh("cuda", dist.get_world_size())
        config = MoEConfig(transport=case.transport, num_chunks=case.num_chunks)
        apply_expert_parallel(model, mesh, config, mp_policy=policy)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.to_empty(device=device)
    model.model.rotary_emb = MixtralRotaryEmbedding(model.config, device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.fill_(1.0) if "norm" in name else local.normal_(0.0, 0.02)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    result: nn.Module = model
    return result


def exposed_communication(step: Callable[[], object]) -> float:
    """Share of one step in which only communication kernels ran; every rank runs the step."""
    torch.cuda.synchronize()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    kernels = [
        (event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.device_type() == torch.autograd.DeviceType.CUDA and event.duration_ns() > 0
    ]
    communication = [(a, b) for name, a, b in kernels if is_communication(name)]
    computation = [(a, b) for name, a, b in kernels if not is_communication(name)]
    whole = max(b for _, _, b in kernels) - min(a for _, a, _ in kernels)
    return covered([*communication, *computation]) / whole - covered(computation) / whole


COMMUNICATION = ("nccl", *PEER_KERNELS, "meeting_kernel", "gather_numbers_kernel")


def is_communication(kernel: str) -> bool:
    """Whether a kernel moves rows or parameters between ranks, or waits for them, by its name."""
    return any(name in kernel for name in COMMUNICATION)


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """Length of the union of spans: 7 for [(0, 4), (2, 6), (8, 9)]."""
    total, reached = 0, -math.inf
    for start, end in sorted(spans):
        total += max(0, end - int(max(start, reached)))
        reached = max(reached, end)
    return total


def rows_of(case: Case, name: str, ranks: list[Measured]) -> list[dict[str, Any]]:
    """The result rows of one candidate: the slowest rank's median step."""
    seconds = max(statistics.median(rank.seconds) for rank in ranks)
    loss = statistics.fmean(rank.loss for rank in ranks)
    values = {
        "tokens/s": case.ranks * case.tokens / seconds,
        "TFLOP/s a GPU": case.flops / seconds / 1e12,
        "ms a step": seconds * 1e3,
        "GiB at most": max(rank.peak_bytes for rank in ranks) / 2**30,
        "exposed communication": ranks[0].exposed,
        "loss after it": loss,
    }
    return [
        {"name": name, "case": str(case), "value": round(value, 4), "unit": unit}
        for unit, value in values.items()
    ]


def run_pair(case: Case, names: Iterable[str]) -> list[dict[str, Any]]:
    """Both candidates of a case in turn; their rates."""
    rows: list[dict[str, Any]] = []
    print(f"{case}: {case.num_parameters() / 1e9:.2f} B parameters", flush=True)
    with RankPool(case.ranks, backend="nccl") as pool:
        for name in names:
            rows += rows_of(case, name, pool.run(train, case, name == OURS, timeout_s=400))
    rates = {row["name"]: row["value"] for row in rows if row["unit"] == "tokens/s"}
    if len(rates) == 2:
        ratio = rates[OURS] / rates[PEER_FSDP2]
        print(f"{case}: {OURS} is {ratio:.3f} times {PEER_FSDP2}", flush=True)
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sizes of the model and of its batch, the ranks, and how rows travel."""
    num_gpus = torch.cuda.device_count()
    is_real = num_gpus > 1
    parser.add_argument("--ranks", type=int, default=num_gpus if is_real else 2)
    parser.add_argument("--layers", type=int, help="default: as many as fit; of two small ranks 2")
    parser.add_argument("--hidden", type=int, default=4096 if is_real else 256)
    parser.add_argument("--width", type=int, default=14336 if is_real else 512)
    parser.add_argument("--sequence", type=int, default=4096 if is_real else 256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--num_chunks", type=int, default=1)
    common.add_output_arguments(parser)


def case_of(arguments: argparse.Namespace, most_layers: int) -> Case:
    """The case that was asked for, as it fits this machine's GPUs.

    Raises:
        SystemExit: no GPU is visible.
    """
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        raise SystemExit("this benchmark needs a GPU, and no GPU is visible.")
    names = [field.name for field in fields(Case) if field.name in arguments]
    asked = {name: getattr(arguments, name) for name in names}
    layers = arguments.layers or (most_layers if num_gpus > 1 else 2)
    own = {"layers": layers, "has_own_gpu": num_gpus >= arguments.ranks}
    case = Case(**{**asked, **own})
    memory = torch.cuda.get_device_properties(0).total_memory
    return fitted(case, memory if case.has_own_gpu else memory / case.ranks)


def main() -> None:
    """Run both candidates and keep the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    case = case_of(arguments, WHOLE_LAYERS)
    common.finish("train", run_pair(case, [OURS, PEER_FSDP2]), arguments)


if __name__ == "__main__":
    main()
