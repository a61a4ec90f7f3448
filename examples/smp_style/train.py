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
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import torch_moe_ep
import torch_moe_ep.integrations.smp as tsm
from examples import corpus
from examples.leave import leave
from examples.run_log import model_flops_per_step
from examples.sizes import sizes_of
from examples.smp_style.arguments import parse_arguments
from torch_moe_ep.integrations.smp.delayed_param import DelayedParamIniter
from torch_moe_ep.integrations.smp.tensor_parallel.transformer import TransformerLayer

logger = tsm.logger.get_logger()


def make_config(arguments: argparse.Namespace, vocab_size: int) -> MixtralConfig:
    """Mixtral's configuration with the sizes of the arguments."""
    return MixtralConfig(
        **sizes_of(arguments, vocab_size),
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def make_model(arguments: argparse.Namespace, vocab_size: int, device: torch.device) -> nn.Module:
    """Build, transform and wrap the model; weights are drawn, or rank 0's."""
    pretrained = arguments.hf_pretrained_model_name_or_dir
    is_meta = bool(arguments.delayed_param) and not pretrained
    torch.manual_seed(arguments.seed)
    if pretrained and dist.get_rank() == 0:
        model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    else:
        with torch.device("meta" if is_meta or pretrained else "cpu"):
            config = make_config(arguments, vocab_size)
            if pretrained:
                config = MixtralConfig.from_pretrained(pretrained)
            model = MixtralForCausalLM(config)
    model = tsm.transform(
        model,
        config=tsm.MoEConfig(moe_load_balancing=arguments.moe_load_balancing),
        load_state_dict_from_rank0=bool(pretrained),
    )
    initer = DelayedParamIniter(model)
    policy = functools.partial(
        transformer_auto_wrap_policy, transformer_layer_cls={TransformerLayer}
    )
    mixed = MixedPrecision(torch.bfloat16, torch.float32) if arguments.bf16 else None
    with warnings.catch_warnings(), initer.validate_params_and_buffers_inited():
        warnings.simplefilter("ignore")
        wrapped = tsm.FullyShardedDataParallel(
            model,
            auto_wrap_policy=policy,
            mixed_precision=mixed,
            sharding_strategy=ShardingStrategy.FULL_SHARD,
            device_id=device,
            use_orig_params=True,
            param_init_fn=initer.get_param_init_fn() if is_meta else None,
            post_param_init_fn=initer.get_post_param_init_fn() if is_meta else None,
        )
    if arguments.activation_checkpointing:
        apply_activation_checkpointing(
            wrapped,
            checkpoint_wrapper_fn=checkpoint_wrapper,
            check_fn=lambda module: isinstance(module, TransformerLayer),
        )
    return wrapped


def learning_rate_factor(arguments: argparse.Namespace, step: int) -> float:
    """Linear warm-up, then a cosine down to min_lr at lr_decay_iters, then flat."""
    warmup = arguments.warmup * arguments.lr_decay_iters
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1.0, arguments.lr_decay_iters - warmup))
    lowest = arguments.min_lr / arguments.lr
    return lowest + (1.0 - lowest) * 0.5 * (1.0 + math.cos(math.pi * progress))


def mean_over_ranks(value: torch.Tensor) -> float:
    """The mean of a number over all ranks."""
    total = value.detach().float().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


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
    return mean_over_ranks(total)


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
        is_writing = dist.get_rank() == 0 and arguments.tensorboard_dir is not None
        self.board = SummaryWriter(arguments.tensorboard_dir) if is_writing else None

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint, or from the newest in a folder; the degree may be another."""
        newest = torch_moe_ep.latest_checkpoint(path)
        self.step = torch_moe_ep.load_checkpoint(
            path if newest is None else newest,
            self.model,
            self.optimizer,
            scheduler=self.scheduler,
        )
        logger.info("resumed at step %d", self.step)

    def save(self) -> None:
        """Write a checkpoint of this step, keep the newest few."""
        torch_moe_ep.save_checkpoint(
            self.arguments.checkpoint_dir / f"mixtral-{self.step}steps",
            self.model,
            self.optimizer,
            step=self.step,
            scheduler=self.scheduler,
            num_kept=self.arguments.num_kept_checkpoints,
        )

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
        if self.step % arguments.logging_freq == 0:
            mean = mean_over_ranks(loss)  # waits for the step
            self.report(mean, time.perf_counter() - started, lr, norm.item(), ids.shape[1])

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

    def report_validation(self) -> None:
        """Validate, log and write."""
        loss = validate(self.arguments, self.model, self.data.validation, self.device)
        logger.info("Batch %d Validation loss: %s", self.step - 1, loss)
        self.write({"Loss/val": loss, "Loss/perplexity": math.exp(loss)})

    def write(self, values: dict[str, float]) -> None:
        """Write numbers under their tags, on rank 0 with a TensorBoard folder."""
        if self.board is not None:
            for tag, value in values.items():
                self.board.add_scalar(tag, value, self.step - 1)

    def run(self) -> None:
        """Train to the last step, validating and saving on the way and at the end."""
        arguments = self.arguments
        while self.step < arguments.max_steps:
            self.train_step()
            is_last = self.step == arguments.max_steps
            if is_last or _is_due(self.step, arguments.validation_freq):
                self.report_validation()
            if is_last or _is_due(self.step, arguments.checkpoint_freq):
                self.save()
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
    if arguments.resume_from_checkpoint is not None:
        script.resume(arguments.resume_from_checkpoint)
    script.run()
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
