"""Train a Mixtral as SMP v2 scripts do; every rank is a data-parallel rank.

    torchrun --nproc-per-node 4 -m examples.smp_style.train --expert_parallel_degree 2 --bf16 0

Checkpoints are those of `torch_moe_ep.save_checkpoint`: they resume at any other degree.
"""

import argparse
import functools
import logging
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import torch_moe_ep
import torch_moe_ep.integrations.smp as tsm
from examples import corpus
from examples.launch import node_folders
from examples.leave import leave
from examples.run_log import model_flops_per_step
from examples.smp_style.arguments import LATEST, parse_arguments
from examples.smp_style.model import make_config, make_model
from torch_moe_ep.metrics import JsonLines, Recorder
from torch_moe_ep.parallel.state import iter_experts

logger = tsm.logger.get_logger()


def learning_rate_factor(arguments: argparse.Namespace, step: int) -> float:
    """Linear warm-up, then a cosine down to min_lr at lr_decay_iters, then flat."""
    warmup = arguments.warmup * arguments.lr_decay_iters
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1.0, arguments.lr_decay_iters - warmup))
    lowest = arguments.min_lr / arguments.lr
    return lowest + (1.0 - lowest) * 0.5 * (1.0 + math.cos(math.pi * progress))


def mean_over_ranks(*values: torch.Tensor) -> list[float]:
    """The means of numbers over all ranks. Collective; waits for the device."""
    total = torch.stack([value.detach().float() for value in values])
    dist.all_reduce(total)
    return [value / dist.get_world_size() for value in total.tolist()]


