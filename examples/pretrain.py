"""Train a small Mixtral with expert parallelism inside FSDP2, from text to generated sample.

    python -m examples.pretrain            # launches its own ranks with torchrun
    python -m examples.pretrain --quick    # the same steps, few updates
    torchrun --nproc-per-node 4 -m examples.pretrain --expert_parallel_degree 4

Model, loop and `fully_shard` are those of a script without expert parallelism; `shard_model`
patches the experts, and `torch_moe_ep` clips, saves, loads and exports. Results: runs/<name>/ with
report.html and its pictures, history.jsonl, experts.jsonl, tensorboard/, checkpoint/, hf/ (Hugging
Face's layout) and sample.txt (text from that export).
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import MixtralConfig, MixtralForCausalLM

import torch_moe_ep
from examples import corpus
from examples.arguments import parse_arguments
from examples.generate import write_sample
from examples.leave import leave
from examples.run_log import RunLog, StepReport
from examples.sizes import sizes_of
from torch_moe_ep.report import write_report


@dataclass(frozen=True)
class Ranks:
    """This process among the others. Every rank sees data of its own."""

    rank: int
    num_ranks: int
    device: torch.device


def launch(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Start the ranks with torchrun on this machine and return its exit status."""
    on_gpu = _use_gpu(arguments)
    num_ranks = arguments.ranks or (torch.cuda.device_count() if on_gpu else 4)
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    where = "GPU (NCCL)" if on_gpu else f"CPU (gloo), {threads} thread(s) each"
    print(f"launching {num_ranks} rank(s) on {where}", flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={num_ranks}", "-m", "examples.pretrain", *argv]
    status = subprocess.run(command, env=environment, check=False).returncode
    if status != 0:
        return status
    results = arguments.runs_dir / arguments.name / "results.json"
    return 0 if json.loads(results.read_text())["gain"] >= arguments.min_gain else 1


def _use_gpu(arguments: argparse.Namespace) -> bool:
    if arguments.device == "auto":
        return torch.cuda.is_available()
    return bool(arguments.device == "cuda")


def data_folder(arguments: argparse.Namespace) -> Path:
    """Where the packed text is: the one that was named, or the manual's."""
    return Path(arguments.training_dir or arguments.runs_dir / arguments.name / "data")


def start_ranks(arguments: argparse.Namespace) -> Ranks:
    """Join the process group. Collective."""
    if _use_gpu(arguments):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # FSDP2's own mesh would take a GPU that it sees
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def build_model(arguments: argparse.Namespace, vocab_size: int) -> MixtralForCausalLM:
    """Make the stock model; the same weights on every rank, from the seed."""
    torch.manual_seed(arguments.seed)
    config = MixtralConfig(
        **sizes_of(arguments, vocab_size),
        router_aux_loss_coef=arguments.router_aux_loss_coef,
        output_router_logits=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return MixtralForCausalLM(config)


def shard_model(arguments: argparse.Namespace, model: MixtralForCausalLM, ranks: Ranks) -> None:
    """Patch the experts, then shard as one would without expert parallelism. Collective."""
    torch.nn.Module.to(model, ranks.device)
    degree = expert_parallel_degree(arguments, ranks.num_ranks)
    if degree > 0:
        mesh = torch_moe_ep.init_device_mesh(
            ranks.device.type, degree, arguments.hybrid_shard_degree
        )
        torch_moe_ep.apply_expert_parallel(model, mesh, arguments.moe)
    if arguments.activation_checkpointing:
        model.gradient_checkpointing_enable()
    use_bf16 = ranks.device.type == "cuda" if arguments.bf16 is None else bool(arguments.bf16)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if use_bf16 else None, reduce_dtype=torch.float32
    )
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def expert_parallel_degree(arguments: argparse.Namespace, num_ranks: int) -> int:
    """Return P as asked for, or 2 where it divides the ranks; 0 means an unpatched model."""
    if arguments.expert_parallel_degree is not None:
        return int(arguments.expert_parallel_degree)
    return 2 if num_ranks % 2 == 0 else 1


def make_optimizer(
    arguments: argparse.Namespace, model: torch.nn.Module
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW without decay on norms and biases; warm-up, then cosine down to min_lr."""
    groups = [
        {
            "params": [p for p in model.parameters() if p.ndim >= 2],
            "weight_decay": arguments.weight_decay,
        },
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments.lr, betas=(arguments.beta1, arguments.beta2))
    decay_steps = arguments.lr_decay_iters or arguments.max_steps
    warmup_steps = max(1, round(arguments.warmup * decay_steps))
    floor = float(arguments.min_lr / arguments.lr)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return float((step + 1) / warmup_steps)
        progress = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
        return float(floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def mean_over_ranks(value: torch.Tensor) -> float:
    """Average a scalar over all ranks. Collective; waits for the device."""
    value = value.detach().float()
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()


@torch.no_grad()
def validate(
    arguments: argparse.Namespace, model: torch.nn.Module, blocks: torch.Tensor, ranks: Ranks
) -> float:
    """Return the loss on held-out text: nats a predicted token over all ranks. Collective.

    All ranks run the same number of batches; where blocks run out, rows of block 0 fill the batch
    and do not count.
    """
    model.eval()
    per_batch = arguments.val_batch_size * ranks.num_ranks
    num_batches = math.ceil(len(blocks) / per_batch)
    if arguments.validation_batches:
        num_batches = min(num_batches, arguments.validation_batches)
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for batch_idx in range(num_batches):
        first = batch_idx * per_batch + ranks.rank * arguments.val_batch_size
        ids = torch.arange(first, first + arguments.val_batch_size)
        counts = (ids < len(blocks)).to(ranks.device)
        tokens = blocks[torch.where(ids < len(blocks), ids, 0)].to(ranks.device)
        logits = model(input_ids=tokens, output_router_logits=False).logits[:, :-1].float()
        nats = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        total += torch.stack([nats[counts].sum(), counts.sum() * nats.shape[1]]).double()
    dist.all_reduce(total)
    model.train()
    return float(total[0] / total[1])


def train_step(
    arguments: argparse.Namespace,
    model: MixtralForCausalLM,
    optimizer: torch.optim.Optimizer,
    tokens: torch.Tensor,
) -> tuple[float, float]:
    """One update; return (language-model loss averaged over ranks, gradient norm). Collective."""
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    grad_norm = torch_moe_ep.clip_grad_norm_(model, arguments.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    balancing = model.config.router_aux_loss_coef * output.aux_loss
    return mean_over_ranks(output.loss - balancing), float(grad_norm)


def resume(
    arguments: argparse.Namespace,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> int:
    """Load the checkpoint that was asked for; return the step to go on from. Collective."""
    path = arguments.resume_from_checkpoint
    if path is None:
        return 0
    path = torch_moe_ep.latest_checkpoint(path) or path
    first_step = torch_moe_ep.load_checkpoint(path, model, optimizer, scheduler=scheduler)
    if first_step >= arguments.max_steps:
        raise ValueError(
            f"{path} is at step {first_step} already, and "
            f"--max_steps is {arguments.max_steps}; pass a larger --max_steps."
        )
    return first_step


def open_log(
    arguments: argparse.Namespace,
    model: MixtralForCausalLM,
    ranks: Ranks,
    folder: Path,
    first_step: int,
) -> RunLog:
    """The run's log; rank 0's writes into `folder`."""
    return RunLog(
        folder,
        arguments.tensorboard_dir or folder / "tensorboard",
        model=model,
        is_patched=expert_parallel_degree(arguments, ranks.num_ranks) > 0,
        config=model.config,
        batch_size=arguments.train_batch_size,
        num_ranks=ranks.num_ranks,
        block_size=arguments.max_context_width,
        first_step=first_step,
        max_steps=arguments.max_steps,
        is_writer=ranks.rank == 0,
    )


def train(
    arguments: argparse.Namespace,
    model: MixtralForCausalLM,
    data: corpus.Corpus,
    ranks: Ranks,
    folder: Path,
) -> float:
    """Run the loop; return the last validation loss. Collective."""
    optimizer, scheduler = make_optimizer(arguments, model)
    first_step = resume(arguments, model, optimizer, scheduler)
    log = open_log(arguments, model, ranks, folder, first_step)
    log.reference("unigram of the training text", data.unigram_cross_entropy())
    validation_loss = math.nan
    model.train()
    for step in range(first_step, arguments.max_steps):
        started = time.perf_counter()
        lr = float(scheduler.get_last_lr()[0])
        place = (ranks.rank, ranks.num_ranks, arguments.seed)
        tokens = corpus.batch_of_step(data.train, step, arguments.train_batch_size, *place)
        loss, grad_norm = train_step(arguments, model, optimizer, tokens.to(ranks.device))
        scheduler.step()
        report = StepReport(step, loss, time.perf_counter() - started, lr, grad_norm)
        log.step(report, print_line=step % arguments.logging_freq == 0)
        num_done = step + 1
        if _is_due(arguments, num_done, arguments.validation_freq):
            validation_loss = validate(arguments, model, data.validation, ranks)
            log.validation(num_done, validation_loss)
        if _is_due(arguments, num_done, arguments.checkpoint_freq):
            torch_moe_ep.save_checkpoint(
                folder / "checkpoint" / f"step-{num_done}",
                model,
                optimizer,
                step=num_done,
                scheduler=scheduler,
                num_kept=arguments.num_kept_checkpoints,
            )
    log.close()
    return validation_loss


def _is_due(arguments: argparse.Namespace, num_done: int, frequency: int) -> bool:
    """Whether so many steps are a multiple of the frequency (0: none is), or all."""
    is_multiple = frequency > 0 and num_done % frequency == 0
    return is_multiple or num_done == int(arguments.max_steps)


def finish(
    arguments: argparse.Namespace,
    data: corpus.Corpus,
    validation_loss: float,
    seconds: float,
) -> None:
    """Draw, generate, print, write results.json. On rank 0 alone, no collective."""
    folder = arguments.runs_dir / arguments.name
    unigram = data.unigram_cross_entropy()
    write_report(folder)
    tokenizer = data_folder(arguments) / "tokenizer"
    print(write_sample(folder / "hf", tokenizer, folder / "sample.txt"))
    gain = unigram - validation_loss
    results = {
        "steps": arguments.max_steps,
        "training_seconds": round(seconds, 1),
        "validation_loss": validation_loss,
        "unigram_cross_entropy": unigram,
        "gain": gain,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    verdict = "as wanted" if gain >= arguments.min_gain else "TOO LITTLE"
    print(
        f"training took {seconds:.0f} s, up to step {arguments.max_steps}\n"
        f"validation loss {validation_loss:.3f} nats, unigram of the training text "
        f"{unigram:.3f} nats: {gain:.3f} better, "
        f"{verdict} (at least {arguments.min_gain})\n"
        f"results in {folder}/: " + ", ".join(sorted(entry.name for entry in folder.iterdir())),
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    """Launch the ranks, or be one of them."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    if "RANK" not in os.environ:
        return launch(arguments, argv)
    ranks = start_ranks(arguments)
    folder = arguments.runs_dir / arguments.name
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.resume_from_checkpoint is None:  # the latest step is to be this run's
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        if arguments.training_dir is None:
            width = arguments.max_context_width
            print(corpus.prepare(data_folder(arguments), arguments.vocab_size, width))
    dist.barrier()
    data = corpus.load(data_folder(arguments), arguments.max_context_width)
    model = build_model(arguments, data.vocab_size)
    if ranks.rank == 0:
        num_parameters = sum(p.numel() for p in model.parameters())
        degree = expert_parallel_degree(arguments, ranks.num_ranks)
        print(f"model: Mixtral, {num_parameters / 1e6:.1f} M parameters, P = {degree}", flush=True)
    shard_model(arguments, model, ranks)
    started = time.perf_counter()
    validation_loss = train(arguments, model, data, ranks, folder)
    seconds = time.perf_counter() - started
    torch_moe_ep.export_hf(model, folder / "hf")
    if ranks.rank == 0:
        finish(arguments, data, validation_loss, seconds)
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
