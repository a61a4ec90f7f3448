"""Measurements; each program prints a table and keeps a dated file in benchmarks/results.

one GPU, or a CPU
    layer.py            the experts module, forward + backward, against what a user would pick
    grouped_gemm.py     the three GEMM layouts alone
    swiglu_backward.py  the gradient of SwiGLU in a GEMM's epilogue, or by a kernel of its own
    movement.py         route, dispatch, combine against the copy bandwidth
    step.py             a whole training step of full-width layers
    memory.py           the planner's memory beside what torch reports
    offload.py          activations on the host: bytes saved, time it costs
    launch_order.py     what the host launches in which order under FSDP2

several ranks (multi_gpu.sh runs all but hooks.py on the GPUs of a host)
    ep_layer.py         the experts module over all ranks
    train.py            whole training steps beside stock FSDP2
    scaling.py          the same on 1, 2, 4, ... GPUs
    transport.py        rows between ranks, against torch's own all-to-alls
    hooks.py            what process-group hooks cost
    killed_rank.py      how long the others take to name a killed rank

results
    common.py           timing turn about, the machine, result files
    routing.py          which expert gets how many tokens
    result_files.py     the format, and the place of tables in a page
    results.py          prints and plots the files, renews README and docs/performance.md
    performance_page.py the tables of docs/performance.md
"""
