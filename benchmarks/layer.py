"""The experts module with routing given, forward + backward, against what a user would pick.

    python -m benchmarks.layer                      # CPU: fp32, H 1024, I 3584, T 256 and 2048
    python -m benchmarks.layer --set must --plot    # GPU: the cells that have a required figure
    python -m benchmarks.layer --tokens 4096 --routings even 1/i

Candidates share weights, inputs and output gradient. Before timing, output and every gradient is
compared with the eager module in fp32; a candidate whose error is above twice that of the
transformers grouped_mm module (fp32: and above 1e-5) is printed as wrong and not timed.
FLOPs of a run: 18 N H I (N copies); recomputation would not count.

For the narrow experts the time is also given as a multiple of the floor max(FLOPs / dense rate,
bytes / copy rate), both rates measured in the same run; bytes: weights read twice, their gradients
written once, X, Y and the gradients of both once. Where sonicmoe cannot be imported, the ratios
that an H200 showed on 2026-11-23 stand beside, marked as not measured here.
"""

import argparse
import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._C._autograd import DeviceType
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks import common
from benchmarks.routing import ROUTINGS, expert_ids
from torch_moe_ep.config import MoEConfig
from torch_moe_ep.testing import make_local_expert_parallel

OURS = "torch_moe_ep"
RECOMPUTE = "torch_moe_ep recompute"
KEPT_ROWS = "torch_moe_ep rows kept"
EAGER = "transformers eager"
GROUPED = "transformers grouped_mm"
COMPILED = "transformers grouped_mm compiled"
SONIC = "sonicmoe"
SONIC_ELSEWHERE = "sonicmoe, not measured here"


@dataclass(frozen=True)
class Case:
    """One cell: T tokens, E experts, K per token, hidden H, expert width I, a routing."""

    tokens: int
    routing: str = "even"
    num_experts: int = 8
    top_k: int = 2
    hidden: int = 4096
    width: int = 14336

    def __str__(self) -> str:
        """The case as result files name it."""
        shape = f"E={self.num_experts} K={self.top_k} H={self.hidden} I={self.width}"
        return f"T={self.tokens} {self.routing} {shape} fwd+bwd"

    @property
    def flops(self) -> float:
        """FLOPs of forward and backward."""
        return 18.0 * self.tokens * self.top_k * self.hidden * self.width

    @property
    def least_bytes(self) -> float:
        """Bytes in bf16 that no implementation can do without."""
        weights = 3 * self.num_experts * self.hidden * self.width
        return 2.0 * (3 * weights + 4 * self.tokens * self.hidden)


FINE_GRAINED = Case(32768, num_experts=128, top_k=8, width=1024)
NARROW = [Case(32768, num_experts=e, top_k=8, hidden=2048, width=768) for e in (8, 32, 128)]
# Ratio to a dense 8192^3 GEMM of the same loop, of each run: an H200 on 2026-11-23.
SONIC_RATIOS = {
    Case(16384): (0.943, 0.964),
    Case(16384, "1/i"): (0.931, 0.943),
    Case(4096): (0.844, 0.861),
    Case(4096, "1/i"): (0.874, 0.871),
    FINE_GRAINED: (0.872,),
}
SETS = {
    "must": [Case(16384), Case(16384, "1/i"), Case(4096), Case(1024), FINE_GRAINED],
    "narrow": NARROW,
    "full": [Case(t, r) for t in (1024, 4096, 16384, 32768) for r in ROUTINGS] + [FINE_GRAINED],
    "cpu": [Case(tokens, hidden=1024, width=3584) for tokens in (256, 2048)],
}


