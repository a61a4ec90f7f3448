"""Hugging Face Trainer, and trainers made of it (TRL): expert load in their logs.

Everything else of Trainer works on a patched model as it is; `docs/hosts.md` has the order of
calls and what Trainer and accelerate cannot do.
"""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from torch_moe_ep import metrics
from torch_moe_ep.integrations.trainer_methods import NO_CHECKPOINTS
from torch_moe_ep.parallel.state import states_of


class ExpertLoadCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Adds the experts' load since the last log to what Trainer logs.

    ``expert_imbalance`` is the largest max / mean of copies per expert over all layers (1 is
    even), ``expert_imbalance_mean`` their mean; `per_layer` adds ``expert_imbalance/<layer>``, and
    routers that add losses ``router_z_loss``, ``router_aux_loss`` and ``router_dropped``.

    Args:
        per_layer: log every layer's imbalance as well.

    Raises:
        ValueError: when training begins, if the model is not expert-parallel, or if Trainer would
            save checkpoints without FSDP.

    Collective over all ranks at every log (Trainer logs on all of them), one host sync there.
    """

    def __init__(self, per_layer: bool = False) -> None:
        self.per_layer = per_layer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_others: Any,
    ) -> None:
        """Start counting; evaluation and earlier training do not count."""
        if model is None or not states_of(model):
            raise ValueError(
                "ExpertLoadCallback needs an expert-parallel model; call apply_expert_parallel "
                "before Trainer is made."
            )
        is_sharded = any(s.fsdp1_modules() or s.fsdp2_modules() for s in states_of(model))
        if args.save_strategy != "no" and not is_sharded:
            raise ValueError(NO_CHECKPOINTS)
        metrics.expert_load(model, reset=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **_others: Any,
    ) -> None:
        """Put the figures into `logs` and into the state's history."""
        if model is None or logs is None or "loss" not in logs:
            return
        found = self._figures(model)
        logs.update(found)
        state.log_history[-1].update(found)

    def _figures(self, model: nn.Module) -> dict[str, float]:
        imbalance = metrics.expert_load(model, reset=True).imbalance
        found = {
            "expert_imbalance": max(imbalance.values()),
            "expert_imbalance_mean": sum(imbalance.values()) / len(imbalance),
        }
        if self.per_layer:
            found |= {f"expert_imbalance/{name}": value for name, value in imbalance.items()}
        if any(state.routers for state in states_of(model)):
            losses = metrics.router_losses(model, reset=True)
            found["router_z_loss"] = sum(losses.z_loss.values())
            found["router_aux_loss"] = sum(losses.aux_loss.values())
            found["router_dropped"] = max(losses.dropped_share.values())
        return found


def log_expert_load(trainer: Any, per_layer: bool = False) -> None:
    """Add an `ExpertLoadCallback` to a trainer ahead of its reporters, such as TensorBoard.

    A callback passed to the trainer's constructor comes after them, so that its figures reach the
    progress bar and the history alone.

    Args:
        trainer: a transformers Trainer, or one made of it.
        per_layer: see `ExpertLoadCallback`.

    Not collective.
    """
    trainer.callback_handler.callbacks.insert(0, ExpertLoadCallback(per_layer))
