"""Export to Hugging Face's layout: what save_pretrained writes, in a stream of files."""

import json
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_cases import TIED, Run, backward
from safetensors.torch import load_file
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Chunk, WeightConverter
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, MixtralDecoderLayer

import torch_moe_ep
from torch_moe_ep import apply_expert_parallel, init_device_mesh
from torch_moe_ep.checkpoint import export, hub_writer
from torch_moe_ep.testing import batch_of, tiny_mixtral
from torch_moe_ep.testing.parallel import wrap

INDEX = "model.safetensors.index.json"
LIMIT = 300_000  # bytes: the tiny Mixtral takes six files
FLAT = {"use_orig_params": False}


def built(run: Run, dtype=torch.float32):
    mesh = init_device_mesh("cpu", run.ep, run.shard)
    model = tiny_mixtral(**run.model).to(dtype)
    return wrap(apply_expert_parallel(model, mesh), run.wrap, mesh, **run.options)


def exported_on_rank(run: Run, folder: str, dtype: torch.dtype, limit: int):
    torch_moe_ep.export_hf(built(run, dtype), folder, max_shard_bytes=limit)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


CASES = [
    (Run("fsdp2", 4, 2), torch.float32, LIMIT),
    (Run("fsdp2", 1, 1), torch.float32, LIMIT),
    (Run("fsdp2", 2, 2, model=TIED, label="tied"), torch.bfloat16, LIMIT),
    (Run("hsdp2", 4, 2), torch.float32, 10**9),
    (Run("fsdp1", 4, 2), torch.float32, LIMIT),
    (Run("fsdp1", 2, 1, options=FLAT, label="flat"), torch.bfloat16, LIMIT),
    (Run("fsdp1", 2, 2, model=TIED, options=FLAT, label="flat_tied"), torch.float32, 10**9),
    (Run("fsdp1_no_shard", 2, 2), torch.float32, LIMIT),
    (
        Run("fsdp1", 2, 2, options={"auto_wrap_policy": None}, label="one_unit"),
        torch.float32,
        LIMIT,
    ),
    (Run("ddp", 2, 2), torch.float32, LIMIT),
    (Run("none", 2, 2, model=TIED, label="tied"), torch.float32, LIMIT),
]


