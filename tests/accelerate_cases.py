"""accelerate and Trainer on CPU ranks, with the FSDP that they keep for GPUs.

accelerate turns FSDP on for GPU-like kinds only and keeps its state for the life of a process.
`fresh_accelerate` forgets that state and makes the ranks look like such a kind; tensors stay on
the CPU.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from torch import nn
from transformers import Trainer, TrainingArguments

from torch_moe_ep.testing import batch_of

LEARNING_RATE = 0.5


def fresh_accelerate() -> None:
    """Forget accelerate's state; the next Accelerator may use FSDP on the CPU."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT="29500", LOCAL_WORLD_SIZE=str(dist.get_world_size())
    )
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def training_arguments(
    folder: str, version: int, state_dict_type: str = "SHARDED_STATE_DICT", **fields: Any
) -> TrainingArguments:
    """Four steps of SGD with two micro-batches each, clipped, under FSDP1 or FSDP2."""
    fresh_accelerate()
    fsdp_config: dict[str, Any] = {
        "version": version,
        "transformer_layer_cls_to_wrap": ["MixtralDecoderLayer"],
        "state_dict_type": state_dict_type,
    }
    if version == 1:
        fsdp_config["sync_module_states"] = False  # needs a GPU
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": LEARNING_RATE,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "fsdp": True,
        "fsdp_config": fsdp_config,
    }
    arguments = TrainingArguments(output_dir=folder, **{**defaults, **fields})
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return arguments


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """A data set: sequences of 12 tokens with labels."""
    batches = [batch_of(index, tokens=12, rows=1) for index in range(count)]
    return [{name: tensor[0] for name, tensor in batch.items()} for batch in batches]


def make_trainer(model: nn.Module, arguments: TrainingArguments, **options: Any) -> Trainer:
    """A stock Trainer over 32 sequences, evaluated on 5 (uneven over the ranks)."""
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows(32), eval_dataset=rows(5), **options
    )
    settle_device()
    return trainer


def settle_device() -> None:
    """What accelerate calls "cpu:0" FSDP1 calls "cpu"."""
    for state in (AcceleratorState, PartialState):
        state._shared_state["device"] = torch.device("cpu")


def save_whole(trainer: Trainer, folder: str) -> None:
    """`save_model` in full, as Hugging Face's documents do it at the end of a training."""
    trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(folder)
    dist.barrier()
