"""Measurements; each program prints a table and keeps a dated file in benchmarks/results.

layer.py         the experts module, forward + backward, against what a user would pick instead
grouped_gemm.py  the three GEMM layouts alone
movement.py      route, dispatch, combine against the copy bandwidth
step.py          a whole training step of full-width layers
results.py       prints and plots the files
common.py        timing turn about, the machine, result files
routing.py       which expert gets how many tokens
"""
