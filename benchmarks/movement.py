"""Route, plan, dispatch and combine on one rank, against the copy bandwidth of the same loop.

    python -m benchmarks.movement           # GPU: 16384 tokens of 4096 bf16; CPU: 2048 of 1024 fp32

Bytes of a movement: unique rows read once plus rows written once. Route and plan move next to
nothing, so their figure is microseconds.
"""

import argparse
from typing import Any

import torch

from benchmarks import common
from benchmarks.routing import ROUTINGS, expert_ids
from torch_moe_ep import ops


def movement_candidates(
    x: torch.Tensor, router_weights: torch.Tensor, plan: ops.DispatchPlan
) -> list[common.Candidate]:
    """Both movements, forward and backward. The backward of each is the other one's kernel."""
    num_tokens, hidden = x.shape
    num_copies = num_tokens * plan.top_k
    num_bytes = float((num_tokens + num_copies) * hidden * x.element_size())
    x = x.detach().requires_grad_()
    weights = router_weights.detach().requires_grad_()
    rows, row_weights = ops.dispatch(x, weights, plan)
    results = rows.detach().clone().requires_grad_()
    combined = ops.combine(results, plan)
    grad_rows, grad_x = torch.randn_like(rows), torch.randn_like(x)
    grad_weights = torch.randn_like(row_weights)

    def dispatch_backward() -> object:
        outputs, grads = (rows, row_weights), (grad_rows, grad_weights)
        return torch.autograd.grad(outputs, (x, weights), grads, retain_graph=True)

    def combine_backward() -> object:
        return torch.autograd.grad(combined, results, grad_x, retain_graph=True)

    fixed_x, fixed_weights, fixed_results = x.detach(), weights.detach(), results.detach()
    return [
        common.Candidate(
            "dispatch forward", lambda: ops.dispatch(fixed_x, fixed_weights, plan), num_bytes
        ),
        common.Candidate("dispatch backward", dispatch_backward, num_bytes),
        common.Candidate("combine forward", lambda: ops.combine(fixed_results, plan), num_bytes),
        common.Candidate("combine backward", combine_backward, num_bytes),
    ]


def check_exact(x: torch.Tensor, plan: ops.DispatchPlan) -> None:
    """Dispatch then combine of small integers must give K times the input, bit for bit."""
    integers = torch.randint(-8, 9, x.shape, device=x.device).to(x.dtype)
    rows, _ = ops.dispatch(integers, None, plan)
    if not torch.equal(ops.combine(rows, plan), integers * plan.top_k):
        raise RuntimeError("dispatch and combine do not give K times the input; not timed.")


def run_case(
    routing: str, arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Time all stages for one routing."""
    num_tokens, hidden = arguments.tokens, arguments.hidden
    num_experts, top_k = arguments.num_experts, arguments.top_k
    x = torch.randn(num_tokens, hidden, device=device).to(dtype)
    logits = torch.randn(num_tokens, num_experts, device=device).to(dtype)
    ids = expert_ids(routing, num_tokens, num_experts, top_k).to(device)
    router_weights = torch.rand(num_tokens, top_k, device=device)
    plan = ops.plan(ids, num_experts)
    check_exact(x, plan)
    name = str(dtype).removeprefix("torch.")
    case = f"T={num_tokens} {routing} E={num_experts} K={top_k} H={hidden} {name}"
    copied = common.copy(device, num_tokens * (1 + top_k) * hidden * x.element_size() // 2)
    timing_arguments = {"min_seconds": arguments.min_seconds, "turns": arguments.turns}
    timings = common.time_turn_about(
        [copied, *movement_candidates(x, router_weights, plan)], device, **timing_arguments
    )
    rows = common.speed_rows(timings, case, "GB/s", 1e9, reference="copy")
    small = [
        common.Candidate("route forward", lambda: ops.route(logits, top_k), 1.0),
        common.Candidate("plan", lambda: ops.plan(ids, num_experts), 1.0),
    ]
    for timing in common.time_turn_about(small, device, **timing_arguments):
        microseconds = round(1e6 / timing.rate, 2)
        rows.append(
            {"name": timing.candidate.name, "case": case, "value": microseconds, "unit": "us"}
        )
    return rows


def main() -> None:
    """Time the routings asked for and keep the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_common_arguments(parser)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--tokens", type=int, default=16384 if on_gpu else 2048)
    parser.add_argument("--hidden", type=int, default=4096 if on_gpu else 1024)
    parser.add_argument("--num_experts", type=int, default=8)
    parser.add_argument("--top_k", type=int, default=2)
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=["even", "1/i"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    rows: list[dict[str, Any]] = []
    for routing in arguments.routings:
        rows += run_case(routing, arguments, device, dtype)
    common.finish("movement", rows, arguments)


if __name__ == "__main__":
    main()
