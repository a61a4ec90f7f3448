#!/bin/bash
# Every figure that needs several GPUs of one host, on however many it finds, within 8 minutes.
#
#     benchmarks/multi_gpu.sh [FOLDER [COMMIT]]     # result files go to FOLDER, default benchmarks/results
#
# One GPU: two ranks share it, small sizes, nothing is a speed; the way to rehearse. The operator
# library is taken as it was built.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

folder=${1:-benchmarks/results}
commit=${2:-$(git rev-parse HEAD)}
python=${PYTHON:-python3}
today=$(date -u +%F)
# NVLink multicast stays off, for children with an environment of their own too.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
num_gpus=$($python -c 'import torch; print(torch.cuda.device_count())')
if [[ $num_gpus == 0 ]]; then
  echo 'multi_gpu.sh needs a GPU, and torch sees none.' >&2
  exit 1
fi
status=0

# measure SECONDS NAME MODULE ARGUMENTS...: at most so long; a failure is told and the rest goes on. The
# result file's name says how many GPUs there were.
measure() {
  local limit=$1 name=$2 module=$3 start=$SECONDS failed=0
  shift 3
  local output="$folder/$today-$name-${num_gpus}gpu.json"
  echo "== $name on $num_gpus GPUs"
  timeout --kill-after=10 "$limit" \
    "$python" -m "$module" "$@" --commit "$commit" --output "$output" || {
    echo "== $name FAILED ($?)"
    failed=1 status=1
  }
  echo "== $name took $((SECONDS - start)) s"
  return $failed
}

measure 85 ep_layer benchmarks.ep_layer --min_seconds 0.5 --turns 2
measure 45 ep_layer benchmarks.ep_layer --min_seconds 0.5 --turns 2 --fine_grained --routings even
measure 45 transport benchmarks.transport
measure 45 transport benchmarks.transport --tokens 8192 --hidden 2048 --top_k 8 --num_experts 128
measure 80 train benchmarks.train
# It waits most of the time: beside the tests, of which nothing is a time.
measure 190 killed_rank benchmarks.killed_rank &
killed_rank=$!
measure 195 several-ranks tests.record tests/gpu/test_several_ranks.py tests/gpu/test_peer.py \
  tests/gpu/test_peer_chunks.py tests/gpu/test_chunks.py tests/gpu/test_fsdp_all_gather.py \
  -k 'training or gather or collective or waits'
wait "$killed_rank" || status=1
measure 75 scaling benchmarks.scaling --plot
exit $status
