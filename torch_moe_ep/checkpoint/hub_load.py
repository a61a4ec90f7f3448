"""Load a Hugging Face folder into a patched model; each rank reads its own part alone."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

from torch_moe_ep.checkpoint.folder import raise_alike
from torch_moe_ep.checkpoint.hub_files import HubFiles, LoadReport
from torch_moe_ep.checkpoint.hub_names import Piece, Source, find_sources
from torch_moe_ep.checkpoint.weights import Box, Weight, check_is_model, each_tensor, find_weights
from torch_moe_ep.integrations.peft import base_name, is_adapter_name
from torch_moe_ep.parallel.agreement import meet
from torch_moe_ep.parallel.state import ExpertParallelState, fsdp_param_groups, states_of


@torch.no_grad()
def load_hf(model: nn.Module, folder: str | os.PathLike[str]) -> LoadReport:
    """Load the weights of a Hugging Face folder, in place, each rank only what it holds.

    Experts may be stored one by one (the hub's layout) or fused (transformers' own names), in one
    safetensors file or in several with an index, in any floating dtype: values are cast to the
    parameters'. What is on the meta device is materialised first: parameters where FSDP wants
    them, computed buffers (rotary frequencies) by transformers' own initialisation.

    Args:
        model: a patched transformers model, wrapped as for training (FSDP2, FSDP1, DDP or none).
            Of one with adapters the base model's weights are loaded.
        folder: of `save_pretrained`, of `export_hf` or a downloaded snapshot; every rank must be
            able to read it.

    Returns:
        The bytes this rank requested. Experts: all expert bytes / (P S) where a dimension divides.
        Dense under FSDP2: 1 / W of each weight whose first dimension W divides, else this rank's
        rows; under FSDP1 the rows that cover its flat shard; under DDP or none the whole weight.

    Raises:
        ValueError: on every rank, before anything is changed, when the model is not patched or the
            folder does not fit it (truncated or missing file, missing expert or weight, other
            shape or kind of dtype, extra tensors, an index that points outside of the folder).
            Also when reading fails later; weights are then part old, part new.
        RuntimeError: a rank did not come within the time-out; the message names it.

    Collective over all ranks (two exchanges of small objects; one gather per unit under FSDP1).
    Syncs the host.
    """
    check_is_model(model)
    states = states_of(model)
    if not states:
        raise ValueError(
            "load_hf needs a model that apply_expert_parallel changed; load others with "
            "from_pretrained."
        )
    meet("load_hf")
    files: HubFiles | None = None
    sources: list[Source] = []
    failure: Exception | None = None
    try:
        try:
            files = HubFiles(Path(folder))
            sources = find_sources(states[0].model, _base_weights(model), files.headers)
            _check_copies(sources, files)
        except Exception as error:  # of any kind: raised on every rank
            failure = error
        raise_alike(failure)
        assert files is not None
        raise_alike(_load(model, sources, files))
        return files.report
    finally:
        if files is not None:
            files.close()


def _base_weights(model: nn.Module) -> list[Weight]:
    """The weights by the names of the model without adapters; adapters are left out."""
    weights = [weight for weight in find_weights(model) if not is_adapter_name(weight.names[0])]
    for weight in weights:
        weight.names = [base_name(name) for name in weight.names]
    return weights


def _load(model: nn.Module, sources: Sequence[Source], files: HubFiles) -> Exception | None:
    """Fill every weight; a failure is kept while the other ranks' gathers go on."""
    failure: Exception | None = None
    try:
        _materialise(states_of(model)[0], [source.weight for source in sources])
    except Exception as error:  # of any kind: raised on every rank by the caller
        failure = error
    source_of = {id(source.weight): source for source in sources}
    weights = [source.weight for source in sources]
    for weight, tensor in each_tensor(model, weights, writeback=True):
        if failure is not None:
            continue
        try:
            _fill(weight, tensor, source_of[id(weight)].pieces, files)
        except Exception as error:  # likewise
            failure = error
    return failure


def _fill(weight: Weight, tensor: torch.Tensor, pieces: list[Piece], files: HubFiles) -> None:
    """Read this rank's part of one weight into the tensor that holds it (a copy per piece)."""
    if weight.flat_range is None:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        _read_box(weight, pieces, files, local)
        return
    first, end = weight.flat_range
    if first == end:
        return
    rows = torch.empty([s.stop - s.start for s in weight.box], dtype=weight.dtype)
    _read_box(weight, pieces, files, rows)
    skipped = weight.box[0].start * weight.shape[1:].numel() if weight.box else 0
    tensor.view(-1)[first:end].copy_(rows.view(-1)[first - skipped : end - skipped])


