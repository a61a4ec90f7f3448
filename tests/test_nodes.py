"""transport="hierarchical": layer and model over nodes, and how nodes are found.

Ranks of this machine play nodes: 4 ranks as 2 x 2; in the full suite 8 ranks as 2 x 4 and 4 x 2.
"""

import socket
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from node_cases import HIDDEN, NUM_EXPERTS, SPLITS, lines_logged, ranks_per_node, tokens_of_rank
from parallel_cases import UNEVEN, Run, backward, bfloat16_errors, build, reference_of

from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh, metrics
from torch_moe_ep.memory import checkpoint_contexts
from torch_moe_ep.parallel.nodes import RANKS_PER_NODE, even_nodes
from torch_moe_ep.testing import LoneExperts, assert_close
from torch_moe_ep.testing.parallel import from_rank0, full_gradients

HIERARCHICAL = {"transport": "hierarchical"}


def layer_results(config: dict, per_node: int, top_k: int) -> dict[str, torch.Tensor]:
    """Output, gradients and counted copies of lone experts; two steps must agree in every bit."""
    with ranks_per_node(per_node):
        mesh = init_device_mesh("cpu", dist.get_world_size())
        model = apply_expert_parallel(LoneExperts(NUM_EXPERTS, HIDDEN), mesh, MoEConfig(**config))
    runs = []
    for _ in range(2):
        model.zero_grad()
        x, ids, weights = tokens_of_rank(top_k, torch.float32)
        y = model(x, ids, weights)
        generator = torch.Generator().manual_seed(dist.get_rank())
        (y * torch.randn(y.shape, generator=generator)).sum().backward()
        runs.append({"y": y.detach(), "x": x.grad, "w": weights.grad, **full_gradients(model)})
    first, second = runs
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    return {**first, "load": metrics.expert_load(model).tokens["experts"]}


@pytest.mark.parametrize("top_k", [1, 2, 5, NUM_EXPERTS])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_layer_equals_the_flat_path_in_output_and_every_gradient(ranks, split, top_k):
    pool = ranks(split.world)
    flat = pool.run(layer_results, {"transport": "collective"}, split.per_node, top_k)
    ours = pool.run(layer_results, HIERARCHICAL, split.per_node, top_k)
    for mine, expected in zip(ours, flat, strict=True):
        assert torch.equal(mine.pop("load"), expected.pop("load"))
        assert_close(mine, expected, 1e-5)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_bfloat16_error_is_within_twice_hugging_faces(ranks, split):
    pool = ranks(split.world)
    for errors in pool.run(bfloat16_errors, HIERARCHICAL, NUM_EXPERTS, 4, split.per_node):
        for ours, theirs in errors:
            assert ours <= 2 * theirs, errors


