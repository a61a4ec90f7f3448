"""Hugging Face Trainer over FSDP2 and FSDP1, against the same Trainer on the unpatched model.

Traps of accelerate: bf16 models under mixed precision need fp32 masters (11, 12), efficient
loading is refused (13, `test_refusals.py`).
"""

from typing import Any

import pytest
import torch
from accelerate_cases import make_trainer, save_whole, training_arguments
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh
from torch_moe_ep.integrations.trainer import ExpertLoadCallback, log_expert_load
from torch_moe_ep.parallel.state import iter_experts
from torch_moe_ep.testing import relative_error, tiny_mixtral
from torch_moe_ep.testing.parallel import full_parameters

TOLERANCE = 1e-5


def train(
    folder: str, version: int, ep: int | None, resume: str | None = None, **fields: Any
) -> dict[str, Any]:
    """Losses, gradient norms, evaluation and exported weights of one run; ep None: unpatched."""
    arguments = training_arguments(folder, version, **fields)
    model = tiny_mixtral()
    options: dict[str, Any] = {}
    if ep is not None:
        apply_expert_parallel(model, init_device_mesh("cpu", ep))
        options["callbacks"] = [ExpertLoadCallback(per_layer=True)]
    trainer = make_trainer(model, arguments, **options)
    trainer.train(resume_from_checkpoint=resume)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluation = trainer.evaluate()["eval_loss"]
    if version == 2:
        save_whole(trainer, f"{folder}/final")
        weights = load_file(f"{folder}/final/model.safetensors")
    else:  # FSDP1's full state dict, plain models' too, is of a freed storage on the CPU
        weights = full_parameters(trainer.model)
    return {
        "loss": torch.tensor([step["loss"] for step in steps]),
        "norm": torch.tensor([float(step["grad_norm"]) for step in steps]),
        "eval": torch.tensor(evaluation),
        "weights": weights,
        "logs": steps,
    }


def check_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in ("loss", "norm", "eval"):
        assert relative_error(found[name], wanted[name]) < TOLERANCE, name
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, tensor in wanted["weights"].items():
        assert relative_error(found["weights"][name], tensor) < TOLERANCE, name


def check_trainer(folder: str, version: int, kind: str) -> None:
    """Accumulation, clipping, saving, evaluation, export; resumed at another P."""
    kinds = {"state_dict_type": kind}
    wanted = train(f"{folder}/reference", version, None, **kinds)
    assert (wanted["norm"] > 0.5).all()  # clipping is active
    found = train(f"{folder}/ep2", version, 2, **kinds)
    check_equal(found, wanted)
    for entry in found["logs"]:
        assert 1 <= entry["expert_imbalance_mean"] <= entry["expert_imbalance"] <= 8
        assert entry["expert_imbalance/model.layers.1.mlp.experts"] >= 1
    if version == 1:  # accelerate does not bring FSDP1's momentum back: as it is, unpatched
        wanted = train(f"{folder}/again", 1, None, f"{folder}/reference/checkpoint-2", **kinds)
    resumed = train(f"{folder}/ep1", version, 1, f"{folder}/ep2/checkpoint-2", **kinds)
    check_equal(resumed, wanted)


@pytest.mark.parametrize(
    ("version", "kind"),
    [(2, "SHARDED_STATE_DICT"), (2, "FULL_STATE_DICT"), (1, "SHARDED_STATE_DICT")],
)
def test_trainer_equals_itself_on_the_unpatched_model(ranks, tmp_path, version, kind):
    ranks(2).run(check_trainer, str(tmp_path), version, kind, timeout_s=180)
    if version == 2:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "ep2" / "final")
        assert type(model).__name__ == "MixtralForCausalLM"


def check_masters(folder: str, version: int) -> None:
    """A bf16 model under bf16 mixed precision: masters and optimizer states are fp32."""
    arguments = training_arguments(
        folder, version, bf16=True, optim="adamw_torch", learning_rate=1e-6, save_strategy="no"
    )
    model = tiny_mixtral().bfloat16()
    before = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    apply_expert_parallel(model, init_device_mesh("cpu", 2))
    trainer = make_trainer(model, arguments)
    log_expert_load(trainer)
    trainer.train()
    assert "expert_imbalance" in trainer.state.log_history[0]
    for experts in iter_experts(trainer.model):
        for param in experts.parameters(recurse=False):
            assert isinstance(param, DTensor)
            assert param.dtype == param.to_local().dtype == torch.float32
            state = trainer.optimizer.state[param]
            assert state["exp_avg"].dtype == torch.float32
            assert float(state["exp_avg_sq"].to_local().abs().max()) > 0
    moved = next(iter_experts(trainer.model)).down_proj.full_tensor() - before.float()
    # Four steps of 1e-6 at most: bf16 masters would not have moved at all.
    assert 0 < float(moved.abs().max()) < 1e-5


@pytest.mark.parametrize("version", [2, 1])
def test_trap_11_12_bf16_models_get_fp32_masters(ranks, tmp_path, version):
    ranks(2).run(check_masters, str(tmp_path), version, timeout_s=120)


def check_full_fsdp1(folder: str) -> None:
    arguments = training_arguments(folder, 1, "FULL_STATE_DICT", max_steps=1, save_steps=1)
    model = apply_expert_parallel(tiny_mixtral(), init_device_mesh("cpu", 2))
    with pytest.raises(ValueError, match="one rank's shards of the experts"):
        make_trainer(model, arguments).train()


def test_fsdp1_full_optimizer_state_is_refused(ranks, tmp_path):
    ranks(2).run(check_full_fsdp1, str(tmp_path))


def check_callback(folder: str) -> None:
    arguments = training_arguments(folder, 2)
    with pytest.raises(ValueError, match="needs an expert-parallel model"):
        make_trainer(tiny_mixtral(), arguments, callbacks=[ExpertLoadCallback()]).train()
    arguments = training_arguments(folder, 2, max_steps=1, save_strategy="no")
    model = tiny_mixtral()
    apply_expert_parallel(
        model, init_device_mesh("cpu", 2), MoEConfig(routing="aux_loss", z_loss_coeff=0.01)
    )
    trainer = make_trainer(model, arguments, callbacks=[ExpertLoadCallback()])
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["router_z_loss"] > 0 and entry["router_aux_loss"] > 0
    assert entry["router_dropped"] == 0


def test_callback_reports_the_routers_losses_and_refuses_other_models(ranks, tmp_path):
    ranks(2).run(check_callback, str(tmp_path))
