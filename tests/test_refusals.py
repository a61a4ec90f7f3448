"""Every misfit raises one sentence with the way out, on every rank, before anything changes.

Traps 22 (a setting that matches nothing is ignored) and 25 (cpu_ram_efficient_loading).
"""

import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from torch_moe_ep import MoEConfig
from torch_moe_ep.parallel import apply_expert_parallel, init_device_mesh
from torch_moe_ep.testing import LoneExperts, tiny_mixtral

EXPERTS = "model.layers.1.mlp.experts"


def experts_of(model: nn.Module) -> nn.Module:
    return model.get_submodule(EXPERTS)


def set_attribute(name: str, value: object):
    def change(model: nn.Module) -> None:
        setattr(experts_of(model), name, value)

    return change


def set_own_gate(model: nn.Module) -> None:
    base = type(experts_of(model))
    own = type("ClampedExperts", (base,), {"_apply_gate": lambda self, x: x})
    experts_of(model).__class__ = own


def quantise(model: nn.Module) -> None:
    down = experts_of(model).down_proj
    experts_of(model).down_proj = nn.Parameter(down.to(torch.int8), requires_grad=False)


def cast_half_of_one(model: nn.Module) -> None:
    experts = experts_of(model)
    experts.down_proj = nn.Parameter(experts.down_proj.detach().bfloat16())


def double_all(model: nn.Module) -> None:
    model.double()


def freeze_one(model: nn.Module) -> None:
    experts_of(model).down_proj.requires_grad_(False)


def move_one_to_meta(model: nn.Module) -> None:
    experts = experts_of(model)
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to("meta"))


def share_weight(model: nn.Module) -> None:
    first = model.get_submodule("model.layers.0.mlp.experts")
    first.down_proj = experts_of(model).down_proj


def drop_interface(model: nn.Module) -> None:
    del experts_of(model).has_gate


def add_weight(model: nn.Module) -> None:
    experts_of(model).scale = nn.Parameter(torch.ones(1))


def transpose_weight(model: nn.Module) -> None:
    experts = experts_of(model)
    experts.down_proj = nn.Parameter(experts.down_proj.detach().transpose(1, 2).contiguous())


def mark_native(model: nn.Module) -> None:
    experts_of(model)._is_expert_parallel = True


def configure_native(model: nn.Module) -> None:
    model.config.distributed_config = SimpleNamespace(enable_expert_parallel=True)


def configure_quantised(model: nn.Module) -> None:
    model.config.quantization_config = {"quant_method": "fp8"}


