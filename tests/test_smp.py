"""The SMP v2 surface in one process: names, configuration, helpers."""

import importlib
import json
import logging

import pytest

import torch_moe_ep
import torch_moe_ep.integrations.smp as tsm
from torch_moe_ep.integrations.smp import config as smp_config
from torch_moe_ep.integrations.smp.checkpoint.utils import SORT_BY_LAST_INT, limit_num_subdirs
from torch_moe_ep.integrations.smp.utils.utils import timeit

NAMES = {
    "": ["init", "is_initialized", "transform", "state", "MoEConfig", "FullyShardedDataParallel"],
    "delayed_param": ["DelayedParamIniter"],
    "grad_norm": ["clip_grad_norm_"],
    "moe.moe_config": ["MoEConfig"],
    "moe.moe_layer": ["MoELayer"],
    "tensor_parallel.transformer": ["TransformerLayer"],
    "checkpoint.utils": ["limit_num_subdirs", "SORT_BY_LAST_INT"],
    "utils.utils": ["timeit"],
    "utils.process_group_utils": ["get_global_ranks"],
    "logger": ["get_logger"],
    "offload_wrapper": ["offload_wrapper", "OffloadWrapper"],
    "distributed.checkpoint": ["save_state_dict", "load_state_dict"],
    "distributed.checkpoint.state_dict_saver": ["async_save", "PyTorchDistSaveShardedStrategy"],
    "distributed.checkpoint.state_dict_loader": ["load"],
    "distributed.checkpoint.async_utils": ["AsyncCallsQueue"],
    "distributed.checkpoint.filesystem": ["DistributedFileSystemReader"],
    "distributed.checkpoint.optimizer": ["load_sharded_optimizer_state_dict"],
}
STATE = ["tensor_parallel_degree", "expert_parallel_degree", "context_parallel_degree", "cp_size",
         "cp_rank", "tp_rank", "ep_rank", "ep_size", "sm_activation_offloading", "ranker",
         "hybrid_shard_degree", "activation_loading_horizon", "random_seed"]  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(smp_config, "_config", None)
    monkeypatch.setattr(smp_config, "_mesh", None)
    for name in STATE:
        monkeypatch.setattr(tsm.state, name, getattr(tsm.state, name))
    for name in ("RANK", "WORLD_SIZE", smp_config.LAUNCHER_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("module", NAMES)
def test_every_name_is_in_a_real_module_of_smps_tail(module):
    path = "torch_moe_ep.integrations.smp" + (f".{module}" if module else "")
    found = importlib.import_module(path)
    assert all(hasattr(found, name) for name in NAMES[module])


def test_state_has_every_name():
    assert all(hasattr(tsm.state, name) for name in STATE)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("state", "world_process_group"),
        ("state", "tp_process_group"),
        ("state", "get_rng_state_tracker"),
        ("distributed.checkpoint.state_dict_utils", "init_optim_state"),
        ("nn", "TransformerEngineLinear"),
    ],
)
def test_dead_paths_say_that_they_are_not_supported(module, name):
    found = importlib.import_module(f"torch_moe_ep.integrations.smp.{module}")
    with pytest.raises(NotImplementedError, match=f"{name} is not supported"):
        getattr(found, name)
    assert not hasattr(found, name)


def test_init_without_anything_takes_the_defaults():
    assert not tsm.is_initialized()
    tsm.init()
    assert tsm.is_initialized()
    assert (tsm.state.expert_parallel_degree, tsm.state.hybrid_shard_degree) == (1, 0)
    assert tsm.state.sm_activation_offloading is True
    assert tsm.state.activation_loading_horizon == 2


