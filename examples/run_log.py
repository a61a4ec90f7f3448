"""What a run shows and keeps: progress bar, log line, TensorBoard, history, plots' data.

Only rank 0 writes; the other ranks hold a log that does nothing. The log line and the TensorBoard
tags are those of the SMP v2 training scripts, so that existing dashboards keep working.
"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import MixtralConfig

from torch_moe_ep.metrics import ExpertLoad


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. `loss` is the language-model loss in nats, mean over all ranks."""

    step: int
    loss: float
    seconds: float
    lr: float
    grad_norm: float


@dataclass
class History:
    """Everything the plots need.

    `expert_load` holds one [layers, experts] tensor a record: copies over an even share.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    load_steps: list[int] = field(default_factory=list)
    expert_load: list[torch.Tensor] = field(default_factory=list)


def model_flops_per_step(config: MixtralConfig, batch_size: int, block_size: int) -> float:
    """FLOPs of forward and backward for `batch_size` sequences, recomputation not counted.

    12 B S L h^2 [(1 + kv/nh + S/h) q/h + 1.5 k f/h + V/(2 L h)], q the width of all query heads.
    Mixtral 8x7B at S = 2048 costs 79.7 GFLOP a token.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads = config.num_attention_heads
    query_width = heads * (getattr(config, "head_dim", None) or hidden // heads)
    attention = (1 + config.num_key_value_heads / heads + block_size / hidden) * query_width
    experts = 1.5 * config.num_experts_per_tok * config.intermediate_size
    vocabulary = config.vocab_size / (2 * layers)
    per_hidden = (attention + experts + vocabulary) / hidden
    return 12.0 * batch_size * block_size * layers * hidden**2 * per_hidden


class RunLog:
    """Shows and records a run of `max_steps` steps.

    Args:
        folder: where history.jsonl is written.
        tensorboard_dir: where the event files go.
        config: the model's configuration, for the FLOPs.
        batch_size: sequences a rank and step.
        num_ranks: ranks that see different data.
        block_size: tokens a sequence.
        first_step, max_steps: of the progress bar.
        is_writer: True on rank 0 alone.
    """

    def __init__(
        self,
        folder: Path,
        tensorboard_dir: Path,
        *,
        config: MixtralConfig,
        batch_size: int,
        num_ranks: int,
        block_size: int,
        first_step: int,
        max_steps: int,
        is_writer: bool,
    ) -> None:
        self.history = History()
        self.is_writer = is_writer
        self.samples_per_step = batch_size * num_ranks
        self.tokens_per_step = self.samples_per_step * block_size
        self.flops_per_rank = model_flops_per_step(config, batch_size, block_size)
        self.imbalance = math.nan
        if not is_writer:
            return
        self.lines = (folder / "history.jsonl").open("a" if first_step else "w", buffering=1)
        self.board = SummaryWriter(str(tensorboard_dir))
        # A terminal gets a live bar; a log file gets one line of it every half minute.
        interval = 0.1 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(
            total=max_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=interval,
            maxinterval=interval,
        )

    def step(self, report: StepReport, *, print_line: bool) -> None:
        """Record one step; `print_line` prints the log line and writes TensorBoard too."""
        self.history.steps.append(report.step)
        self.history.losses.append(report.loss)
        if not self.is_writer:
            return
        speed = self.samples_per_step / report.seconds
        tflops = self.flops_per_rank / report.seconds / 1e12
        tokens_per_second = self.tokens_per_step / report.seconds
        self.bar.set_postfix_str(
            f"loss {report.loss:.3f}, {tokens_per_second:,.0f} tokens/s, "
            f"imbalance {self.imbalance:.2f}",
            refresh=False,
        )
        self.bar.update()
        self._write(step=report.step, loss=report.loss, seconds=report.seconds, lr=report.lr)
        if not print_line:
            return
        self.bar.write(
            f"Batch {report.step} Loss: {report.loss}, Speed: {speed:.2f} samples/sec, "
            f"Model TFLOPS/GPU: {tflops:.2f}, lr: {report.lr:.6f}, "
            f"gradnorm: {report.grad_norm:.4f}"
        )
        for tag, value in (
            ("Loss/train", report.loss),
            ("Perf/SeqPerSec", speed),
            ("Perf/ModelTFLOPs", tflops),
            ("LR/learning_rate", report.lr),
            ("Norms/grad_norm", report.grad_norm),
        ):
            self.board.add_scalar(tag, value, report.step)

    def validation(self, step: int, loss: float) -> None:
        """Record the loss on held-out text after `step` steps."""
        self.history.validation_steps.append(step)
        self.history.validation_losses.append(loss)
        if not self.is_writer:
            return
        perplexity = math.exp(loss)
        self.bar.write(
            f"Validation after batch {step}: loss {loss:.4f}, perplexity {perplexity:.1f}"
        )
        self.board.add_scalar("Loss/val", loss, step)
        self.board.add_scalar("Loss/perplexity", perplexity, step)
        self._write(step=step, validation_loss=loss)

    def expert_load(self, step: int, load: ExpertLoad) -> None:
        """Record the copies that each expert of each layer got in one step, over all ranks."""
        tokens = torch.stack(list(load.tokens.values())).double()
        self.imbalance = load.worst_imbalance
        self.history.load_steps.append(step)
        self.history.expert_load.append(tokens / tokens.mean(dim=1, keepdim=True).clamp(min=1e-12))

    def close(self) -> None:
        """Flush and close what is open."""
        if self.is_writer:
            self.bar.close()
            self.board.close()
            self.lines.close()

    def _write(self, **values: float) -> None:
        self.lines.write(json.dumps(values) + "\n")
