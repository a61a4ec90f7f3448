"""A script against the SMP v2 surface over several ranks: start, train, save, resume."""

import functools
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as TorchFSDP
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, transformer_auto_wrap_policy

import torch_moe_ep.integrations.smp as tsm
from torch_moe_ep.integrations.smp import config as smp_config
from torch_moe_ep.integrations.smp.delayed_param import DelayedParamIniter
from torch_moe_ep.integrations.smp.distributed.checkpoint import filesystem, state_dict_loader
from torch_moe_ep.integrations.smp.distributed.checkpoint.async_utils import AsyncCallsQueue
from torch_moe_ep.integrations.smp.distributed.checkpoint.state_dict_saver import async_save
from torch_moe_ep.integrations.smp.moe.moe_layer import MoELayer
from torch_moe_ep.integrations.smp.tensor_parallel.transformer import TransformerLayer
from torch_moe_ep.integrations.smp.utils.process_group_utils import get_global_ranks
from torch_moe_ep.testing import batch_of, relative_error, tiny_mixtral
from torch_moe_ep.testing.parallel import bits, decoder_layers, full_parameters

STEPS = 20


def start(**config) -> None:
    """`init` as a fresh process would call it."""
    smp_config._config = smp_config._mesh = None
    tsm.init(config)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4, weight_decay=0.2)


def shard(model: nn.Module, kind: str) -> nn.Module:
    """The script's own FSDP call."""
    if kind == "fsdp2":
        for layer in decoder_layers(model):
            fully_shard(layer)
        return fully_shard(model)
    policy = functools.partial(
        transformer_auto_wrap_policy, transformer_layer_cls={TransformerLayer}
    )
    initer = DelayedParamIniter(model)
    with warnings.catch_warnings(), initer.validate_params_and_buffers_inited():
        warnings.simplefilter("ignore")
        return tsm.FullyShardedDataParallel(
            model,
            auto_wrap_policy=policy,
            sharding_strategy=ShardingStrategy.HYBRID_SHARD if "hybrid" in kind else
            ShardingStrategy.FULL_SHARD,
            device_id=torch.device("cpu"),
            use_orig_params=True,
            param_init_fn=initer.get_param_init_fn(),
            post_param_init_fn=initer.get_post_param_init_fn(),
        )  # fmt: skip


