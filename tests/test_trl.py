"""TRL's SFTTrainer, unchanged, on a patched model: chats, gradient checkpointing, LoRA."""

import os
from typing import Any

import pytest
import torch
from accelerate_cases import fresh_accelerate, settle_device
from torch import nn

from examples.corpus import train_tokenizer
from torch_moe_ep import apply_expert_parallel, init_device_mesh
from torch_moe_ep.integrations.trainer import ExpertLoadCallback
from torch_moe_ep.testing import assert_close, relative_error, tiny_mixtral
from torch_moe_ep.testing.parallel import full_parameters

pytest.importorskip("trl", reason="needs trl and datasets: pip install trl")
TOLERANCE = 1e-5
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{{ eos_token }}{% endfor %}"
)
CHATS = [
    [
        {"role": "user", "content": f"What is {left} and {right}?"},
        {"role": "assistant", "content": f"It is {left + right}, and so on. " * (1 + left % 3)},
    ]
    for left, right in [(1, 2), (2, 7), (3, 3), (4, 1), (5, 0), (6, 9), (7, 2), (8, 8)]
]


def sft_arguments(folder: str) -> Any:
    from accelerate.state import DistributedType, PartialState
    from trl import SFTConfig

    os.environ["HF_DATASETS_CACHE"] = folder
    fresh_accelerate()
    arguments = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=0.5,
        optim="sgd",
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        fsdp=True,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["MixtralDecoderLayer"]},
    )
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return arguments


def train(folder: str, model: nn.Module, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    from datasets import Dataset
    from trl import SFTTrainer

    texts = [turn["content"] for chat in CHATS for turn in chat]
    tokenizer = train_tokenizer(texts, 280)
    tokenizer.chat_template = TEMPLATE
    trainer = SFTTrainer(
        model=model,
        train_dataset=Dataset.from_list([{"messages": chat} for chat in CHATS]),
        processing_class=tokenizer,
        **options,
    )
    settle_device()
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


def check_sft(folder: str) -> None:
    plain, wanted = train(folder, tiny_mixtral(vocab_size=280), args=sft_arguments(folder))
    arguments = sft_arguments(folder)
    model = apply_expert_parallel(tiny_mixtral(vocab_size=280), init_device_mesh("cpu", 2))
    trainer, found = train(folder, model, args=arguments, callbacks=[ExpertLoadCallback()])
    assert len(found) == 2
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine["expert_imbalance"] >= 1
        for name in ("loss", "grad_norm", "mean_token_accuracy"):
            values = torch.tensor([float(entry[name]) for entry in (mine, theirs)])
            assert relative_error(values[:1], values[1:]) < TOLERANCE, name
    assert_close(full_parameters(trainer.model), full_parameters(plain.model), TOLERANCE)


def test_sft_trainer_equals_itself_on_the_unpatched_model(ranks, tmp_path):
    ranks(2).run(check_sft, str(tmp_path), timeout_s=180)


def check_sft_with_lora(folder: str) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    def lora(**options: Any) -> nn.Module:
        torch.manual_seed(3)
        config = LoraConfig(
            r=4,
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            **options,
        )
        return get_peft_model(tiny_mixtral(vocab_size=280), config)

    arguments = sft_arguments(folder)
    model = apply_expert_parallel(lora(), init_device_mesh("cpu", 2))
    trainer, _ = train(folder, model, args=arguments)
    trainer.save_model(f"{folder}/adapter")
    torch.distributed.barrier()
    loaded = PeftModel.from_pretrained(tiny_mixtral(vocab_size=280), f"{folder}/adapter")
    _, wanted = train(folder, lora(), args=sft_arguments(folder))
    _, found = trainer, [entry for entry in trainer.state.log_history if "loss" in entry]
    for mine, theirs in zip(found, wanted, strict=True):
        assert abs(float(mine["loss"]) - float(theirs["loss"])) < TOLERANCE * theirs["loss"]
    moved = [p for name, p in loaded.named_parameters() if "experts" in name and "lora_B" in name]
    assert len(moved) == 4 and all(bool(param.abs().max() > 0) for param in moved)
    model = apply_expert_parallel(tiny_mixtral(vocab_size=280), init_device_mesh("cpu", 2))
    with pytest.raises(ValueError, match="call get_peft_model first"):
        train(folder, model, args=sft_arguments(folder), peft_config=LoraConfig(r=4))


def test_sft_trainer_with_lora_on_experts(ranks, tmp_path):
    ranks(2).run(check_sft_with_lora, str(tmp_path), timeout_s=180)