def _read_box(weight: Weight, pieces: list[Piece], files: HubFiles, target: torch.Tensor) -> None:
    """Read the blocks in which pieces meet this rank's box, into a tensor of the box's shape."""
    shape = tuple(part.stop - part.start for part in weight.box)
    assert tuple(target.shape) == shape, f"{weight.names[0]}: holds {target.shape}, not {shape}"
    for piece in pieces:
        meeting = _meet(piece, weight.box)
        if meeting is None:
            continue
        index, place = meeting
        target[place].copy_(files.read(piece.key, index, is_expert=weight.is_expert))


def _meet(piece: Piece, box: Box) -> tuple[Box, tuple[slice | int, ...]] | None:
    """Where a piece and a box overlap: as an index of the file's tensor and of the box.

    A piece of expert 5 that covers ``weight[5:6, 0:64, :]`` meets the box ``[4:8, 32:96, :]`` in
    the file's rows 32 to 63, which are ``[1, 0:32, :]`` of the box.
    """
    index: list[slice] = []
    place: list[slice | int] = []
    for dim, part in enumerate(box):
        start = piece.start[dim]
        first = max(start, part.start)
        end = min(start + piece.shape[dim], part.stop)
        if first >= end:
            return None
        if piece.is_stacked and dim == 0:
            place.append(first - part.start)
        else:
            index.append(slice(first - start, end - start))
            place.append(slice(first - part.start, end - part.start))
    return tuple(index), tuple(place)


def _check_copies(sources: Sequence[Source], files: HubFiles) -> None:
    """Tied weights that the files hold twice must be equal there; reads this rank's part of both.

    Raises:
        ValueError: they differ, so the files are of a model that does not tie them.
    """
    for source in sources:
        weight = source.weight
        shape = [part.stop - part.start for part in weight.box]
        for copy in source.copies:
            both = [torch.empty(shape, dtype=weight.dtype) for _ in range(2)]
            _read_box(weight, source.pieces, files, both[0])
            _read_box(weight, [copy], files, both[1])
            if not torch.equal(*both):
                raise ValueError(
                    f"the folder holds different {' and '.join(weight.names)}, but the model ties "
                    f"them; build it with tie_word_embeddings=False."
                )


def _materialise(state: ExpertParallelState, weights: Sequence[Weight]) -> None:
    """Give what is on meta memory on its home device; values are to be loaded.

    Raises:
        ValueError: a computed buffer that transformers' `_init_weights` does not fill.
    """
    homes = _offloaded_homes(state.model)

    def to_home(tensor: torch.Tensor) -> torch.Tensor:
        home = homes.get(id(tensor), state.device)
        return torch.empty_like(tensor, device=home) if tensor.is_meta else tensor

    for module in state.model.modules():
        held = [*module._parameters.values(), *module._buffers.values()]
        if not any(tensor is not None and tensor.is_meta for tensor in held):
            continue
        computed = [
            name
            for name in module._non_persistent_buffers_set
            if (buffer := module._buffers.get(name)) is not None and buffer.is_meta
        ]
        module._apply(to_home, recurse=False)
        if computed:
            _compute_buffers(state.model, module, computed)
    for weight in weights:  # new parameters, where weights were plain, are not tied any more
        module, name = weight.places[0]
        for other, other_name in weight.places[1:]:
            if name in module._parameters and other_name in other._parameters:
                other._parameters[other_name] = module._parameters[name]


def _offloaded_homes(model: nn.Module) -> dict[int, torch.device]:
    """The CPU for the shards of FSDP2 modules with CPU offload, by the parameters' ids."""
    groups = [
        group
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for group in fsdp_param_groups(module)
        if isinstance(group.offload_policy, CPUOffloadPolicy)
    ]
    return {id(p.sharded_param): torch.device("cpu") for group in groups for p in group.fsdp_params}


def _compute_buffers(model: nn.Module, module: nn.Module, names: list[str]) -> None:
    floating = [
        buffer
        for name in names
        if (buffer := module._buffers[name]) is not None and buffer.is_floating_point()
    ]
    for buffer in floating:
        buffer.fill_(float("nan"))
    initialise = getattr(model, "_init_weights", None)
    if initialise is not None:
        initialise(module)
    if len(floating) != len(names) or any(bool(buffer.isnan().any()) for buffer in floating):
        raise ValueError(
            f"the buffers {names} of a {type(module).__name__} are on the meta device and no "
            f"weights; build the model outside of torch.device('meta'), or fill them and move "
            f"them first."
        )
