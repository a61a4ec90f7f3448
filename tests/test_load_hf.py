"""Loading a Hugging Face folder per rank: the same bits as from_pretrained, and no byte too many.

Letters: W ranks, P expert-parallel degree, S shard degree of the experts.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hub_cases import EXPERT_NUMBERS, patched, save_hub_folder
from parallel_cases import TIED, Run
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecision
from transformers import AutoModelForCausalLM

import torch_moe_ep
from torch_moe_ep import apply_expert_parallel, init_device_mesh
from torch_moe_ep.testing import batch_of, relative_error, tiny_mixtral
from torch_moe_ep.testing.parallel import from_rank0, full_parameters, wrap


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders(**form)` gives a folder of `save_hub_folder`, made once per form."""
    made = {}

    def folder_of(**form) -> Path:
        key = tuple(sorted(form.items(), key=str))
        if key not in made:
            made[key] = save_hub_folder(tmp_path_factory.mktemp("hub"), **form)
        return made[key]

    return folder_of


def loaded_on_rank(run: Run, folder: str, is_meta: bool = False, dtype=torch.float32):
    model = patched(run, is_meta=is_meta, dtype=dtype)
    report = torch_moe_ep.load_hf(model, folder)
    return from_rank0(full_parameters(model)), report


def assert_equals_from_pretrained(found, folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = dict(model.named_parameters())
    assert set(found) == set(expected)
    for name, param in expected.items():
        assert found[name].dtype == dtype and torch.equal(found[name], param), name


GRIDS = [
    Run("fsdp2", 4, 1),
    Run("fsdp2", 4, 2, 2),
    Run("fsdp2", 4, 2, 1),
    Run("fsdp2", 4, 4),
    Run("fsdp2", 2, 2),
    Run("fsdp2", 1, 1),
    Run("hsdp2", 4, 2),
    Run("fsdp1", 4, 2),
    Run("fsdp1_no_shard", 2, 2),
    Run("fsdp1_hybrid", 4, 2),
    Run("ddp", 2, 2),
    Run("none", 4, 4),
]


@pytest.mark.parametrize("run", GRIDS, ids=str)
def test_load_hf_equals_from_pretrained_bit_for_bit_and_reads_its_part(ranks, folders, run):
    folder = folders()
    results = ranks(run.world).run(loaded_on_rank, run, str(folder))
    assert_equals_from_pretrained(results[0][0], folder)
    shard = run.shard or run.world // run.ep
    for _, report in results:
        assert report.expert_bytes == 4 * EXPERT_NUMBERS // (run.ep * shard)


@pytest.mark.parametrize(
    "run", [Run("fsdp2", 4, 2), Run("fsdp2", 2, 1), Run("hsdp2", 4, 2)], ids=str
)
def test_load_hf_reads_one_part_of_dense_weights_in_w(ranks, folders, run):
    folder = folders()
    total = sum(t.nbytes for f in folder.glob("*.safetensors") for t in load_file(f).values())
    dense = total - 4 * EXPERT_NUMBERS
    degree = run.world // 2 if run.wrap == "hsdp2" else run.world
    for _, report in ranks(run.world).run(loaded_on_rank, run, str(folder)):
        assert report.dense_bytes == dense // degree


def test_load_hf_reads_under_fsdp1_little_more_than_the_flat_shard(ranks, folders):
    """Rows are rounded: at most two rows more per weight than 1 / W of it."""
    folder = folders()
    tensors = {k: t for f in folder.glob("*.safetensors") for k, t in load_file(f).items()}
    dense = [t for key, t in tensors.items() if ".experts." not in key]
    total = sum(t.nbytes for t in dense)
    slack = sum(2 * t[0].nbytes for t in dense)
    results = ranks(4).run(loaded_on_rank, Run("fsdp1", 4, 2), str(folder))
    assert total <= sum(report.dense_bytes for _, report in results) <= total + slack


FORMS = [
    (Run("fsdp2", 2, 2, label="fused"), {"fused": True}, torch.float32),
    (Run("fsdp2", 4, 2, 2, label="fused"), {"fused": True}, torch.float32),
    (Run("fsdp1", 2, 2, label="fused_single"), {"fused": True, "single": True}, torch.float32),
    (Run("fsdp2", 2, 2, model=TIED, label="tied"), {"tied": True}, torch.float32),
    (Run("fsdp1", 2, 2, model=TIED, label="tied"), {"tied": True}, torch.float32),
    (Run("none", 2, 1, model=TIED, label="tied"), {"tied": True}, torch.float32),
    (Run("fsdp2", 2, 1, label="bf16_to_fp32"), {"dtype": torch.bfloat16}, torch.float32),
    (Run("fsdp2", 2, 2, label="fp32_to_bf16"), {"single": True}, torch.bfloat16),
    (Run("fsdp1", 2, 2, label="bf16"), {"dtype": torch.bfloat16}, torch.bfloat16),
    (
        Run("fsdp1", 2, 2, options={"use_orig_params": False}, label="flat"),
        {"single": True},
        torch.float32,
    ),
]


@pytest.mark.parametrize(
    ("run", "form", "dtype"), FORMS, ids=[f"{run}_{i}" for i, (run, *_) in enumerate(FORMS)]
)
def test_load_hf_takes_every_form_of_folder(ranks, folders, run, form, dtype):
    folder = folders(**form)
    found, report = ranks(run.world).run(loaded_on_rank, run, str(folder), False, dtype)[0]
    assert_equals_from_pretrained(found, folder, dtype)
    item = form.get("dtype", torch.float32).itemsize
    assert report.expert_bytes == item * EXPERT_NUMBERS // run.world


@pytest.mark.parametrize(
    "run",
    [
        Run("fsdp2", 4, 2),
        Run("fsdp2", 2, 1, model=TIED, label="tied"),
        Run("none", 2, 2, model=TIED, label="tied"),
    ],
    ids=str,
)
def test_load_hf_fills_a_meta_model_that_then_computes_the_same(ranks, folders, run):
    folder = folders(tied=bool(run.model))
    outputs = ranks(run.world).run(forward_from_meta, run, str(folder))
    reference = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    for rank, (found, logits) in enumerate(outputs):
        with torch.no_grad():
            expected = reference(**batch_of(rank)).logits
        assert torch.equal(logits, expected) or relative_error(logits, expected) < 1e-5
        if rank == 0:
            assert_equals_from_pretrained(found, folder)


def forward_from_meta(run: Run, folder: str):
    model = patched(run, is_meta=True)
    torch_moe_ep.load_hf(model, folder)
    if run.model:
        embedding, head = model.model.embed_tokens, model.lm_head
        assert embedding.weight is head.weight
    found = from_rank0(full_parameters(model))
    with torch.no_grad():
        return found, model(**batch_of(dist.get_rank())).logits


def loaded_both_ways(run: Run, folder: str):
    """load_hf, and from_pretrained on rank 0 with sync_from_rank0 for the experts."""
    loaded = patched(run)
    torch_moe_ep.load_hf(loaded, folder)
    found = full_parameters(loaded)
    mesh = init_device_mesh("cpu", run.ep, run.shard)
    model = tiny_mixtral(seed=3)
    if dist.get_rank() == 0:
        model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        apply_dense = [p for n, p in layer.named_parameters() if ".experts." not in n]
        for param in apply_dense:
            dist.broadcast(param.data, src=0)
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        dist.broadcast(module.weight.data, src=0)
    model = wrap(apply_expert_parallel(model, mesh, sync_from_rank0=True), run.wrap, mesh)
    other = full_parameters(model)
    assert set(found) == set(other)
    return [name for name in found if not torch.equal(found[name], other[name])]


@pytest.mark.parametrize("run", [Run("fsdp2", 4, 2, 1), Run("fsdp1", 4, 4)], ids=str)
def test_load_hf_equals_rank_0_and_sync_from_rank0(ranks, folders, run):
    assert ranks(4).run(loaded_both_ways, run, str(folders())) == [[]] * 4


def loaded_after_a_step(run: Run, folder: str):
    """A model in use: gathered weights of its last forward are not what is filled."""
    model = patched(run)
    with torch.no_grad():
        before = model(**batch_of(0)).logits
    torch_moe_ep.load_hf(model, folder)
    with torch.no_grad():
        after = model(**batch_of(0)).logits
    assert not torch.equal(before, after)
    fresh = patched(run)
    torch_moe_ep.load_hf(fresh, folder)
    with torch.no_grad():
        assert torch.equal(after, fresh(**batch_of(0)).logits)


BF16 = {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16)}
IN_USE = [
    Run("fsdp2", 2, 2),
    Run("fsdp1", 2, 2),
    Run("fsdp1_grad_op", 2, 2),
    Run("fsdp1_grad_op", 2, 2, options=BF16, label="bf16"),
    Run("fsdp1_no_shard", 2, 2),
    Run("ddp", 2, 2),
]