def test_init_reads_dict_file_and_environment_and_the_environment_wins(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "5")
    path = tmp_path / "smp.json"
    path.write_text(json.dumps({"expert_parallel_degree": 2, "activation_loading_horizon": 3}))
    monkeypatch.setenv(
        smp_config.LAUNCHER_VARIABLE, '{"expert_parallel_degree": 4, "hybrid_shard_degree": 1}'
    )
    tsm.init(path)
    assert tsm.state.expert_parallel_degree == tsm.state.ep_size == 4
    assert tsm.state.ep_rank == 1
    assert tsm.state.activation_loading_horizon == 3
    assert tsm.state.ranker.get_rep_rank(5) == 1
    assert tsm.state.ranker.get_rep_groups() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_init_again_with_the_same_values_is_nothing_and_with_others_raises():
    tsm.init({"activation_loading_horizon": 4})
    tsm.init({"activation_loading_horizon": 4})
    with pytest.raises(ValueError, match=r"called before with other values .*'random_seed': 7"):
        tsm.init({"activation_loading_horizon": 4, "random_seed": 7})
    assert tsm.state.random_seed == 12345


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"expert_paralel_degree": 2}, "nearest valid key is 'expert_parallel_degree'"),
        ({"expert_parallel_degree": "2"}, r"must be int, got '2' \(str\); the default is 1"),
        ({"expert_parallel_degree": True}, r"must be int, got True \(bool\)"),
        ({"sm_activation_offloading": 1}, r"must be bool, got 1 \(int\)"),
        ({"expert_parallel_degree": 3}, "divide the number of ranks 8, got 3; .* choice is 2"),
        ({"expert_parallel_degree": 0}, "nearest valid choice is 1"),
        ({"expert_parallel_degree": 2, "hybrid_shard_degree": 3}, "= 4, got 3; .* choice is 2"),
        ({"tensor_parallel_degree": 2}, "tensor_parallel_degree=2 is not implemented; .* is 1"),
        ({"context_parallel_degree": 4}, "context_parallel_degree=4 is not implemented"),
        (7, "config must be a dict, the path of a JSON file or None, got int"),
        ("/nowhere.json", "cannot be read as JSON"),
    ],
)
def test_init_refuses_with_the_nearest_valid_choice(monkeypatch, config, message):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match=message):
        tsm.init(config)
    assert not tsm.is_initialized()


def test_init_refuses_a_launcher_variable_that_is_not_json(monkeypatch):
    monkeypatch.setenv(smp_config.LAUNCHER_VARIABLE, "{")
    with pytest.raises(ValueError, match="SM_HP_MP_PARAMETERS is not JSON"):
        tsm.init()


def test_moe_config_has_smps_defaults_and_converts():
    config = tsm.MoEConfig()
    assert (config.moe_load_balancing, config.random_seed) == ("sinkhorn", 12345)
    assert config.convert() == torch_moe_ep.MoEConfig(
        routing="sinkhorn", router_dtype="float32", z_loss_coeff=0.001, seed=12345
    )
    other = tsm.MoEConfig(
        moe_load_balancing="aux_loss", global_token_shuffle=True, moe_all_to_all_dispatcher=False,
        moe_aux_loss_coeff=0.5,
    ).convert()  # fmt: skip
    assert (other.routing, other.aux_loss_coeff) == ("aux_loss", 0.5)
    assert (other.dispatcher, other.global_token_shuffle) == ("all_gather", True)
    assert tsm.MoEConfig(smp_moe=False).convert() == torch_moe_ep.MoEConfig()
    with pytest.raises(ValueError, match="moe_load_balancing must be"):
        tsm.MoEConfig(moe_load_balancing="even")
    with pytest.raises(ValueError, match="z_loss_coeff must be a finite number"):
        tsm.MoEConfig(moe_z_loss_coeff=-1.0)


def test_limit_num_subdirs_keeps_the_newest_and_what_does_not_match(tmp_path):
    for step in (5, 10, 100, 20):
        (tmp_path / f"model-{step}steps" / "ep2-0").mkdir(parents=True)
    (tmp_path / "logs").mkdir()
    limit_num_subdirs(
        tmp_path / "model-100steps" / "ep2-0", 2, sort_fn=SORT_BY_LAST_INT, regex="steps$"
    )
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["logs", "model-100steps", "model-20steps"]
    limit_num_subdirs(tmp_path / "model-20steps", 0)
    assert len(list(tmp_path.iterdir())) == 3


def test_timeit_logs_seconds_only_when_asked(caplog):
    with caplog.at_level(logging.INFO, logger="torch_moe_ep.smp"):
        with timeit(False, "nothing", 0):
            pass
        with timeit(True, "saving", 3):
            pass
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("rank 3: saving took ")


def test_transform_before_init_says_what_to_call():
    with pytest.raises(RuntimeError, match=r"call init\(\) first"):
        tsm.transform(None)
