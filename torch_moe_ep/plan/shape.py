"""The numbers of a model that bytes and seconds depend on.

They come from a ``config.json``, or for well-known models from the table below, so that planning
needs neither the hub nor transformers. A family is listed once its parameters and activations are
compared with transformers' own class in tests/test_plan.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """A decoder with one mixture of experts in every layer.

    Attributes:
        name: as given.
        vocab: entries of the vocabulary.
        hidden: H.
        layers: decoder layers.
        heads: attention heads.
        kv_heads: heads of keys and values.
        head_dim: elements of a head.
        experts: E.
        top_k: K.
        expert_width: I.
        shared_width: width of the shared expert beside the routed ones; 0: there is none.
        qk_norm: "" none, "head" a norm over each head of queries and keys, "full" over all.
        has_qkv_bias: biases of the query, key and value projections.
        has_output_bias: bias of attention's output projection.
        is_tied: embedding and output head are one tensor.
    """

    name: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    expert_width: int
    shared_width: int = 0
    qk_norm: str = ""
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    is_tied: bool = False

    @property
    def query_width(self) -> int:
        """Elements of a token's queries."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Elements of a token's keys, and of its values."""
        return self.kv_heads * self.head_dim


# What the families' config.json call I; further fields are read in `from_config`.
FAMILIES = {
    "mixtral": "intermediate_size",
    "qwen2_moe": "moe_intermediate_size",
    "qwen3_moe": "moe_intermediate_size",
    "olmoe": "intermediate_size",
}
EXPERTS = ("num_local_experts", "num_experts")  # what E is called, by family and by who saved it

# name, vocabulary, H, layers, heads, key heads, head size, E, K, I: from each model's config.json.
KNOWN = {
    shape.name.lower(): shape
    for shape in (
        ModelShape("mistralai/Mixtral-8x7B-v0.1", 32000, 4096, 32, 32, 8, 128, 8, 2, 14336),
        ModelShape(
            "mistralai/Mixtral-8x7B-Instruct-v0.1", 32000, 4096, 32, 32, 8, 128, 8, 2, 14336
        ),
        ModelShape("mistralai/Mixtral-8x22B-v0.1", 32000, 6144, 56, 48, 8, 128, 8, 2, 16384),
        ModelShape(
            "Qwen/Qwen1.5-MoE-A2.7B", 151936, 2048, 24, 16, 16, 128, 60, 4, 1408,
            shared_width=5632, has_qkv_bias=True,
        ),
        ModelShape(
            "Qwen/Qwen2-57B-A14B", 151936, 3584, 28, 28, 4, 128, 64, 8, 2560,
            shared_width=20480, has_qkv_bias=True,
        ),
        ModelShape(
            "Qwen/Qwen3-30B-A3B", 151936, 2048, 48, 32, 4, 128, 128, 8, 768, qk_norm="head"
        ),
        ModelShape(
            "Qwen/Qwen3-235B-A22B", 151936, 4096, 94, 64, 4, 128, 128, 8, 1536, qk_norm="head"
        ),
        ModelShape("allenai/OLMoE-1B-7B-0924", 50304, 2048, 16, 16, 16, 128, 64, 8, 1024,
               qk_norm="full"),
    )
}  # fmt: skip


def find_shape(model: str) -> ModelShape:
    """The shape of a known model, or of a config.json.

    Args:
        model: a name of KNOWN in any case, a config.json, or a folder that holds one.

    Raises:
        ValueError: neither; or a config.json of another family, or one that lacks a number.
    """
    known = KNOWN.get(model.lower())
    if known is not None:
        return known
    path = Path(model)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        names = ", ".join(shape.name for shape in KNOWN.values())
        raise ValueError(
            f"{model} is no model that is known offline ({names}) and no config.json; download "
            f"the model's config.json and pass its path."
        )
    try:
        fields = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file ({error}); pass a config.json.") from error
    return from_config(fields, str(path))


def from_config(fields: Any, name: str) -> ModelShape:
    """The shape that the fields of a config.json describe.

    Raises:
        ValueError: a family that is not planned for, a dense layer, or a number is missing.
    """
    family = fields.get("model_type") if isinstance(fields, dict) else None
    if family not in FAMILIES:
        raise ValueError(
            f"{name} has model_type {family!r}; the planner knows {', '.join(FAMILIES)}."
        )
    if fields.get("decoder_sparse_step", 1) != 1 or fields.get("mlp_only_layers"):
        raise ValueError(
            f"{name} has layers without experts (decoder_sparse_step, mlp_only_layers); the "
            f"planner takes models with experts in every layer."
        )
    experts_key = next((key for key in EXPERTS if fields.get(key)), EXPERTS[0])
    hidden = _number(fields, "hidden_size", name)
    heads = _number(fields, "num_attention_heads", name)
    bias = fields.get("qkv_bias", True) if family == "qwen2_moe" else fields.get("attention_bias")
    return ModelShape(
        name=name,
        vocab=_number(fields, "vocab_size", name),
        hidden=hidden,
        layers=_number(fields, "num_hidden_layers", name),
        heads=heads,
        kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or hidden // heads,
        experts=_number(fields, experts_key, name),
        top_k=_number(fields, "num_experts_per_tok", name),
        expert_width=_number(fields, FAMILIES[family], name),
        shared_width=fields.get("shared_expert_intermediate_size") or 0,
        qk_norm={"qwen3_moe": "head", "olmoe": "full"}.get(family, ""),
        has_qkv_bias=bool(bias),
        has_output_bias=bool(bias) and family != "qwen2_moe",
        is_tied=bool(fields.get("tie_word_embeddings")),
    )


def _number(fields: dict[str, Any], key: str, name: str) -> int:
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must give {key} as a positive number, got {value!r}.")
    return value