def loss_of(model: nn.Module, ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The language-model loss of one batch; labels are the input ids."""
    ids = ids.to(device)
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


@torch.no_grad()
def validate(
    arguments: argparse.Namespace, model: nn.Module, blocks: torch.Tensor, device: torch.device
) -> float:
    """Mean loss of the first validation batches, each rank taking its own."""
    model.eval()
    total = torch.zeros((), device=device)
    for batch in range(arguments.validation_batches):
        ids = corpus.batch_of_step(
            blocks, batch, arguments.val_batch_size, dist.get_rank(), dist.get_world_size(), 0
        )
        total += loss_of(model, ids, device) / arguments.validation_batches
    model.train()
    return mean_over_ranks(total)[0]


class Script:
    """One run: model, optimizer, schedule and what is written."""

    def __init__(
        self, arguments: argparse.Namespace, data: corpus.Corpus, device: torch.device
    ) -> None:
        self.arguments, self.data, self.device = arguments, data, device
        self.model = make_model(arguments, data.vocab_size, device)
        self.optimizer = torch.optim.AdamW(
            torch_moe_ep.param_groups(self.model, weight_decay=arguments.weight_decay),
            lr=arguments.lr,
            betas=(arguments.beta1, arguments.beta2),
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, functools.partial(learning_rate_factor, arguments)
        )
        self.step = 0
        self.is_stopping = False
        is_writing = dist.get_rank() == 0 and arguments.tensorboard_dir is not None
        self.board = SummaryWriter(arguments.tensorboard_dir) if is_writing else None
        self.history: JsonLines | None = None
        self.recorder: Recorder | None = None

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint, or from the newest in a folder; the degree may be another."""
        newest = torch_moe_ep.latest_checkpoint(path)
        if newest is None and path == self.arguments.checkpoint_dir:
            logger.info("no checkpoint in %s yet: starting", path)
            return
        self.step = torch_moe_ep.load_checkpoint(
            path if newest is None else newest,
            self.model,
            self.optimizer,
            scheduler=self.scheduler,
        )
        logger.info("resumed at step %d", self.step)

    def save(self) -> None:
        """Write a checkpoint of this step, keep the newest few."""
        path = self.arguments.checkpoint_dir / f"mixtral-{self.step}steps"
        torch_moe_ep.save_checkpoint(
            path,
            self.model,
            self.optimizer,
            step=self.step,
            scheduler=self.scheduler,
            num_kept=self.arguments.num_kept_checkpoints,
        )
        if self.arguments.checkpoints_per_node:
            node_folders.publish_here(path, self.arguments.num_kept_checkpoints)

    def train_step(self) -> None:
        """One optimizer step, and its log line."""
        arguments = self.arguments
        started = time.perf_counter()
        ids = corpus.batch_of_step(
            self.data.train,
            self.step,
            arguments.train_batch_size,
            dist.get_rank(),
            dist.get_world_size(),
            arguments.seed,
        )
        loss = loss_of(self.model, ids, self.device)
        loss.backward()
        norm = tsm.grad_norm.clip_grad_norm_(self.model, arguments.grad_clip)
        lr = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.step += 1
        if self.recorder is not None:
            self.recorder.step(self.step - 1)
        if self.step % arguments.logging_freq == 0:
            mean, stop = mean_over_ranks(loss, self.stop_wanted())  # waits for the step
            self.is_stopping = stop > 0
            self.report(mean, time.perf_counter() - started, lr, norm.item(), ids.shape[1])

    def stop_wanted(self) -> torch.Tensor:
        """1 on rank 0 once the stop file is there, else 0."""
        path = self.arguments.stop_file
        is_wanted = path is not None and dist.get_rank() == 0 and path.exists()
        return torch.tensor(float(is_wanted), device=self.device)

    def report(self, loss: float, seconds: float, lr: float, norm: float, width: int) -> None:
        """The log line and the TensorBoard tags of one step."""
        batch = self.arguments.train_batch_size
        config = make_config(self.arguments, self.data.vocab_size)
        speed = batch * dist.get_world_size() / seconds
        tflops = model_flops_per_step(config, batch, width) / seconds / 1e12
        logger.info(
            "Batch %d Loss: %s, Speed: %.2f samples/sec, Model TFLOPS/GPU: %.2f, lr: %.6f, "
            "gradnorm: %.4f",
            self.step - 1, loss, speed, tflops, lr, norm,
        )  # fmt: skip
        self.write({"Loss/train": loss, "Perf/SeqPerSec": speed, "Perf/ModelTFLOPs": tflops,
                    "LR/learning_rate": lr, "Norms/grad_norm": norm})  # fmt: skip
        self.note(step=self.step - 1, loss=loss, seconds=seconds, lr=lr, grad_norm=norm,
                  tokens_per_second=speed * width)  # fmt: skip

    def report_validation(self) -> None:
        """Validate, log and write."""
        loss = validate(self.arguments, self.model, self.data.validation, self.device)
        logger.info("Batch %d Validation loss: %s", self.step - 1, loss)
        self.write({"Loss/val": loss, "Loss/perplexity": math.exp(loss)})
        self.note(step=self.step, validation_loss=loss)

    def open_history(self) -> None:
        """Start history.jsonl and experts.jsonl, which `torch_moe_ep.report` draws."""
        folder, is_resumed = self.arguments.checkpoint_dir, self.step > 0
        writers = []
        if dist.get_rank() == 0:
            self.history = JsonLines(folder / "history.jsonl", append=is_resumed)
            writers = [JsonLines(folder / "experts.jsonl", append=is_resumed)]
        if any(True for _ in iter_experts(self.model)):
            self.recorder = Recorder(self.model, *writers, every=self.arguments.logging_freq)

    def note(self, **values: float) -> None:
        """A line of history.jsonl, on rank 0."""
        if self.history is not None:
            self.history(values)

    def write(self, values: dict[str, float]) -> None:
        """Write numbers under their tags, on rank 0 with a TensorBoard folder."""
        if self.board is not None:
            for tag, value in values.items():
                self.board.add_scalar(tag, value, self.step - 1)

    def run(self) -> None:
        """Train to the last step, or to a stop, validating and saving on the way and at the end."""
        arguments = self.arguments
        self.open_history()
        while self.step < arguments.max_steps and not self.is_stopping:
            self.train_step()
            is_last = self.step == arguments.max_steps
            if is_last or _is_due(self.step, arguments.validation_freq):
                self.report_validation()
            if is_last or self.is_stopping or _is_due(self.step, arguments.checkpoint_freq):
                self.save()
        if self.step < arguments.max_steps:
            logger.info("stopped after step %d: %s is there", self.step - 1, arguments.stop_file)
        if self.recorder is not None:
            self.recorder.flush()
        if self.board is not None:
            self.board.close()


def _is_due(step: int, frequency: int) -> bool:
    return frequency > 0 and step % frequency == 0


def load_data(arguments: argparse.Namespace) -> corpus.Corpus:
    """The packed data of training_dir, or CPython's manual, packed by rank 0."""
    folder = arguments.training_dir
    if folder is None:
        folder = arguments.checkpoint_dir / "data"
        if dist.get_rank() == 0:
            logger.info(corpus.prepare(folder, arguments.vocab_size, arguments.max_context_width))
        dist.barrier()
    return corpus.load(folder, arguments.max_context_width)


def main(argv: list[str] | None = None) -> int:
    """Be one rank; torchrun starts all."""
    arguments = parse_arguments(argv)
    dist.init_process_group()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO if dist.get_rank() == 0 else logging.ERROR)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    tsm.init(
        {
            "expert_parallel_degree": arguments.expert_parallel_degree,
            "hybrid_shard_degree": arguments.hybrid_shard_degree,
            "random_seed": arguments.seed,
        }
    )
    script = Script(arguments, load_data(arguments), device)
    resume_from = arguments.resume_from_checkpoint
    if resume_from is not None:
        script.resume(arguments.checkpoint_dir if resume_from == LATEST else resume_from)
    script.run()
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
