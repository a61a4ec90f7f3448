"""What a run shows and keeps: progress bar, log line, TensorBoard, history and experts' load.

Only rank 0 writes; the other ranks hold a log that does nothing. The log line and the TensorBoard
tags are those of the SMP v2 training scripts, so that existing dashboards keep working.
`python -m torch_moe_ep.report` draws what is in history.jsonl and experts.jsonl.
"""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import MixtralConfig

from torch_moe_ep.metrics import JsonLines, Recorder, TensorBoard


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. `loss` is the language-model loss in nats, mean over all ranks."""

    step: int
    loss: float
    seconds: float
    lr: float
    grad_norm: float


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
        folder: where history.jsonl and experts.jsonl are written.
        model: its experts are recorded, if it is patched; loaded from its checkpoint already.
        tensorboard_dir: where the event files go.
        is_patched: whether it is.
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
        model: torch.nn.Module,
        is_patched: bool,
        config: MixtralConfig,
        batch_size: int,
        num_ranks: int,
        block_size: int,
        first_step: int,
        max_steps: int,
        is_writer: bool,
    ) -> None:
        self.is_writer = is_writer
        self.samples_per_step = batch_size * num_ranks
        self.tokens_per_step = self.samples_per_step * block_size
        self.flops_per_rank = model_flops_per_step(config, batch_size, block_size)
        self.recorder: Recorder | None = None
        writers: list[JsonLines | TensorBoard] = []
        if is_writer:
            self.history = JsonLines(folder / "history.jsonl", append=first_step > 0)
            self.board = SummaryWriter(str(tensorboard_dir))
            writers = [JsonLines(folder / "experts.jsonl", append=first_step > 0)]
            writers.append(TensorBoard(self.board))
        if is_patched:
            self.recorder = Recorder(model, *writers)
        if not is_writer:
            return
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
        """Record one step; `print_line` prints the log line and writes TensorBoard too.

        Collective for a patched model: its counters are added up over all ranks.
        """
        if self.recorder is not None:
            self.recorder.step(report.step)
        if not self.is_writer:
            return
        speed = self.samples_per_step / report.seconds
        tflops = self.flops_per_rank / report.seconds / 1e12
        tokens_per_second = self.tokens_per_step / report.seconds
        self.bar.set_postfix_str(
            f"loss {report.loss:.3f}, {tokens_per_second:,.0f} tokens/s{self._imbalance()}",
            refresh=False,
        )
        self.bar.update()
        self.history({**asdict(report), "tokens_per_second": tokens_per_second})
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

    def _imbalance(self) -> str:
        last = None if self.recorder is None else self.recorder.last
        return "" if last is None else f", imbalance {last['imbalance']:.2f}"

    def validation(self, step: int, loss: float) -> None:
        """Record the loss on held-out text after `step` steps."""
        if not self.is_writer:
            return
        perplexity = math.exp(loss)
        self.bar.write(
            f"Validation after batch {step}: loss {loss:.4f}, perplexity {perplexity:.1f}"
        )
        self.board.add_scalar("Loss/val", loss, step)
        self.board.add_scalar("Loss/perplexity", perplexity, step)
        self.history({"step": step, "validation_loss": loss})

    def reference(self, name: str, loss: float) -> None:
        """Record a loss to compare with."""
        if self.is_writer:
            self.history({"reference_losses": {name: loss}})

    def close(self) -> None:
        """Write what has not arrived yet, and close what is open."""
        if self.recorder is not None:
            self.recorder.flush()
        if self.is_writer:
            self.bar.close()
            self.board.close()
            self.history.close()