@dataclass
class Inputs:
    """What every candidate gets: X, router weights, ids, the output's gradient, the weights."""

    x: torch.Tensor
    router_weights: torch.Tensor
    ids: torch.Tensor
    grad_output: torch.Tensor
    gate_up: nn.Parameter
    down: nn.Parameter

    def to_float32(self) -> "Inputs":
        """The same values in fp32, for the oracle."""
        return Inputs(
            self.x.detach().float().requires_grad_(),
            self.router_weights.detach().float().requires_grad_(),
            self.ids,
            self.grad_output.float(),
            nn.Parameter(self.gate_up.detach().float()),
            nn.Parameter(self.down.detach().float()),
        )

    def gradients_of(self, module: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        """Output and gradients of X, router weights, gate_up, down: one forward + backward."""
        output = module(self.x, self.ids, self.router_weights)
        wanted = (self.x, self.router_weights, self.gate_up, self.down)
        return [output.detach(), *torch.autograd.grad(output, wanted, self.grad_output)]


NAMES = ("output", "grad X", "grad router weights", "grad gate_up", "grad down")


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Random normal data, the routing with exact loads."""
    torch.manual_seed(0)
    experts, hidden, width = case.num_experts, case.hidden, case.width

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    router_weights = torch.rand(case.tokens, case.top_k, device=device) + 0.1
    router_weights /= router_weights.sum(dim=1, keepdim=True)
    ids = expert_ids(case.routing, case.tokens, experts, case.top_k)
    return Inputs(
        normal(case.tokens, hidden).requires_grad_(),
        router_weights.requires_grad_(),
        ids.to(device),
        normal(case.tokens, hidden),
        nn.Parameter(normal(experts, 2 * width, hidden, scale=hidden**-0.5)),
        nn.Parameter(normal(experts, hidden, width, scale=width**-0.5)),
    )


def transformers_experts(case: Case, inputs: Inputs, implementation: str) -> nn.Module:
    """Transformers' experts module on the inputs' weights."""
    config = MixtralConfig(
        hidden_size=case.hidden,
        intermediate_size=case.width,
        num_local_experts=case.num_experts,
        num_experts_per_tok=case.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module: nn.Module = MixtralExperts(config)
    module.gate_up_proj, module.down_proj = inputs.gate_up, inputs.down
    return module


def our_experts(case: Case, inputs: Inputs, **options: Any) -> nn.Module:
    """The expert-parallel experts module at P = 1, as `apply_expert_parallel` makes it."""
    module = transformers_experts(case, inputs, "eager")
    return make_local_expert_parallel(module, MoEConfig(**options))


def candidates_of(
    case: Case, inputs: Inputs, device: torch.device
) -> dict[str, Callable[..., torch.Tensor]]:
    """Name to module of everything that can run here."""
    grouped = transformers_experts(case, inputs, "grouped_mm")
    modules: dict[str, Callable[..., torch.Tensor]] = {
        OURS: our_experts(case, inputs),
        EAGER: transformers_experts(case, inputs, "eager"),
        GROUPED: grouped,
    }
    if device.type == "cuda":
        modules[RECOMPUTE] = our_experts(case, inputs, recompute="gate_up")
        modules[KEPT_ROWS] = our_experts(case, inputs, received_rows="keep")
        modules[COMPILED] = torch.compile(copy.copy(grouped), dynamic=False)
        if _has_sonicmoe():
            modules[SONIC] = transformers_experts(case, inputs, "sonicmoe")
    return modules


def _has_sonicmoe() -> bool:
    try:
        import sonicmoe  # noqa: F401
    except ImportError:
        return False
    return True


def wrong_rows(
    case: Case, inputs: Inputs, modules: dict[str, Callable[..., torch.Tensor]]
) -> list[dict[str, Any]]:
    """Check every candidate against fp32; a row for each wrong one, which leaves `modules`."""
    exact = inputs.to_float32()
    oracle = exact.gradients_of(transformers_experts(case, exact, "eager"))
    del exact
    _free()
    floor = 1e-5 if inputs.x.dtype == torch.float32 else 0.0
    peer_errors = _errors_of(inputs.gradients_of(modules[GROUPED]), oracle)
    rows = []
    for name in list(modules):
        try:
            errors = _errors_of(inputs.gradients_of(modules[name]), oracle)
            bad = [
                f"{what} {error:.2g} (grouped_mm {peer:.2g})"
                for what, error, peer in zip(NAMES, errors, peer_errors, strict=True)
                if not error <= max(2 * peer, floor)
            ]
        except (RuntimeError, ValueError) as error:
            bad = [str(error).strip().splitlines()[0][:200]]
        _free()
        if bad:
            del modules[name]
            what = "wrong: " + ", ".join(bad)
            print(f"{case}: {name} is {what}", flush=True)
            rows.append({"name": name, "case": str(case), "value": what, "unit": "error"})
    return rows


def _errors_of(actual: list[torch.Tensor], oracle: list[torch.Tensor]) -> list[float]:
    return [common.relative_error(a, o) for a, o in zip(actual, oracle, strict=True)]


def saved_bytes(inputs: Inputs, module: Callable[..., torch.Tensor]) -> int:
    """Bytes that forward saves for backward, without weights and the caller's X."""
    own = {
        tensor.untyped_storage().data_ptr() for tensor in (inputs.x, inputs.gate_up, inputs.down)
    }
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(inputs.x, inputs.ids, inputs.router_weights)
    del output
    return sum(found.values())


def launches(inputs: Inputs, module: Callable[..., torch.Tensor]) -> tuple[int, int]:
    """(kernels, copies and fills; host synchronisations) of one forward + backward on a GPU."""
    inputs.gradients_of(module)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        inputs.gradients_of(module)
    events = profile.events() or []
    kernels = sum(event.device_type == DeviceType.CUDA for event in events)
    waits = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
    # The profiler itself ends with one cudaDeviceSynchronize, which is not counted.
    return kernels, sum(event.name in waits for event in events)


def run_case(
    case: Case, device: torch.device, dtype: torch.dtype, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Check, time and count every candidate of one cell."""
    inputs = make_inputs(case, device, dtype)
    modules = candidates_of(case, inputs, device)
    rows = wrong_rows(case, inputs, modules)
    candidates = [common.dense_gemm(device, dtype)]
    candidates += [
        common.Candidate(name, partial(inputs.gradients_of, module), case.flops)
        for name, module in modules.items()
    ]
    timings = common.time_turn_about(
        candidates, device, min_seconds=arguments.min_seconds, turns=arguments.turns
    )
    unit, scale = ("TFLOP/s", 1e12) if device.type == "cuda" else ("GFLOP/s", 1e9)
    rows += common.speed_rows(timings, str(case), unit, scale)
    if device.type == "cuda":
        rows += sonic_rows(case) + floor_rows(case, timings, device, arguments)
    for name, module in modules.items():
        saved = saved_bytes(inputs, module) / 2**30
        rows.append(
            {"name": name, "case": str(case), "value": round(saved, 4), "unit": "GiB saved"}
        )
        if device.type == "cuda" and name in (OURS, GROUPED):
            counts = launches(inputs, module)
            for value, unit in zip(counts, ("launches", "host syncs"), strict=True):
                rows.append({"name": name, "case": str(case), "value": value, "unit": unit})
    if OURS in modules:
        _print_ratio(case, timings)
    torch._dynamo.reset()
    return rows


def sonic_rows(case: Case) -> list[dict[str, Any]]:
    """What sonicmoe reached elsewhere, where it cannot be timed and the case is known."""
    if case not in SONIC_RATIOS or _has_sonicmoe():
        return []
    ratios = SONIC_RATIOS[case]
    middle = round(sum(ratios) / len(ratios), 4)
    return [
        {
            "name": SONIC_ELSEWHERE,
            "case": str(case),
            "value": middle,
            "unit": "ratio to dense",
            "ratio_to_dense": middle,
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    ]


def floor_rows(
    case: Case,
    timings: list[common.Timing],
    device: torch.device,
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Time of each candidate over the floor, for the narrow experts."""
    if case not in NARROW:
        return []
    (copy_rate,) = common.time_turn_about(
        [common.copy(device, 2**30)],
        device,
        min_seconds=arguments.min_seconds,
        turns=arguments.turns,
    )
    dense = next(timing.rate for timing in timings if timing.candidate.name == common.DENSE)
    floor = max(case.flops / dense, case.least_bytes / copy_rate.rate)
    return [
        {
            "name": timing.candidate.name,
            "case": str(case),
            "value": round(case.flops / timing.rate / floor, 3),
            "unit": "times the floor",
        }
        for timing in timings
        if timing.candidate.name != common.DENSE
    ]


def _print_ratio(case: Case, timings: list[common.Timing]) -> None:
    rates = {timing.candidate.name: timing.rate for timing in timings}
    peers = {n: rate for n, rate in rates.items() if not n.startswith((OURS, common.DENSE))}
    if peers:
        best = max(peers, key=lambda name: peers[name])
        ratio = rates[OURS] / peers[best]
        print(f"{case}: {OURS} is {ratio:.2f} times the best other ({best})", flush=True)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    """Run the cells asked for and keep the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_common_arguments(parser)
    parser.add_argument("--set", choices=SETS, help="default: cpu on a CPU, must on a GPU")
    parser.add_argument("--tokens", type=int, nargs="+", help="own grid instead of a set: T")
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=["even"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if on_gpu else "float32"))
    if arguments.tokens:
        sizes = {} if on_gpu else {"hidden": 1024, "width": 3584}
        cases = [Case(t, r, **sizes) for t in arguments.tokens for r in arguments.routings]
    else:
        cases = SETS[arguments.set or ("must" if on_gpu else "cpu")]
    rows: list[dict[str, Any]] = []
    for case in cases:
        of_case = run_case(case, device, dtype, arguments)
        # Case by case: a run that is cut off keeps what it has measured.
        common.write_results("layer", of_case, arguments.output, arguments.commit)
        rows += of_case
        _free()
    common.finish("layer", rows, arguments)


if __name__ == "__main__":
    main()
