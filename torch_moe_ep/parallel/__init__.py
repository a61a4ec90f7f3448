"""Expert parallelism beside PyTorch's data parallelism.

Ranks form a grid ``(replicate, shard, ep)``. `apply_expert_parallel` (apply.py) runs, in order:

    checks.py     every rank looks for a misfit; all raise alike, before anything is changed
    swap.py       each experts module keeps its class as base, its weights become this rank's slice
    adapters.py   LoRA factors around them likewise
    fsdp2.py      the experts shard themselves over (replicate, shard); late mixed-precision policy
    fsdp1.py      the mark that keeps FSDP1 and DDP away from the experts
    state_dict.py hooks: full tensors in and out of an FSDP1 full state dict
    save_pretrained.py  whole tensors out of the model's save_pretrained
    forward.py    what happens at the model's first forward: guard, hidden root, prefetch lists
    masters.py    fp32 masters where accelerate upcasts the dense parameters
    order.py      tells process-group hooks when a forward begins and of which kind it is
    batch_check.py  a warning when EP partners train on the same batch

and these serve the training loop: grad_norm.py and stock_clip.py (clipping), optimizer.py (step
hooks, parameter groups), average.py (dense gradients without FSDP), initialize.py (weights),
fsdp_all_gather.py and copy_engine.py (FSDP2's all-gather by copy engines).
"""

from torch_moe_ep.parallel.apply import apply_expert_parallel
from torch_moe_ep.parallel.average import average_gradients
from torch_moe_ep.parallel.fsdp_all_gather import set_fsdp_all_gather
from torch_moe_ep.parallel.grad_norm import clip_grad_norm_
from torch_moe_ep.parallel.initialize import initialize_experts
from torch_moe_ep.parallel.mesh import dense_mesh, init_device_mesh
from torch_moe_ep.parallel.optimizer import param_groups

__all__ = [
    "apply_expert_parallel",
    "average_gradients",
    "clip_grad_norm_",
    "dense_mesh",
    "init_device_mesh",
    "initialize_experts",
    "param_groups",
    "set_fsdp_all_gather",
]