def parametrise(model: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(
        experts_of(model), "down_proj", nn.Identity(), unsafe=True
    )


def adapt(model: nn.Module) -> None:
    wrapper = type("LohaWrapper", (nn.Module,), {"__module__": "peft.tuners.loha.layer"})()
    wrapper.base_layer = experts_of(model)
    model.model.layers[1].mlp.experts = wrapper


def shard_with_fsdp2(model: nn.Module) -> None:
    fully_shard(model.model.layers[0].self_attn)


def wrap_with_fsdp1(model: nn.Module) -> None:
    model.lm_head = FullyShardedDataParallel(model.lm_head, device_id=torch.device("cpu"))


def wrap_with_ddp(model: nn.Module) -> None:
    model.lm_head = DistributedDataParallel(model.lm_head)


MODELS = {
    "has_bias": (set_attribute("has_bias", True), "has_bias=True"),
    "no_gate": (set_attribute("has_gate", False), "has_gate=False"),
    "transposed": (set_attribute("is_transposed", True), "is_transposed=True"),
    "interleaved": (set_attribute("is_concatenated", False), "is_concatenated=False"),
    "post_norm": (set_attribute("has_post_expert_norm", True), "has_post_expert_norm=True"),
    "gelu": (set_attribute("act_fn", nn.GELU()), "GELU is not SiLU"),
    "no_activation": (set_attribute("act_fn", None), "no act_fn"),
    "own_gate": (set_own_gate, r"ClampedExperts.*_apply_gate"),
    "int8_weight": (quantise, "quantised experts"),
    "dtypes": (cast_half_of_one, "one dtype"),
    "float64": (double_all, r"must be float32, bfloat16 or float16, got float64; cast the model"),
    "frozen": (freeze_one, "partly frozen"),
    "meta": (move_one_to_meta, "on one device"),
    "shared": (share_weight, "share a weight"),
    "no_interface": (drop_interface, "no has_gate"),
    "third_weight": (add_weight, "scale"),
    "wrong_shape": (transpose_weight, "gate_up_proj must be"),
    "native_mark": (mark_native, r"transformers' own expert parallelism.*_is_expert_parallel"),
    "native_config": (configure_native, "distributed_config"),
    "quantised": (configure_quantised, "quantization_config"),
    "parametrised": (parametrise, "parametrization"),
    "peft": (adapt, "an adapter other than LoRA"),
    "fsdp2": (shard_with_fsdp2, r"FSDP was applied before.*call apply_expert_parallel first"),
    "fsdp1": (wrap_with_fsdp1, r"FSDP was applied before.*call apply_expert_parallel first"),
    "ddp": (wrap_with_ddp, r"DistributedDataParallel was applied before"),
}


def refuse_model(case: str) -> None:
    change, message = MODELS[case]
    model = tiny_mixtral()
    change(model)
    classes = [type(module) for module in model.modules()]
    params = [(name, id(param)) for name, param in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        apply_expert_parallel(model, init_device_mesh("cpu", 1))
    assert [type(module) for module in model.modules()] == classes
    assert [(name, id(param)) for name, param in model.named_parameters()] == params


@pytest.mark.parametrize("case", MODELS)
def test_model_that_does_not_fit_is_refused_unchanged(ranks, case):
    ranks(1).run(refuse_model, case)


ARGUMENTS = {
    "mesh": ({"mesh": "cpu"}, "mesh must be a DeviceMesh"),
    "config": ({"config": {"gradient": "mean"}}, "config must be a torch_moe_ep.MoEConfig"),
    "mp_policy": ({"mp_policy": "bf16"}, 'mp_policy must be "inherit"'),
    "reshard": ({"reshard_after_forward": 2}, "reshard_after_forward must be True or False"),
    "offload": ({"offload_policy": "cpu"}, "offload_policy must be None or an OffloadPolicy"),
    "offload_cpu": ({"offload_policy": CPUOffloadPolicy()}, "leave offload_policy out"),
    "model": ({"model": 7}, r"model must be a torch\.nn\.Module, got int"),
    "nothing": ({"model": nn.Linear(2, 2)}, "no experts module was found"),
}


def refuse_arguments(case: str) -> None:
    given, message = ARGUMENTS[case]
    arguments = {"model": tiny_mixtral(), "mesh": init_device_mesh("cpu", 1), **given}
    with pytest.raises(ValueError, match=message):
        apply_expert_parallel(**arguments)


@pytest.mark.parametrize("case", ARGUMENTS)
def test_argument_that_does_not_fit_is_refused(ranks, case):
    ranks(1).run(refuse_arguments, case)


def refuse_second_call() -> None:
    model, mesh = tiny_mixtral(), init_device_mesh("cpu", 1)
    apply_expert_parallel(model, mesh)
    with pytest.raises(ValueError, match="once per model"):
        apply_expert_parallel(model, mesh)


def test_model_patched_twice_is_refused(ranks):
    ranks(1).run(refuse_second_call)


def refuse_efficient_loading() -> None:
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "True"
    try:
        with pytest.raises(ValueError, match=r"cpu_ram_efficient_loading.*sync_from_rank0=True"):
            apply_expert_parallel(tiny_mixtral(), init_device_mesh("cpu", 1))
    finally:
        del os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]


def test_trap_25_cpu_ram_efficient_loading_is_refused(ranks):
    ranks(1).run(refuse_efficient_loading)


def refuse_old_torch() -> None:
    installed, torch.__version__ = torch.__version__, "2.10.1+cpu"
    try:
        with pytest.raises(ValueError, match=r"torch 2.11 or newer is needed, found 2.10.1"):
            apply_expert_parallel(tiny_mixtral(), init_device_mesh("cpu", 1))
    finally:
        torch.__version__ = installed


def test_torch_too_old_is_refused(ranks):
    ranks(1).run(refuse_old_torch)


def refuse_six_experts() -> None:
    with pytest.raises(ValueError, match=r"experts has 6 experts for degree 4.*divisor of 6"):
        apply_expert_parallel(LoneExperts(6), init_device_mesh("cpu", 4))


def test_degree_that_does_not_divide_the_experts_is_refused(ranks):
    ranks(4).run(refuse_six_experts)


def message_on_rank(rank: int, case: str, odd_rank: int) -> str:
    model = tiny_mixtral()
    if case == "frozen" and rank == odd_rank:
        freeze_one(model)
    if case == "other_model" and rank == odd_rank:
        model = tiny_mixtral(num_local_experts=4)
    if case == "meta" and rank == odd_rank:
        with torch.device("meta"):
            model = tiny_mixtral()
    fields = {"config": {"gradient": "sum"}, "capacity": {"max_received_rows": 256}}.get(case)
    config = MoEConfig(**fields) if fields and rank == odd_rank else None
    with pytest.raises(ValueError) as error:
        apply_expert_parallel(
            model.bfloat16() if case == "dtype" and rank == odd_rank else model,
            init_device_mesh("cpu", 1),
            config,
            sync_from_rank0=(case == "meta" and odd_rank == 0),
        )
    return str(error.value)


@pytest.mark.parametrize(
    ("case", "odd_rank", "message"),
    [
        ("frozen", 1, f"rank 1: {EXPERTS} is partly frozen"),
        (
            "other_model",
            1,
            "ranks 0 and 1 differ in the shape of model.layers.0.mlp.experts.gate_up_proj: (8, ",
        ),
        (
            "dtype",
            1,
            "layers.0.mlp.experts.gate_up_proj: torch.float32 and torch.bfloat16",
        ),
        ("config", 0, "ranks 0 and 1 differ in MoEConfig.gradient: 'sum' and 'mean'"),
        ("capacity", 1, "ranks 0 and 1 differ in MoEConfig.max_received_rows: 0 and 256"),
        ("meta", 1, "on the meta device on ranks [1] only; pass sync_from_rank0=True"),
        ("meta", 0, "sync_from_rank0=True needs rank 0's experts"),
    ],
)
def test_one_rank_that_does_not_fit_makes_all_ranks_raise_alike(ranks, case, odd_rank, message):
    said = ranks(2).run(message_on_rank, case, odd_rank, arg_of_rank=[0, 1], timeout_s=30)
    assert said[0] == said[1]
    assert message in said[0]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"gradient": "average"}, ValueError, 'gradient must be "mean" or "sum", got \'average\''),
        ({"recompute": True}, ValueError, "recompute must be"),
        ({"transport": "nvshmem"}, ValueError, "transport must be"),
        ({"max_slots": -1}, ValueError, "max_slots must be a number of rows"),
        ({"max_slots": 1.5}, ValueError, "max_slots must be a number of rows"),
        ({"max_received_rows": True}, ValueError, "max_received_rows must be a number of rows"),
        ({"max_recieved_rows": 8}, TypeError, "max_recieved_rows"),
    ],
    ids=str,
)
def test_trap_22_setting_that_config_does_not_know_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        MoEConfig(**fields)


def refuse_main_grad() -> None:
    model = apply_expert_parallel(tiny_mixtral(), init_device_mesh("cpu", 1))
    weight = experts_of(model).down_proj
    weight.main_grad = torch.zeros(weight.shape)
    with pytest.raises(ValueError, match=r"experts.down_proj has a main_grad.* without FSDP alone"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))


def test_main_grad_under_fsdp_is_refused(ranks):
    ranks(1).run(refuse_main_grad)
