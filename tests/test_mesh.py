"""The grid of ranks: shapes, placement of ranks, and degrees that do not fit (trap 22)."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from torch_moe_ep.parallel.mesh import MESH_DIMS, dense_mesh, init_device_mesh, mesh_misfit


def shape_and_place(ep: int, shard: int):
    mesh = init_device_mesh("cpu", ep, shard)
    assert mesh.mesh_dim_names == MESH_DIMS
    return tuple(mesh.shape), tuple(mesh.get_coordinate()), mesh_misfit(mesh)


@pytest.mark.parametrize(
    ("ep", "shard", "shape"),
    [(1, 0, (1, 4, 1)), (2, 0, (1, 2, 2)), (2, 1, (2, 1, 2)), (4, 0, (1, 1, 4)), (1, 2, (2, 2, 1))],
)
def test_init_device_mesh_of_four_ranks_puts_ep_innermost(ranks, ep, shard, shape):
    results = ranks(4).run(shape_and_place, ep, shard)
    assert [result[0] for result in results] == [shape] * 4
    for rank, (_, (replicate, shard_place, ep_place), misfit) in enumerate(results):
        assert rank == (replicate * shape[1] + shard_place) * shape[2] + ep_place
        assert misfit is None


def message_of_mesh(*degrees: int) -> str:
    with pytest.raises(ValueError) as error:
        init_device_mesh("cpu", *degrees)
    return str(error.value)


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ((3,), "expert_parallel_degree must divide the number of ranks: 3 does not divide 4"),
        (("2",), "expert_parallel_degree must be a whole number of ranks, got '2' (str)"),
        ((2, 1.0), "hybrid_shard_degree must be a whole number of ranks, got 1.0 (float)"),
        ((2, 4), "2 * 4 does not divide 4"),
        ((0,), "expert_parallel_degree must be at least 1, got 0"),
        ((2, -1), "hybrid_shard_degree must be 0"),
    ],
)
def test_init_device_mesh_with_degrees_that_do_not_fit_says_so_on_every_rank(
    ranks, degrees, message
):
    assert all(message in said for said in ranks(4).run(message_of_mesh, *degrees))


def message_of_other_mesh(rank: int, odd_rank: int) -> str:
    with pytest.raises(ValueError) as error:
        init_device_mesh("cpu", 4 if rank == odd_rank else 2)
    return str(error.value)


@pytest.mark.parametrize(("odd_rank", "values"), [(0, "4 and 2"), (3, "2 and 4")])
def test_ranks_that_ask_for_different_meshes_raise_alike_and_do_not_hang(ranks, odd_rank, values):
    said = ranks(4).run(message_of_other_mesh, odd_rank, arg_of_rank=[0, 1, 2, 3], timeout_s=30)
    other = odd_rank or 1
    expected = f"ranks 0 and {other} differ in expert_parallel_degree: {values}; make it the same"
    assert said == [f"{expected} on every rank."] * 4


def message_without(rank: int, absent: int) -> str:
    os.environ["TORCH_MOE_EP_TIMEOUT_S"] = "1"
    try:
        if rank == absent:
            time.sleep(2.0)
            return ""
        with pytest.raises(RuntimeError) as error:
            init_device_mesh("cpu", 2)
        return str(error.value)
    finally:
        del os.environ["TORCH_MOE_EP_TIMEOUT_S"]


def test_rank_that_does_not_come_to_the_mesh_is_named_by_the_others(ranks):
    said = ranks(4).run(message_without, 2, arg_of_rank=[0, 1, 2, 3], timeout_s=30)
    assert said.pop(2) == ""
    assert all("ranks [2] did not come to init_device_mesh within 1 s" in text for text in said)


def message_without_a_gpu() -> str:
    with pytest.raises(ValueError) as caught:
        init_device_mesh("cuda", 2)
    return str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_init_device_mesh_of_gpus_without_one_says_so_on_every_rank(ranks):
    for message in ranks(2).run(message_without_a_gpu):
        assert message.startswith('init_device_mesh("cuda", ...) needs GPUs and torch sees none')


def test_init_device_mesh_without_process_group_says_what_to_call():
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match=r"call torch\.distributed\.init_process_group"):
        init_device_mesh("cpu", 1)


def dense_shapes():
    mesh = init_device_mesh("cpu", 2, 1)
    shapes = [tuple(dense_mesh(mesh, degree).shape) for degree in (1, 2, 4)]
    with pytest.raises(ValueError, match="shard_degree must divide the number of ranks, got 3"):
        dense_mesh(mesh, 3)
    return shapes, dense_mesh(mesh, 2).mesh_dim_names


def test_dense_mesh_spans_all_ranks_at_any_shard_degree(ranks):
    for shapes, names in ranks(4).run(dense_shapes):
        assert shapes == [(4, 1), (2, 2), (1, 4)]
        assert names == ("replicate", "shard")


def misfits_of_other_meshes():
    from torch.distributed.device_mesh import init_device_mesh as torch_mesh

    return [
        mesh_misfit("cpu"),
        mesh_misfit(torch_mesh("cpu", (4,), mesh_dim_names=("ep",))),
        mesh_misfit(torch_mesh("cpu", (2, 2, 1), mesh_dim_names=("shard", "replicate", "ep"))),
    ]


def test_mesh_misfit_names_what_came_and_the_way_out(ranks):
    for said in ranks(4).run(misfits_of_other_meshes):
        assert "got str" in said[0]
        assert "got ('ep',)" in said[1]
        assert "got ('shard', 'replicate', 'ep')" in said[2]
        assert all("init_device_mesh" in sentence for sentence in said)


def misfit_of_mesh_over_two_ranks() -> str | None:
    misfit = mesh_misfit(DeviceMesh("cpu", [[[0, 1]]], mesh_dim_names=MESH_DIMS))
    dist.barrier()  # the mesh connects some ranks only; the others wait for them
    return misfit


def test_trap_22_mesh_over_some_ranks_is_refused(ranks):
    """Also on the ranks that it does span, where all else fits."""
    for said in ranks(4).run(misfit_of_mesh_over_two_ranks):
        assert said is not None and "must span all 4 ranks, got 2" in said
