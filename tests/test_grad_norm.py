"""Gradient norm and clipping: ours, torch's own and FSDP1's.

Traps 5 (norm under- or double-counted, or different per rank) and 26 (a non-finite norm makes some
ranks skip the step).
"""

import pytest
import torch
import torch.distributed as dist
from parallel_cases import Run, backward, build, reference_of
from torch.nn.utils import clip_grad_norm_ as torch_clip
from torch.nn.utils import clip_grad_value_ as torch_clip_value
from torch.nn.utils import get_total_norm

import torch_moe_ep
from torch_moe_ep.testing import assert_close
from torch_moe_ep.testing.parallel import from_rank0, full_gradients

MAX_NORM = 0.05
MAX_VALUE = 1e-3
RUNS = [
    *[Run("fsdp2", world, ep) for world, ep in ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4))],
    Run("fsdp2", 4, 2, 1),
    Run("hsdp2", 4, 2),
    Run("fsdp1", 2, 2),
    Run("fsdp1", 4, 2),
    Run("fsdp1_no_shard", 2, 2),
    Run("fsdp1_hybrid", 4, 2),
    Run("fsdp1_hybrid", 4, 4),
    Run("ddp", 4, 2),
    Run("none", 2, 2),
]


def clip_on_rank(run: Run, how: str, norm_type: float):
    """Total norm and clipped gradients; `how` says whose function clips."""
    model = build(run)
    backward(run, model)
    if how == "ours":
        norm = torch_moe_ep.clip_grad_norm_(model, MAX_NORM, norm_type)
    elif how == "ours_parameters":
        norm = torch_moe_ep.clip_grad_norm_(model.parameters(), MAX_NORM, norm_type)
    elif how == "fsdp1":
        norm = model.clip_grad_norm_(MAX_NORM, norm_type)
    else:
        foreach = {"torch": None, "torch_foreach": True, "torch_loop": False}[how]
        norm = torch_clip(model.parameters(), MAX_NORM, norm_type, foreach=foreach)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return norm.item(), from_rank0(full_gradients(model))


def reference_clip(run: Run, norm_type: float):
    grads = {name: grad.clone() for name, grad in reference_of(run)[1].items()}
    norm = get_total_norm(list(grads.values()), norm_type).item()
    assert norm > MAX_NORM, "clipping must be active"
    return norm, {name: grad * (MAX_NORM / (norm + 1e-6)) for name, grad in grads.items()}


def assert_clips_like_one_process(pool, run, how, norm_type):
    results = pool.run(clip_on_rank, run, how, norm_type)
    norm, clipped = reference_clip(run, norm_type)
    assert len({result[0] for result in results}) == 1, "norms differ between ranks"
    assert abs(results[0][0] - norm) <= 1e-5 * norm
    assert_close(results[0][1], clipped, 2e-5, f"clipped gradients of {run}")


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_trap_05_our_clip_equals_one_process(ranks, run, norm_type):
    assert_clips_like_one_process(ranks(run.world), run, "ours", norm_type)


@pytest.mark.parametrize(
    ("run", "how", "norm_type"),
    [
        (Run("fsdp2", 4, 2), "ours_parameters", 2.0),
        (Run("fsdp1", 2, 2), "ours_parameters", 2.0),
        (Run("fsdp2", 4, 2), "ours", 3.0),
        (Run("fsdp2", 4, 2), "torch", 2.0),
        (Run("fsdp2", 4, 2), "torch_foreach", 2.0),
        (Run("fsdp2", 4, 2), "torch_loop", 2.0),
        (Run("fsdp2", 4, 2, 1), "torch", float("inf")),
        (Run("hsdp2", 4, 4), "torch", 2.0),
        (Run("none", 2, 2), "torch", 2.0),
        (Run("ddp", 2, 2), "torch", 2.0),
        (Run("fsdp1", 4, 2), "fsdp1", 2.0),
        (Run("fsdp1", 2, 2), "fsdp1", float("inf")),
        (Run("fsdp1_hybrid", 4, 2), "fsdp1", 2.0),
    ],
    ids=str,
)
def test_trap_05_stock_clips_equal_one_process(ranks, run, how, norm_type):
    assert_clips_like_one_process(ranks(run.world), run, how, norm_type)


def stock_on_flat_shards(run: Run):
    model = build(run)
    backward(run, model)
    with pytest.raises(ValueError, match="flat shards"):
        torch_clip(model.parameters(), MAX_NORM)


def test_trap_05_stock_clip_of_fsdp1_shards_is_refused(ranks):
    ranks(2).run(stock_on_flat_shards, Run("fsdp1", 2, 2))


def gradients_clipped_by_value(run: Run):
    """Gradients before and after."""
    model = build(run)
    backward(run, model)
    before = {name: grad.clone() for name, grad in full_gradients(model).items()}
    torch_clip_value(model.parameters(), MAX_VALUE)
    return from_rank0(before), from_rank0(full_gradients(model))


@pytest.mark.parametrize("run", [*(Run(wrap, 2, 2) for wrap in ("fsdp2", "fsdp1", "ddp", "none")),
                                 Run("hsdp2", 4, 2, 1)], ids=str)  # fmt: skip
def test_stock_clip_by_value_takes_both_kinds_of_gradients(ranks, run):
    whole, clipped = ranks(run.world).run(gradients_clipped_by_value, run)[0]
    assert_close(whole, reference_of(run)[1], 2e-5, f"gradients of {run}")
    for is_expert in (True, False):
        kind = [name for name in whole if (".experts." in name) == is_expert]
        assert any(whole[name].abs().max() > MAX_VALUE for name in kind)
        for name in kind:
            assert torch.equal(clipped[name], whole[name].clamp(-MAX_VALUE, MAX_VALUE)), name


def norm_with_bad_rank(run: Run, bad: float, is_expert: bool):
    """The norm every rank sees when one rank's gradient is not finite."""
    model = build(run)
    backward(run, model)
    if dist.get_rank() == dist.get_world_size() - 1:
        for name, param in model.named_parameters():
            if (".experts." in name) == is_expert and param.grad is not None:
                local = param.grad.to_local() if hasattr(param.grad, "to_local") else param.grad
                if local.numel():
                    local.view(-1)[0] = bad
                    break
        else:
            raise AssertionError("this rank holds no such gradient")
    norm = torch_moe_ep.clip_grad_norm_(model, 1.0)
    return bool(norm.isfinite())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("is_expert", [True, False], ids=["expert", "dense"])
@pytest.mark.parametrize("run", [Run("fsdp2", 4, 2), Run("hsdp2", 4, 2, 1), Run("fsdp1", 2, 2),
                                 Run("ddp", 2, 2)], ids=str)  # fmt: skip
def test_trap_26_one_rank_not_finite_is_seen_by_all(ranks, run, is_expert, bad):
    assert ranks(run.world).run(norm_with_bad_rank, run, bad, is_expert) == [False] * run.world


def test_norm_type_must_be_positive():
    with pytest.raises(ValueError, match="norm_type must be positive"):
        torch_moe_ep.clip_grad_norm_([torch.zeros(1, requires_grad=True)], 1.0, 0.0)
