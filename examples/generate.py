"""Text from an exported model, by transformers alone: the proof that the export is complete."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ("The assignment statement", "If the class", "A list is")


def write_sample(model_folder: Path, tokenizer_folder: Path, path: Path) -> str:
    """Generate after three prompts with the exported model on the CPU; write and return the text.

    The tokenizer is saved beside the weights, so that `model_folder` serves on its own.
    """
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.train(False)
    model.config.output_router_logits = False  # for training's auxiliary loss
    torch.manual_seed(0)
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(
            **inputs,
            max_new_tokens=60,
            do_sample=True,
            temperature=0.7,
            top_k=40,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts.append(str(tokenizer.decode(output[0], skip_special_tokens=True)))
    text = "\n----\n".join(texts) + "\n"
    path.write_text(text)
    return text