@pytest.mark.parametrize(("run", "dtype", "limit"), CASES, ids=[str(case[0]) for case in CASES])
def test_export_hf_writes_what_save_pretrained_writes(ranks, tmp_path, run, dtype, limit):
    found, wanted = tmp_path / "found", tmp_path / "wanted"
    ranks(run.world).run(exported_on_rank, run, str(found), dtype, limit)
    tiny_mixtral(**run.model).to(dtype).save_pretrained(wanted)
    assert_same_tensors(tensors_of(found), tensors_of(wanted))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((found / name).read_text()) == json.loads((wanted / name).read_text())
    names = {path.name for path in found.iterdir()}
    files = sorted(name for name in names if name.endswith(".safetensors"))
    assert names == {
        *files,
        "config.json",
        "generation_config.json",
        *([INDEX] if limit == LIMIT else []),
    }
    if limit != LIMIT:
        assert files == ["model.safetensors"]
        return
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [sum(t.nbytes for t in load_file(found / name).values()) for name in files]
    assert max(sizes) <= limit
    index = json.loads((found / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["metadata"]["total_parameters"] == tiny_mixtral(**run.model).num_parameters()
    assert index["weight_map"] == {key: name for name in files for key in load_file(found / name)}


def trained_and_exported(run: Run, folder: str):
    model = built(run)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(run, model)
    optimizer.step()
    model.eval()
    with torch.no_grad():
        logits = model(**batch_of(0)).logits
    torch_moe_ep.export_hf(model, folder, max_shard_bytes=LIMIT)
    with torch.no_grad():
        assert torch.equal(model(**batch_of(0)).logits, logits)
        exported = AutoModelForCausalLM.from_pretrained(folder)
        again = wrap(
            apply_expert_parallel(exported, init_device_mesh("cpu", run.ep)).eval(),
            "none",
            init_device_mesh("cpu", run.ep),
        )
        assert torch.equal(again(**batch_of(0)).logits, logits)


@pytest.mark.parametrize(
    "run", [Run("fsdp2", 2, 2), Run("fsdp1", 2, 2), Run("fsdp1_grad_op", 2, 1)], ids=str
)
def test_export_hf_of_a_trained_model_computes_the_same(ranks, tmp_path, run):
    ranks(2).run(trained_and_exported, run, str(tmp_path))


def watched_on_rank(folder: str) -> None:
    """Earlier weights are gone when the next one arrives; open files hold no views of them."""
    model = built(Run("fsdp2", 2, 2))
    seen: list[weakref.ref[torch.Tensor]] = []
    add, write = hub_writer.HubConverter.add, hub_writer.HubWriter.add

    def watched_add(self, name, tensor):
        assert [ref for ref in seen if ref() is not None] == [], f"{name}: earlier weights live"
        seen.append(weakref.ref(tensor))
        return add(self, name, tensor)

    def watched_write(self, name, tensor):
        write(self, name, tensor)
        held = [part.untyped_storage().nbytes() for part in self._open.values()]
        assert sum(held) == self._open_bytes <= LIMIT

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_writer.HubConverter, "add", watched_add)
        patch.setattr(hub_writer.HubWriter, "add", watched_write)
        torch_moe_ep.export_hf(model, folder, max_shard_bytes=LIMIT)
    assert len(seen) == (21 if dist.get_rank() == 0 else 0)


def test_export_hf_holds_one_weight_and_one_file(ranks, tmp_path):
    ranks(2).run(watched_on_rank, str(tmp_path))


def interrupted_on_rank(run: Run, folder: str) -> None:
    """A second export into the folder of a first one fails at its third file."""
    model = built(run)
    torch_moe_ep.export_hf(model, folder, max_shard_bytes=LIMIT)
    save, calls = hub_writer.save_file, []

    def full_disk(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("No space left on device")
        save(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_writer, "save_file", full_disk)
        with pytest.raises(RuntimeError, match="rank 0 failed: OSError: No space left"):
            torch_moe_ep.export_hf(model, folder, max_shard_bytes=LIMIT)
    dist.barrier()
    with pytest.raises(ValueError, match="holds neither"):
        torch_moe_ep.load_hf(model, folder)
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(folder)
    dist.barrier()
    torch_moe_ep.export_hf(model, folder)  # and the next export works and leaves nothing of it
    torch_moe_ep.load_hf(model, folder)
    names = {path.name for path in Path(folder).iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("run", [Run("fsdp2", 2, 2), Run("fsdp1", 2, 2)], ids=str)
def test_export_hf_interrupted_is_no_model_and_every_rank_raises(ranks, tmp_path, run):
    ranks(2).run(interrupted_on_rank, run, str(tmp_path))


def refused_on_rank(folder: str) -> None:
    model = built(Run("fsdp2", 2, 2))
    (Path(folder) / "file").write_text("")
    with pytest.raises(RuntimeError, match="rank 0 failed"):
        torch_moe_ep.export_hf(model, f"{folder}/file")
    with pytest.raises(ValueError, match="max_shard_bytes"):
        torch_moe_ep.export_hf(model, folder, max_shard_bytes=0)
    with pytest.raises(ValueError, match="needs a transformers model"):
        torch_moe_ep.export_hf(torch.nn.Linear(2, 2), folder)


def test_export_hf_refuses_on_every_rank(ranks, tmp_path):
    ranks(2).run(refused_on_rank, str(tmp_path))


def joined_mixtral(**overrides):
    """A model whose files join q, k and v, as if loaded from such files."""
    model = tiny_mixtral(num_key_value_heads=4, **overrides)
    parts = [f"self_attn.{part}_proj.weight" for part in "qkv"]
    joining = WeightConverter("self_attn.qkv.weight", parts, operations=[Chunk(dim=0)])
    model._weight_conversions = [joining]
    return model


def joined_on_rank(kind: str, folder: str) -> None:
    mesh = init_device_mesh("cpu", 2)
    model = apply_expert_parallel(joined_mixtral(), mesh)
    # Under FSDP1 a layer is spread over two units: what waits must outlive its unit.
    policy = ModuleWrapPolicy({MixtralDecoderLayer, MixtralAttention})
    model = wrap(model, kind, mesh, auto_wrap_policy=policy)
    groups = []
    convert = hub_writer.HubConverter._revert

    def watched(self, weights):
        groups.append((len(weights), all(t.is_meta for t in weights.values())))
        return convert(self, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_writer.HubConverter, "_revert", watched)
        torch_moe_ep.export_hf(model, folder)
    real = sorted(count for count, is_blank in groups if not is_blank)
    assert real == ([1, 1, 1, 9, 9] if dist.get_rank() == 0 else [])


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_export_hf_gathers_a_layer_where_transformers_joins_weights(ranks, tmp_path, kind):
    ranks(2).run(joined_on_rank, kind, str(tmp_path / "found"))
    joined_mixtral().save_pretrained(tmp_path / "wanted")
    wanted = tensors_of(tmp_path / "wanted")
    assert "model.layers.0.self_attn.qkv.weight" in wanted
    assert_same_tensors(tensors_of(tmp_path / "found"), wanted)


def test_export_hf_moves_offloaded_shards_to_the_device_that_gathers(monkeypatch):
    """CPU offload, without a GPU: the order of moves on a stand-in for an offloaded DTensor."""

    class Offloaded(torch.Tensor):
        device_mesh = type("Mesh", (), {"device_type": "meta"})()

        def full_tensor(self):
            return torch.ones(2, device=self.device)

    monkeypatch.setattr(export, "DTensor", Offloaded)
    offloaded = torch.ones(1).as_subclass(Offloaded)
    assert export._gathered(offloaded).device.type == "meta"
