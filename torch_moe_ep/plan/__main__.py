"""Says how to spread a model over GPUs: what fits, how fast a step may be, what to take.

    python -m torch_moe_ep.plan --model mistralai/Mixtral-8x7B-v0.1 --gpus 16 --nodes 2 \
        --gpu h100-80gb --sequence 4096 --batch 1

The model is one that is known offline, or the path of a config.json. Nothing is run, downloaded or
measured; docs/planner.md has the formulas. Exit status: 0, 1 when nothing fits, 2 when a question
cannot be answered.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from torch_moe_ep.plan.gpus import GPUS, Gpu, find_gpu
from torch_moe_ep.plan.layout import PRECISIONS, Batch
from torch_moe_ep.plan.search import plan, recommend
from torch_moe_ep.plan.shape import find_shape
from torch_moe_ep.plan.table import as_json, as_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer one question and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        model, gpu = find_shape(options.model), _gpu(options)
        batch = Batch(options.sequence, options.batch)
        precisions = list(PRECISIONS) if options.precision == "all" else [options.precision]
        plans = plan(model, gpu, options.gpus, options.nodes, batch, precisions)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(as_json(model, gpu, batch, plans), indent=1))
    else:
        print(as_text(model, gpu, batch, plans, show_all=options.all))
    return 0 if recommend(plans) is not None else 1


def _gpu(options: argparse.Namespace) -> Gpu:
    gpu = find_gpu(options.gpu)
    if options.network is None:
        return gpu
    if not options.network > 0:
        raise ValueError(f"network must be more than 0 Gbit/s, got {options.network}.")
    rate = options.network * 1e9 / 8 / (options.gpus // options.nodes or 1)
    sources = {**gpu.sources, "network": f"--network {options.network:g}"}
    return dataclasses.replace(gpu, network=rate, sources=sources)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_moe_ep.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a known name, or a config.json")
    parser.add_argument("--gpus", type=int, required=True, help="W, all GPUs")
    parser.add_argument("--nodes", type=int, default=1, help="machines; default 1")
    parser.add_argument("--gpu", required=True, help=", ".join(GPUS))
    parser.add_argument("--sequence", type=int, required=True, help="tokens of a sample")
    parser.add_argument("--batch", type=int, default=1, help="samples of a GPU; default 1")
    parser.add_argument(
        "--precision", choices=(*PRECISIONS, "all"), default="all", help="of weights and AdamW"
    )
    parser.add_argument("--network", type=float, help="Gbit/s of a node to the others")
    parser.add_argument("--all", action="store_true", help="every layout, not the best of a grid")
    parser.add_argument("--json", action="store_true", help="every layout, for programs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
