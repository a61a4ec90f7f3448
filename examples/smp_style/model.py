"""The model of the SMP-style script: built, transformed and wrapped as SMP v2 scripts do it."""

import argparse
import functools
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import torch_moe_ep.integrations.smp as tsm
from examples.sizes import sizes_of
from torch_moe_ep.integrations.smp.delayed_param import DelayedParamIniter
from torch_moe_ep.integrations.smp.tensor_parallel.transformer import TransformerLayer


def make_config(arguments: argparse.Namespace, vocab_size: int) -> MixtralConfig:
    """Mixtral's configuration with the sizes of the arguments."""
    return MixtralConfig(
        **sizes_of(arguments, vocab_size),
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def build_model(arguments: argparse.Namespace, vocab_size: int, is_meta: bool) -> nn.Module:
    """The stock model; of a pretrained one rank 0 holds the weights and the others meta tensors."""
    pretrained = arguments.hf_pretrained_model_name_or_dir
    dtype = getattr(torch, arguments.param_dtype)
    torch.manual_seed(arguments.seed)
    if pretrained and dist.get_rank() == 0:
        return AutoModelForCausalLM.from_pretrained(pretrained, dtype=dtype)
    config = make_config(arguments, vocab_size)
    if pretrained:
        config = MixtralConfig.from_pretrained(pretrained)
    with torch.device("meta" if is_meta or pretrained else "cpu"):
        return MixtralForCausalLM(config).to(dtype)


def make_model(arguments: argparse.Namespace, vocab_size: int, device: torch.device) -> nn.Module:
    """Build, transform and wrap the model; weights are drawn, or rank 0's."""
    pretrained = arguments.hf_pretrained_model_name_or_dir
    is_meta = bool(arguments.delayed_param) and not pretrained
    model = tsm.transform(
        build_model(arguments, vocab_size, is_meta),
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
