"""Methods of Hugging Face Trainer that go wrong where sharded experts stand beside plain tensors.

Without FSDP2 the dense parameters of a patched model are plain (DDP, none) or flat (FSDP1):

    _mixed_mesh_grad_norm  takes DTensors for transformers' own expert parallelism: experts on a
                           mesh of one dimension, the rest replicated. Ours are on a mesh of two,
                           and it fails; `clip_grad_norm_` answers.
    save_model             lets rank 0 save alone where there is no FSDP: all ranks export.
    _save_checkpoint       would save rank 0's shards of the optimizer's state there, and with
                           FSDP1's full state dicts: refused.

Other models go on to Trainer's own methods. A Trainer that lacks one of them is left as it is.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torch_moe_ep.parallel.grad_norm import clip_grad_norm_
from torch_moe_ep.parallel.state import states_of

NO_CHECKPOINTS = (
    "without FSDP Trainer saves one rank's experts and optimizer state as if they were all; use "
    'fsdp=True, or save_strategy="no" with torch_moe_ep.save_checkpoint (to resume) and '
    "trainer.save_model (the model alone)."
)


def register_trainer_methods() -> None:
    """Answer for patched models, once per process, if Trainer is imported."""
    module: Any = sys.modules.get("transformers.trainer")
    trainer = getattr(module, "Trainer", None)
    if trainer is None or hasattr(trainer, "_is_torch_moe_ep"):
        return
    trainer._is_torch_moe_ep = True
    answers: dict[str, Callable[..., Any]] = {
        "_mixed_mesh_grad_norm": _grad_norm,
        "save_model": _save_model,
        "_save_checkpoint": _save_checkpoint,
    }
    for name, answer in answers.items():
        original = getattr(trainer, name, None)
        if original is not None:
            setattr(trainer, name, _bound(answer, original))


def _bound(answer: Callable[..., Any], original: Any) -> Any:
    @functools.wraps(original)
    def method(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        return answer(original, trainer, *args, **kwargs)

    return method


def _grad_norm(original: Any, trainer: Any, model: nn.Module, max_norm: float) -> torch.Tensor:
    if states_of(model):
        return clip_grad_norm_(model, max_norm)
    norm: torch.Tensor = original(trainer, model, max_norm)
    return norm


def _save_model(
    original: Any, trainer: Any, output_dir: str | None = None, _internal_call: bool = False
) -> None:
    if not is_without_fsdp(trainer):
        original(trainer, output_dir, _internal_call)
        return
    folder = trainer.args.output_dir if output_dir is None else output_dir
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.save_pretrained(folder)
    if trainer.args.should_save and trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(folder)


def _save_checkpoint(original: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
    if is_without_fsdp(trainer):
        raise ValueError(NO_CHECKPOINTS)
    if _saves_full_fsdp1(trainer):
        raise ValueError(
            "FSDP1's full optimizer state holds one rank's shards of the experts; set "
            'state_dict_type to "SHARDED_STATE_DICT" in fsdp_config, or take FSDP2.'
        )
    original(trainer, *args, **kwargs)


def _saves_full_fsdp1(trainer: Any) -> bool:
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None or getattr(plugin, "fsdp_version", 1) != 1 or not states_of(trainer.model):
        return False
    return "FULL" in str(plugin.state_dict_type) and not trainer.args.save_only_model


def is_without_fsdp(trainer: Any) -> bool:
    """Whether a trainer's model is patched, and nothing shards its dense parameters."""
    return not trainer.is_fsdp_enabled and bool(states_of(trainer.model))
