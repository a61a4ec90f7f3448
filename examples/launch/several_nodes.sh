#!/bin/bash
# The same command on every node, with the name of one of them:
#   NODES=2 HEAD=node-0 examples/launch/several_nodes.sh --max_steps 100 ...
# Nodes find each other at HEAD:PORT; ranks of a node are consecutive, so that an expert-parallel group of a node's
# GPUs stays inside of it. Nothing is set for the network: the container or the machine image knows its own.
set -euo pipefail
: "${NODES:?set NODES to the number of nodes}" "${HEAD:?set HEAD to the host name of one node, the same everywhere}"
cd "$(dirname "$0")/../.."
exec python -m torch.distributed.run \
  --nnodes "$NODES" \
  --nproc-per-node "${RANKS_PER_NODE:-gpu}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$HEAD:${PORT:-29500}" \
  --rdzv-id "${JOB:-moe}" \
  --max-restarts 0 \
  -m examples.smp_style.train "$@"