def model_gradients(run: Run, per_node: int, how: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and full gradients of the wrapped model, with or without activation checkpointing."""
    with ranks_per_node(per_node):
        model = build(run)
    options = {
        "plain": None,
        "recompute": {"use_reentrant": False},
        "reentrant": {"use_reentrant": True},
        "keep_routing": {"use_reentrant": False, "context_fn": checkpoint_contexts("routing")},
        "keep_rows": {"use_reentrant": False, "context_fn": checkpoint_contexts("rows")},
    }[how]
    if options is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.train()
    loss = backward(run, model)
    assert all(part > 0 for part in metrics.node_traffic(model).row_bytes.values())
    return loss, from_rank0(full_gradients(model))


@pytest.mark.parametrize(
    ("run", "per_node"),
    [
        (Run("fsdp2", 4, 4, model=UNEVEN, config=HIERARCHICAL), 2),
        (Run("fsdp1", 4, 4, model=UNEVEN, config=HIERARCHICAL), 2),
        (Run("none", 4, 4, model=UNEVEN, config=HIERARCHICAL), 2),
        (Run("fsdp2", 4, 4, model=UNEVEN), 2),  # "auto" takes it
        (Run("fsdp2", 4, 2, model=UNEVEN, config=HIERARCHICAL), 1),
        pytest.param(Run("fsdp2", 8, 8, config=HIERARCHICAL), 4, marks=pytest.mark.full),
        pytest.param(Run("fsdp2", 8, 8, config=HIERARCHICAL), 2, marks=pytest.mark.full),
        pytest.param(Run("hsdp2", 8, 4, config=HIERARCHICAL), 2, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_every_gradient_of_a_model_equals_one_process(ranks, run, per_node):
    """Traps 1, 3 and 6."""
    results = ranks(run.world).run(model_gradients, run, per_node, "plain")
    loss, grads = reference_of(run)
    assert sum(result[0] for result in results) / run.world == pytest.approx(loss, rel=1e-5)
    assert_close(results[0][1], grads, 1e-5, f"gradients of {run}")


@pytest.mark.parametrize("how", ["recompute", "reentrant", "keep_routing", "keep_rows"])
def test_trap_11_checkpointed_gradients_are_bit_equal(ranks, how):
    run = Run("fsdp2", 4, 4, model=UNEVEN, config=HIERARCHICAL)
    plain = ranks(4).run(model_gradients, run, 2, "plain")[0][1]
    actual = ranks(4).run(model_gradients, run, 2, how)[0][1]
    assert [name for name in plain if not torch.equal(actual[name], plain[name])] == []


def traffic_of_model(how: str) -> tuple[metrics.NodeTraffic, int, str]:
    """Traffic of one step, what its layers must have sent, and the message of a flat model."""
    run = Run("none", 4, 4, model={"hidden_size": 64}, config=HIERARCHICAL)
    seen: list[int] = []
    with ranks_per_node(2):
        model = build(run)
    if how == "recompute":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    experts = model.get_submodule("model.layers.0.mlp.experts")
    own = dist.get_rank() // 2
    experts.register_forward_pre_hook(
        lambda _m, args: seen.append(sum(len(set(row) - {own}) for row in (args[1] // 4).tolist()))
    )
    backward(run, model)
    total = torch.tensor(seen[0])
    dist.all_reduce(total)
    traffic = metrics.node_traffic(model, reset=True)
    assert not any(metrics.node_traffic(model).row_bytes.values())
    flat = build(Run("none", 4, 4, config={"transport": "collective"}))
    with pytest.raises(ValueError) as caught:
        metrics.node_traffic(flat)
    return traffic, int(total), str(caught.value)


@pytest.mark.parametrize(("how", "passes"), [("plain", 4), ("recompute", 6)])
def test_metrics_report_the_bytes_between_nodes(ranks, how, passes):
    """Rows cross four times a step: two stages, forward and backward; recomputed forward again."""
    for traffic, remote, message in ranks(4).run(traffic_of_model, how):
        assert traffic.row_bytes["model.layers.0.mlp.experts"] == passes * remote * 64 * 4
        assert 'they do with transport="hierarchical"' in message


def message_of(text: str, config: dict) -> str:
    with ranks_per_node(text), pytest.raises(ValueError) as caught:
        apply_expert_parallel(LoneExperts(8), init_device_mesh("cpu", 4), MoEConfig(**config))
    return str(caught.value)


@pytest.mark.parametrize("config", [{}, HIERARCHICAL], ids=str)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", f"{RANKS_PER_NODE}=3 does not divide the 4 ranks of an expert-parallel group"),
        ("6", f"{RANKS_PER_NODE}=6 does not divide the 4 ranks of an expert-parallel group"),
        ("0", f"{RANKS_PER_NODE} must be a positive whole number of ranks, got 0"),
        ("two", f"{RANKS_PER_NODE} must be a positive whole number of ranks, got two"),
    ],
)
def test_override_that_does_not_fit_is_refused_on_every_rank(ranks, text, message, config):
    said = ranks(4).run(message_of, text, config)
    assert message in said[0]
    assert said == [said[0]] * 4


def message_of_unequal_overrides() -> str:
    return message_of("2" if dist.get_rank() < 3 else "1", {})


def test_overrides_that_differ_are_refused_on_every_rank(ranks):
    said = ranks(4).run(message_of_unequal_overrides)
    assert f"ranks 0 and 3 differ in {RANKS_PER_NODE}: 2 and 1" in said[0]
    assert said == [said[0]] * 4


def chosen_on(hosts: list[str], config: dict, text: str = "") -> int | str:
    """Ranks per node that the layer takes when ranks are on these hosts, or the refusal."""
    host = hosts[dist.get_rank()]
    with ranks_per_node(text), mock.patch.object(socket, "gethostname", return_value=host):
        mesh = init_device_mesh("cpu", 4)
        try:
            model = apply_expert_parallel(LoneExperts(8), mesh, MoEConfig(**config))
        except ValueError as error:
            return str(error)
    return model.experts.ranks_per_node


@pytest.mark.parametrize(
    ("hosts", "config", "text", "chosen"),
    [
        ("aabb", {}, "", 2),
        ("aabb", HIERARCHICAL, "", 2),
        ("abcd", {}, "", 1),
        ("aaaa", {}, "", 0),
        ("aaaa", HIERARCHICAL, "", 0),
        ("abbb", {}, "", 0),
        ("abab", {}, "", 0),
        ("aabb", {"transport": "collective"}, "", 0),
        ("aabb", {"dispatcher": "all_gather"}, "3", 0),
        ("aaaa", {}, "2", 2),
        ("abbb", HIERARCHICAL, "2", 2),
        ("aabb", {}, "4", 0),
        ("aaaa", {}, "8", 0),
    ],
    ids=str,
)
def test_nodes_are_detected_by_host_unless_overridden(ranks, hosts, config, text, chosen):
    assert ranks(4).run(chosen_on, list(hosts), config, text) == [chosen] * 4


def choice_logged(hosts: list[str]) -> list[str]:
    with lines_logged() as lines:
        chosen_on(hosts, {})
    return lines


@pytest.mark.parametrize(
    ("hosts", "choice"),
    [("aabb", "hierarchical, 2 nodes of 2 ranks"), ("aaaa", "collective, one all-to-all")],
)
def test_choice_is_logged_once_by_rank_0(ranks, hosts, choice):
    said = ranks(4).run(choice_logged, list(hosts))
    assert said == [[f"transport: {choice} in an expert-parallel group"], [], [], []]


def test_uneven_nodes_are_refused_on_every_rank_where_asked_for(ranks):
    said = ranks(4).run(chosen_on, list("abbb"), HIERARCHICAL)
    assert 'transport="hierarchical" needs nodes with equally many consecutive ranks' in said[0]
    assert "ranks 0 to 3 are on ['a/" in said[0] and RANKS_PER_NODE in said[0]
    assert said == [said[0]] * 4


@pytest.mark.parametrize(
    ("hosts", "size"), [("a", 1), ("aabb", 2), ("abab", 0), ("aab", 0), ("aaa", 3), ("abba", 0)]
)
def test_even_nodes(hosts, size):
    assert even_nodes(list(hosts)) == size


def test_hierarchical_all_gather_is_refused():
    with pytest.raises(ValueError, match='"hierarchical" carries copies and dispatcher="all_gath'):
        MoEConfig(transport="hierarchical", dispatcher="all_gather")