def train_on_rank(kind: str, degrees: dict[str, int]) -> tuple[list[float], list[float], str]:
    """Printed losses and gradient norms of a run whose weights are on rank 0 alone."""
    start(**degrees)
    with torch.device("cpu" if dist.get_rank() == 0 else "meta"):
        model = tiny_mixtral()
    config = tsm.MoEConfig(moe_load_balancing="none")
    model = tsm.transform(model, config=config, load_state_dict_from_rank0=True)
    assert sum(isinstance(module, MoELayer) for module in model.modules()) == 2
    model = shard(model, kind)
    strategy = model.sharding_strategy.name if isinstance(model, TorchFSDP) else ""
    optimizer = optimizer_of(model)
    losses, norms = [], []
    for step in range(STEPS):
        loss = model(**batch_of(dist.get_rank(), step=step % 4)).loss
        loss.backward()
        norms.append(tsm.grad_norm.clip_grad_norm_(model, 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, strategy


@functools.cache
def reference_run(world: int) -> tuple[list[float], list[float]]:
    """One process of unpatched transformers; SMP's z loss of 0.001 added by hand."""
    model = tiny_mixtral()
    optimizer = optimizer_of(model)
    losses, norms = [], []
    for step in range(STEPS):
        total = 0.0
        for rank in range(world):
            batch = batch_of(rank, step=step % 4)
            output = model(**batch, output_router_logits=True)
            printed = nn.functional.cross_entropy(
                output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
            )
            z_loss = sum(x.logsumexp(-1).square().mean() for x in output.router_logits)
            ((printed + 0.001 * z_loss) / world).backward()
            total += printed.item() / world
        losses.append(total)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


@pytest.mark.parametrize(
    ("world", "kind", "degrees", "strategy"),
    [
        (2, "fsdp2", {"expert_parallel_degree": 2}, ""),
        (4, "fsdp2", {"expert_parallel_degree": 2}, ""),
        (4, "fsdp1", {"expert_parallel_degree": 2}, "FULL_SHARD"),
        (4, "fsdp1", {"expert_parallel_degree": 2, "hybrid_shard_degree": 1}, "NO_SHARD"),
        (4, "fsdp1", {"expert_parallel_degree": 2, "hybrid_shard_degree": 2}, "FULL_SHARD"),
        (4, "fsdp1", {"hybrid_shard_degree": 2}, "HYBRID_SHARD"),
        pytest.param(
            8,
            "fsdp1",
            {"expert_parallel_degree": 2, "hybrid_shard_degree": 2},
            "HYBRID_SHARD",
            marks=pytest.mark.full,
        ),
    ],
    ids=str,
)
def test_twenty_steps_from_rank_0_weights_equal_one_process(ranks, world, kind, degrees, strategy):
    results = ranks(world).run(train_on_rank, kind, degrees, timeout_s=150)
    expected_losses, expected_norms = reference_run(world)
    losses = [sum(step) / world for step in zip(*(loss for loss, _, _ in results), strict=True)]
    assert losses[0] == pytest.approx(expected_losses[0], rel=1e-5)
    assert results[0][1][0] == pytest.approx(expected_norms[0], rel=1e-5)
    assert losses == pytest.approx(expected_losses, rel=2e-4)
    for _, norms, kind_used in results:
        assert norms == pytest.approx(expected_norms, rel=2e-3)
        assert kind_used == strategy
    assert losses[-1] < losses[0] - 0.05, "nothing was learnt, so nothing was compared"


def seeded_on_rank(ep: int, kind: str) -> dict[str, str]:
    """Digests of the initial weights of a model that was never real before."""
    start(expert_parallel_degree=ep, random_seed=11)
    with torch.device("meta"):
        model = tiny_mixtral()
    is_plain = kind == "plain"  # P = 1 without a config: the experts are Hugging Face's
    model = tsm.transform(model, config=None if is_plain else tsm.MoEConfig())
    if kind == "fsdp1":
        model = shard(model, kind)
    else:
        model.apply(DelayedParamIniter(model).get_param_init_fn())
        model = shard(model, "fsdp2")
    loss = model(**batch_of(dist.get_rank())).loss
    assert 3.0 < loss.item() < 7.0  # ln 128 is 4.85: rotary tables and norms are right as well
    return {name: bits(tensor) for name, tensor in full_parameters(model).items()}


def test_random_seed_gives_the_same_bits_at_every_degree(ranks):
    cases = [
        (1, 1, "plain"),
        (1, 1, "fsdp2"),
        (2, 2, "fsdp2"),
        (4, 4, "fsdp1"),
        (4, 1, "fsdp1"),
        (8, 8, "fsdp2"),
    ]
    found = [ranks(world).run(seeded_on_rank, ep, kind)[0] for world, ep, kind in cases]
    assert len(set(found[0].values())) > 15
    for case, digests in zip(cases, found, strict=True):
        assert digests == found[0], case


def checkpoint_on_rank(folder: str) -> tuple[bool, str]:
    """Save each EP rank's folder as SMP scripts do, load into a model of other weights."""
    start(expert_parallel_degree=2)
    state, rank = tsm.state, dist.get_rank()
    groups = [dist.new_group([ep, ep + 2]) for ep in range(2)]
    group = groups[state.ep_rank]
    model = tsm.transform(tiny_mixtral(), config=tsm.MoEConfig())
    path = f"{folder}/model-5steps/ep{state.expert_parallel_degree}-{state.ep_rank}"
    coordinator = get_global_ranks(group)[0]
    queue = AsyncCallsQueue()
    async_save({"model": model.state_dict(), "step": 5}, checkpoint_id=path, process_group=group,
               coordinator_rank=coordinator, queue=queue)  # fmt: skip
    queue.maybe_finalize_async_calls(blocking=True, process_group=group)
    other = tsm.transform(tiny_mixtral(seed=9), config=tsm.MoEConfig())
    target = {"model": other.state_dict(), "step": 0}
    reader = filesystem.DistributedFileSystemReader(path)
    state_dict_loader.load(
        state_dict=target, storage_reader=reader, process_group=group, coordinator_rank=coordinator
    )
    expected, found = full_parameters(model), full_parameters(other)
    is_equal = all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(KeyError, match="no_such_key"):
        state_dict_loader.load(state_dict={"no_such_key": torch.zeros(2)}, storage_reader=reader,
                               process_group=group, coordinator_rank=coordinator)  # fmt: skip
    with pytest.raises(ValueError, match="coordinator_rank is a global rank"):
        state_dict_loader.load(state_dict=target, storage_reader=reader, process_group=group,
                               coordinator_rank=(rank + 1) % 4)  # fmt: skip
    return is_equal and target["step"] == 5, path


def test_checkpoint_of_one_folder_per_ep_rank_is_loaded(ranks, tmp_path):
    results = ranks(4).run(checkpoint_on_rank, str(tmp_path))
    assert all(is_equal for is_equal, _ in results)
    assert {path[-5:] for _, path in results} == {"ep2-0", "ep2-1"}


def whole_checkpoint_on_rank(folder: str, kind: str, ep: int, load_ep: int) -> bool:
    """A group of all ranks saves the sharded model and loads it at another degree."""
    start(expert_parallel_degree=ep)
    config = tsm.MoEConfig(moe_load_balancing="none")
    model = shard(tsm.transform(tiny_mixtral(), config=config), kind)
    path = f"{folder}/model-1steps/ep{ep}-{tsm.state.ep_rank}"
    async_save({"model": get_model_state_dict(model)}, checkpoint_id=path)
    expected = full_parameters(model)
    start(expert_parallel_degree=load_ep)
    other = shard(tsm.transform(tiny_mixtral(seed=9), config=config), kind)
    state = {"model": get_model_state_dict(other)}
    state_dict_loader.load(
        state_dict=state, storage_reader=filesystem.DistributedFileSystemReader(path)
    )
    set_model_state_dict(other, state["model"])
    found = full_parameters(other)
    return all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("kind", "load_ep"), [("fsdp2", 2), ("fsdp2", 4), ("fsdp1", 2)])
def test_checkpoint_of_a_group_of_all_ranks_is_one_folder(ranks, tmp_path, kind, load_ep):
    assert all(ranks(4).run(whole_checkpoint_on_rank, str(tmp_path), kind, 2, load_ep))
    with_index = [p.parent.name for p in tmp_path.rglob(".metadata")]
    assert with_index == ["ep2-0"]


def defaults_on_rank() -> tuple[str, list[str], str, str]:
    """Warning of transform without a config, its routings, refused config, number of units."""
    start(expert_parallel_degree=2)
    with pytest.warns(UserWarning, match="which are not Hugging Face's routing") as seen:
        model = tsm.transform(tiny_mixtral())
    routings = [m.moe_config.routing for m in model.modules() if isinstance(m, MoELayer)]
    assert [isinstance(layer, TransformerLayer) for layer in decoder_layers(model)] == [True, True]
    assert not isinstance(model, TransformerLayer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = tsm.FullyShardedDataParallel(
            model, None, None, None, ModuleWrapPolicy({TransformerLayer}),
            mixed_precision=MixedPrecision(torch.float32), device_id=torch.device("cpu"),
            use_orig_params=True,
        )  # fmt: skip
    wrapped(**batch_of(dist.get_rank())).loss.backward()
    with pytest.raises(ValueError, match="config must be a MoEConfig") as refused:
        tsm.transform(tiny_mixtral(), config="none")
    units = sum(isinstance(module, TorchFSDP) for module in wrapped.modules())
    return str(seen[0].message), routings, str(refused.value), str(units)


def test_transform_without_config_warns_and_takes_smps_defaults(ranks):
    for message, routings, refused, units in ranks(2).run(defaults_on_rank):
        assert "Sinkhorn" in message and routings == ["sinkhorn", "sinkhorn"]
        assert refused.endswith("got str.") and units == "3"


def plain_on_rank() -> tuple[bool, float]:
    """P = 1 without a config: Hugging Face's model, with rank 0's weights everywhere."""
    start()
    model = tiny_mixtral() if dist.get_rank() == 0 else tiny_mixtral(seed=3)
    model = tsm.transform(model, load_state_dict_from_rank0=True)
    expected = dict(tiny_mixtral().named_parameters())
    worst = max(relative_error(p, expected[name]) for name, p in model.named_parameters())
    return any(isinstance(module, MoELayer) for module in model.modules()), worst


def test_transform_at_degree_1_leaves_the_model_and_loads_from_rank_0(ranks):
    assert ranks(2).run(plain_on_rank) == [(False, 0.0)] * 2
