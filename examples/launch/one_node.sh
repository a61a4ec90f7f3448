#!/bin/bash
# One node, a rank for each GPU:  examples/launch/one_node.sh --max_steps 100 ...
# The arguments are those of examples.smp_style.train. RANKS_PER_NODE=4 takes so many ranks (on a CPU too).
set -euo pipefail
cd "$(dirname "$0")/../.."
exec python -m torch.distributed.run --standalone --nproc-per-node "${RANKS_PER_NODE:-gpu}" \
  -m examples.smp_style.train "$@"
