"""One tiny model of every family whose experts have Mixtral's shape, by transformers' names.

A family is a model class and what its configuration needs beside COMMON, of which each
configuration takes the fields it knows. `is_proven` are those whose gradients CI compares; for the
others the full suite does.
"""

import importlib
import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torch_moe_ep.testing import batch_of

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "sliding_window": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Multi-head latent attention: head_dim follows from these.
LATENT: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": None,
}
ATTENTION = {"layer_types": ["full_attention"] * 2}
ROPE_3D = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
NO_JITTER = {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0}
SPARSE = {"mlp_layer_types": ["dense", "sparse"]}


@dataclass(frozen=True)
class Family:
    """A tiny model: `module` is transformers' folder, `name` the model class in it.

    `fields` are of its configuration; None takes the configuration's own default instead of
    COMMON's value. `is_slow` ones take seconds (their attention is a loop on the CPU). Without
    `takes_ids` the model wants hidden states.
    """

    module: str
    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    is_proven: bool = False
    is_slow: bool = False
    takes_ids: bool = True

    def __str__(self) -> str:
        """A pytest id."""
        return self.name

    @property
    def is_installed(self) -> bool:
        """Whether this transformers has the family."""
        return importlib.util.find_spec(f"transformers.models.{self.module}") is not None

    def build(self, seed: int = 0) -> nn.Module:
        """The model with eager experts (transformers' grouped ones refuse sizes this small)."""
        package = f"transformers.models.{self.module}"
        modeling = importlib.import_module(f"{package}.modeling_{self.module}")
        model_class = getattr(modeling, self.name)
        config_class = model_class.config_class
        known = {*dir(config_class()), *getattr(config_class, "attribute_map", {})}
        common = {k: v for k, v in COMMON.items() if k in known}
        fields = {k: v for k, v in {**common, **self.fields}.items() if v is not None}
        config = config_class(**fields)
        config._experts_implementation = "eager"
        torch.manual_seed(seed)
        model = model_class(config).train()
        for module in model.modules():
            if "gate_up_proj" in module._parameters:  # some classes leave theirs uninitialised
                for param in module.parameters(recurse=False):
                    nn.init.normal_(param, std=0.05)
        return model

    def batch(self, rank: int) -> dict[str, torch.Tensor]:
        """One rank's input."""
        ids = batch_of(rank)["input_ids"]
        if self.takes_ids:
            return {"input_ids": ids}
        generator = torch.Generator().manual_seed(rank)
        return {"inputs_embeds": torch.randn(*ids.shape, 64, generator=generator)}


FAMILIES = [
    Family("mixtral", "MixtralForCausalLM", is_proven=True),
    Family("qwen2_moe", "Qwen2MoeForCausalLM", is_proven=True),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", is_proven=True),
    Family("olmoe", "OlmoeForCausalLM", is_proven=True),
    Family("deepseek_v3", "DeepseekV3ForCausalLM", LATENT, is_proven=True),
    Family("granitemoe", "GraniteMoeForCausalLM", is_proven=True),
    Family("phimoe", "PhimoeForCausalLM", NO_JITTER, is_proven=True),
    Family("glm4_moe", "Glm4MoeForCausalLM", is_proven=True),
    Family("afmoe", "AfmoeForCausalLM"),
    Family("axk1", "AXK1ForCausalLM", LATENT),
    Family("axk2", "AXK2ForCausalLM", {**LATENT, "head_dim": 16}),
    Family("cohere2_moe", "Cohere2MoeForCausalLM"),
    Family("deepseek_ocr2", "DeepseekOcr2TextModel", {**LATENT, **SPARSE}),
    Family("deepseek_v2", "DeepseekV2ForCausalLM", LATENT),
    Family("deepseek_v32", "DeepseekV32ForCausalLM", LATENT),
    Family("dots1", "Dots1ForCausalLM"),
    Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM"),
    Family("exaone_moe", "ExaoneMoeForCausalLM"),
    Family("flex_olmo", "FlexOlmoForCausalLM"),
    Family("glm4_moe_lite", "Glm4MoeLiteForCausalLM", LATENT),
    Family("glm4v_moe", "Glm4vMoeTextModel", {"rope_parameters": ROPE_3D}),
    Family("glm_moe_dsa", "GlmMoeDsaForCausalLM", LATENT),
    Family("granitemoe_swa", "GraniteMoeSWAForCausalLM"),
    Family("granitemoehybrid", "GraniteMoeHybridForCausalLM", ATTENTION),
    Family("granitemoeshared", "GraniteMoeSharedForCausalLM"),
    Family("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM"),
    Family("hy_v3", "HYV3ForCausalLM"),
    Family("inkling", "InklingTextModel"),
    Family("jamba", "JambaForCausalLM"),
    Family("kimi_linear", "KimiLinearForCausalLM", LATENT, is_slow=True),
    Family("laguna", "LagunaForCausalLM"),
    Family("lfm2_moe", "Lfm2MoeForCausalLM", {**ATTENTION, "num_dense_layers": 1}),
    Family("mellum", "MellumForCausalLM"),
    Family("mimo_v2_flash", "MiMoV2FlashForCausalLM", {**ATTENTION, "head_dim": 24}),
    Family("minimax", "MiniMaxForCausalLM"),
    Family("minimax_m2", "MiniMaxM2ForCausalLM"),
    Family("mistral4", "Mistral4ForCausalLM", LATENT),
    Family("qwen3_5_moe", "Qwen3_5MoeForCausalLM"),
    Family("qwen3_next", "Qwen3NextForCausalLM"),
    Family("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextModel"),
    Family(
        "qwen3_omni_moe",
        "Qwen3OmniMoeTalkerModel",
        {"shared_expert_intermediate_size": 32},
        takes_ids=False,
    ),
    Family("qwen3_vl_moe", "Qwen3VLMoeTextModel"),
    Family("qwen4_exp", "Qwen4ExpForCausalLM"),
    Family("solar_open", "SolarOpenForCausalLM"),
    Family("zaya", "ZayaForCausalLM", {"num_experts_per_tok": 1}),
]

# Another shape each, and the words of the refusal.
REFUSED = {
    "expert biases": Family("gpt_oss", "GptOssForCausalLM"),
    "no has_gate": Family("llama4", "Llama4ForCausalLM"),
    "(DbrxExperts) holds experts of another shape": Family(
        "dbrx",
        "DbrxForCausalLM",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 4, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "hidden_size": 64},
        },
    ),
    "(NemotronHExperts) holds experts of another shape": Family(
        "nemotron_h", "NemotronHForCausalLM", {"layer_types": ["full_attention", "moe"]}
    ),
    "not SiLU": Family(
        "gemma4", "Gemma4ForCausalLM", {"enable_moe_block": True, "vocab_size_per_layer_input": 128}
    ),
    "gates in its own way": Family("deepseek_v4", "DeepseekV4ForCausalLM"),
}