@pytest.mark.parametrize("run", IN_USE, ids=str)
def test_load_hf_into_a_model_in_use_leaves_no_old_weights(ranks, folders, run):
    ranks(2).run(loaded_after_a_step, run, str(folders()))


def other_family_on_rank(folder: str):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig.from_pretrained(folder)
    config._experts_implementation = "eager"
    mesh = init_device_mesh("cpu", 2)
    model = wrap(apply_expert_parallel(Qwen3MoeForCausalLM(config), mesh), "fsdp2", mesh)
    torch_moe_ep.load_hf(model, folder)
    torch_moe_ep.export_hf(model, f"{folder}/again")
    return from_rank0(full_parameters(model))


def test_load_hf_and_export_hf_go_by_the_conversion_of_another_family(ranks, tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4,
        num_experts_per_tok=2, vocab_size=64, decoder_sparse_step=1, mlp_only_layers=[1],
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path)
    found = ranks(2).run(other_family_on_rank, str(tmp_path))[0]
    for name, param in model.named_parameters():
        assert torch.equal(found[name], param), name
    saved, exported = (load_file(p / "model.safetensors") for p in (tmp_path, tmp_path / "again"))
    assert any(".experts.3.gate_proj.weight" in key for key in saved)
    assert set(saved) == set(exported)
    assert all(torch.equal(saved[key], exported[key]) for key in saved)


@pytest.mark.full
@pytest.mark.parametrize("form", [{}, {"fused": True}, {"single": True}, {"tied": True}], ids=str)
@pytest.mark.parametrize(
    "kind", ["fsdp2", "fsdp1", "fsdp1_grad_op", "fsdp1_no_shard", "ddp", "none"]
)
@pytest.mark.parametrize(("ep", "shard"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_load_hf_in_every_grid_and_form(ranks, folders, kind, ep, shard, form):
    run = Run(kind, 4, ep, shard, model=TIED if form.get("tied") else {})
    folder = folders(**form)
    results = ranks(4).run(loaded_on_rank, run, str(folder))
    assert_equals_from_pretrained(results[0][0], folder)
    assert all(report.expert_bytes == 4 * EXPERT_NUMBERS // (ep * shard) for _, report in results)
