"""A run goes on at any other grid and under another FSDP, as if it had never stopped.

Every grid trains on the same eight rows a step, so that all of them compute what one process
computes. 16 experts: "experts.10" sorts before "experts.2", if anybody sorts.
"""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from parallel_cases import Run, build
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

import torch_moe_ep
from torch_moe_ep.testing import assert_close, batch_of, tiny_mixtral
from torch_moe_ep.testing.parallel import from_rank0, full_parameters

SIXTEEN = {"num_local_experts": 16, "num_experts_per_tok": 3, "intermediate_size": 32}
GRIDS = {
    str(run): run
    for run in (
        Run("fsdp2", 1, 1, model=SIXTEEN),
        Run("fsdp1", 1, 1, model=SIXTEEN),
        Run("fsdp2", 2, 1, model=SIXTEEN),
        Run("fsdp2", 2, 2, model=SIXTEEN),
        Run("fsdp1", 2, 2, model=SIXTEEN),
        Run("ddp", 2, 2, model=SIXTEEN),
        Run("fsdp2", 4, 2, model=SIXTEEN),
        Run("hsdp2", 4, 2, 1, model=SIXTEEN),
        Run("fsdp2", 4, 4, model=SIXTEEN),
        Run("fsdp1", 4, 1, model=SIXTEEN),
        Run("fsdp1_hybrid", 4, 2, 1, model=SIXTEEN),
        Run("fsdp2", 8, 2, model=SIXTEEN),
        Run("hsdp2", 8, 2, 2, model=SIXTEEN),
        Run("fsdp2", 8, 8, model=SIXTEEN),
        Run("fsdp1", 8, 4, 1, model=SIXTEEN),
        Run("fsdp1", 8, 2, model=SIXTEEN),
    )
}
FEW = [
    ("fsdp2_w4_p2", "fsdp1_w2_p2"),
    ("fsdp1_w2_p2", "hsdp2_w4_p2_s1"),
    ("hsdp2_w4_p2_s1", "fsdp2_w4_p4"),
    ("fsdp2_w4_p4", "fsdp2_w1_p1"),
    ("fsdp2_w1_p1", "fsdp1_w4_p1"),
    ("fsdp1_w4_p1", "fsdp2_w2_p1"),
]


def optimizer_of(model, kind: str):
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)


def rows_of(step: int, rank: int, world: int) -> dict[str, torch.Tensor]:
    """This rank's part of the step's eight rows."""
    share = 8 // world
    whole = batch_of(0, tokens=96, rows=8, step=step)
    return {name: rows[rank * share : (rank + 1) * share] for name, rows in whole.items()}


def train(model, optimizer, steps, rank: int, world: int) -> None:
    for step in steps:
        model(**rows_of(step, rank, world)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def whole_state(model, optimizer):
    """Copies of the full parameters and optimizer state by name; the same bits on every rank."""
    weights, state = get_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True)
    )
    found = {name: value.clone() for name, value in weights.items()}
    for name, values in state["state"].items():
        for key, value in values.items():
            found[f"{name}/{key}"] = torch.as_tensor(value).clone()
    return from_rank0(found)


def saved_on_rank(run: Run, kind: str, path: str):
    model = build(run)
    optimizer = optimizer_of(model, kind)
    train(model, optimizer, range(1), dist.get_rank(), run.world)
    torch_moe_ep.save_checkpoint(path, model, optimizer, step=1)
    return whole_state(model, optimizer)


def resumed_on_rank(run: Run, kind: str, path: str):
    """The state after the load, and the parameters two steps later."""
    model = build(run)
    with torch.no_grad():  # what is not loaded shows
        for param in model.parameters():
            param.zero_()
    optimizer = optimizer_of(model, kind)
    assert torch_moe_ep.load_checkpoint(path, model, optimizer) == 1
    loaded = whole_state(model, optimizer)
    train(model, optimizer, range(1, 3), dist.get_rank(), run.world)
    return loaded, from_rank0(full_parameters(model))


@functools.cache
def uninterrupted(kind: str) -> dict[str, torch.Tensor]:
    """Parameters after three steps of one process without the library."""
    model = tiny_mixtral(**SIXTEEN)
    train(model, optimizer_of(model, kind), range(3), 0, 1)
    return {name: param.detach() for name, param in model.named_parameters()}


def check_pair(ranks, saver: str, loader: str, kind: str, path: str, saved) -> None:
    loaded, parameters = ranks(GRIDS[loader].world).run(resumed_on_rank, GRIDS[loader], kind, path)[
        0
    ]
    assert set(loaded) == set(saved)
    far = [name for name, value in saved.items() if not torch.equal(loaded[name], value)]
    assert far == [], f"{saver} to {loader}"
    assert any("/" in name for name in saved)
    assert_close(parameters, uninterrupted(kind), 1e-6)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize(("saver", "loader"), FEW)
def test_resume_at_another_grid_goes_on_as_if_uninterrupted(ranks, tmp_path, saver, loader, kind):
    path = str(tmp_path / "checkpoint")
    saved = ranks(GRIDS[saver].world).run(saved_on_rank, GRIDS[saver], kind, path)[0]
    check_pair(ranks, saver, loader, kind, path, saved)


@pytest.fixture(scope="module")
def saved_once(ranks, tmp_path_factory):
    """`saved_once(grid)` gives the checkpoint of a grid and what it holds; written once."""
    root = tmp_path_factory.mktemp("grids")

    @functools.cache
    def save(grid: str):
        path = str(root / grid)
        return path, ranks(GRIDS[grid].world).run(saved_on_rank, GRIDS[grid], "adamw", path)[0]

    return save


@pytest.mark.full
@pytest.mark.parametrize(("saver", "loader"), list(itertools.product(GRIDS, GRIDS)))
def test_resume_from_every_grid_at_every_grid(ranks, saved_once, saver, loader):
    path, saved = saved_once(saver)
    check_pair(ranks, saver, loader, "adamw", path, saved)
    if loader == list(GRIDS)[-1]:  # workers keep the threads of the groups of every case
        for world in (1, 2, 4, 8):
            ranks(world).close()
