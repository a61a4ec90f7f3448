"""Looks at checkpoints and converts them: no ranks, no GPU, memory of one weight.

    python -m torch_moe_ep.checkpoint info run/step-800
    python -m torch_moe_ep.checkpoint verify run/step-800
    python -m torch_moe_ep.checkpoint reshard run/step-800 run-p8/step-800 --world-size 16 \
        --expert-parallel-degree 8
    python -m torch_moe_ep.checkpoint export run/step-800 hf --tokenizer mistralai-folder

A folder around checkpoints stands for the newest of them. Exit status: 0, 1 when `verify` finds
something, 2 when a command cannot be done.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from torch_moe_ep.checkpoint.folder import complete_checkpoints, find_complete
from torch_moe_ep.checkpoint.hub_writer import MAX_SHARD_BYTES
from torch_moe_ep.checkpoint.offline_export import export_stored
from torch_moe_ep.checkpoint.reshard import reshard
from torch_moe_ep.checkpoint.stored import StoredCheckpoint, describe, problems_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        stored = _open(options.checkpoint)
        status: int = options.run(stored, options)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_moe_ep.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what a checkpoint holds")
    info.add_argument("--json", action="store_true", help="for programs")
    info.set_defaults(run=_info)

    verify = commands.add_parser("verify", help="read everything and compare it with its metadata")
    verify.set_defaults(run=_verify)

    grid = commands.add_parser("reshard", help="rewrite the files for another grid of ranks")
    grid.set_defaults(run=_reshard)

    export = commands.add_parser("export", help="write Hugging Face's layout")
    export.set_defaults(run=_export)

    for command in (info, verify, grid, export):
        command.add_argument("checkpoint", type=Path, help="its folder, or the folder around")
    for command in (grid, export):
        command.add_argument("output", type=Path)
    grid.add_argument("--world-size", type=int, required=True, help="W, the number of ranks")
    grid.add_argument("--expert-parallel-degree", type=int, required=True, help="P")
    grid.add_argument("--hybrid-shard-degree", type=int, default=0, help="S; 0: W / P")
    export.add_argument("--config", type=Path, help="a folder with another config.json")
    export.add_argument("--tokenizer", type=Path, help="a folder whose tokenizer is copied")
    export.add_argument("--max-shard-bytes", type=int, default=MAX_SHARD_BYTES)
    return parser


def _open(path: Path) -> StoredCheckpoint:
    if find_complete(path) is None:
        inside = complete_checkpoints(path)
        if inside:
            return StoredCheckpoint(inside[-1])
    return StoredCheckpoint(path)


def _bar(what: str, num_bytes: int) -> Any:
    return tqdm(total=num_bytes, desc=what, unit="B", unit_scale=True, unit_divisor=1024)


def _info(stored: StoredCheckpoint, options: argparse.Namespace) -> int:
    found = describe(stored)
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"{found['folder']}: step {found['step']}, complete")
    print(f"  saved by {found['world_size']} ranks, torch {found['torch']}")
    if found["grid"] is not None:
        grid = " x ".join(f"{size} {name}" for name, size in found["grid"].items())
        print(f"  laid out for {grid}; {len(found['experts'])} layers of experts")
    print(f"  {found['num_files']} files, {_size(found['file_bytes'])}")
    for name, part in found["parts"].items():
        counted = f"{part['tensors']} tensors, {part['elements']:,} elements"
        print(f"  {name:<10} {counted}, {_size(part['bytes'])}")
    print(f"  weights are {', '.join(found['dtypes'])}")
    return 0


def _verify(stored: StoredCheckpoint, _options: argparse.Namespace) -> int:
    begin = time.monotonic()
    with _bar("verify", stored.num_bytes) as bar:
        problems = problems_of(stored, bar.update)
    for problem in problems:
        print(problem)
    if problems:
        print(f"{stored.folder}: {len(problems)} problems; take an earlier checkpoint.")
        return 1
    seconds = time.monotonic() - begin
    print(f"{stored.folder}: all {_size(stored.num_bytes)} read in {seconds:.1f} s, no problem")
    return 0


def _reshard(stored: StoredCheckpoint, options: argparse.Namespace) -> int:
    with _bar("reshard", _tensor_bytes(stored, "")) as bar:
        reshard(
            stored,
            options.output,
            options.world_size,
            options.expert_parallel_degree,
            options.hybrid_shard_degree,
            bar.update,
        )
    print(f"{options.output}: step {stored.marker['step']}, for {options.world_size} ranks")
    return 0


def _export(stored: StoredCheckpoint, options: argparse.Namespace) -> int:
    with _bar("export", _tensor_bytes(stored, "model.")) as bar:
        export_stored(
            stored,
            options.output,
            bar.update,
            config=options.config,
            tokenizer=options.tokenizer,
            max_shard_bytes=options.max_shard_bytes,
        )
    print(f"{options.output}: load it with AutoModelForCausalLM.from_pretrained")
    return 0


def _tensor_bytes(stored: StoredCheckpoint, prefix: str) -> int:
    return sum(
        entry.size.numel() * entry.properties.dtype.itemsize
        for name, entry in stored.tensors.items()
        if name.startswith(prefix)
    )


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


if __name__ == "__main__":
    sys.exit(main())
