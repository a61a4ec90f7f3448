"""One line makes a stock Mixtral expert-parallel; the code around it stays as it was.

torchrun --nproc-per-node 4 examples/patch_your_model.py --fsdp 2     # or 1, or none
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import MixtralConfig, MixtralForCausalLM

import torch_moe_ep


def wrap(model: torch.nn.Module, fsdp: str, device: torch.device) -> torch.nn.Module:
    """Shard as any script does that has never heard of experts."""
    if fsdp == "1":
        return FullyShardedDataParallel(model, device_id=device, use_orig_params=True)
    for module in (*model.model.layers, model) if fsdp == "2" else ():
        fully_shard(module)
    return model


def main() -> None:
    """Train three steps; rank 0 prints its loss."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fsdp", choices=("2", "1", "none"), default="2")
    fsdp = parser.parse_args().fsdp
    device = torch.device("cpu")
    if torch.cuda.is_available():  # a rank for each GPU
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group()
    torch.manual_seed(0)  # the same weights on every rank
    config = MixtralConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    model = MixtralForCausalLM(config).to(device)
    mesh = torch_moe_ep.init_device_mesh(device.type, expert_parallel_degree=2)
    torch_moe_ep.apply_expert_parallel(model, mesh)
    wrapped = wrap(model, fsdp, device)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    torch.manual_seed(dist.get_rank())  # and data of its own
    tokens = torch.randint(32000, (2, 32), device=device)
    for step in range(3):
        loss = wrapped(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if fsdp == "none":  # expert gradients are final; the dense ones are the script's affair
            torch_moe_ep.average_gradients(model)
        norm = torch_moe_ep.clip_grad_norm_(wrapped, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"fsdp {fsdp}, step {step}: loss {loss.item():.4f}, norm {norm.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
