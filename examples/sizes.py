"""The sizes of a Mixtral, from the arguments that both training scripts share."""

import argparse
from typing import Any


def sizes_of(arguments: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """Fields of MixtralConfig."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": arguments.hidden_width,
        "intermediate_size": arguments.intermediate_size,
        "num_hidden_layers": arguments.num_layers,
        "num_attention_heads": arguments.num_heads,
        "num_key_value_heads": arguments.num_key_value_heads,
        "num_local_experts": arguments.num_experts,
        "num_experts_per_tok": arguments.num_experts_per_tok,
        "max_position_embeddings": arguments.max_context_width,
        "initializer_range": arguments.initializer_range,
    }
