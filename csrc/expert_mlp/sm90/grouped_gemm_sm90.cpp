// Host side of the sm_90a grouped GEMM: what it refuses, its tensor maps, its launch.
#include <algorithm>

#include "expert_mlp/grouped_gemm.h"
#include "expert_mlp/sm90/choose_tile.h"
#include "expert_mlp/sm90/instances.h"
#include "expert_mlp/sm90/tensor_map.h"

namespace torch_moe_ep::sm90 {
namespace {

constexpr int kStepK = 64;
constexpr int kChunk = 64;
constexpr int kFloatColumns = 32;  // of a chunk in fp32

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A stack of row-major matrices [depth, rows, columns], read or written in boxes of 64 columns.
TensorMapSpec matrices(
    const void* address, int64_t columns, int64_t rows, int64_t depth, int box_rows) {
  const auto c = static_cast<uint64_t>(columns), r = static_cast<uint64_t>(rows);
  TensorMapSpec spec = {};
  spec.address = address;
  spec.rank = 3;
  std::copy_n(
      std::initializer_list<uint64_t>{c, r, static_cast<uint64_t>(depth)}.begin(), 3, spec.sizes);
  std::copy_n(std::initializer_list<uint64_t>{c, c * r}.begin(), 2, spec.strides);
  std::copy_n(std::initializer_list<uint32_t>{kChunk, static_cast<uint32_t>(box_rows), 1}.begin(),
              3,
              spec.box);
  spec.swizzle = Swizzle::k128Bytes;
  return spec;
}

// gate_up [L, 2I, K] with its rows read as 8 of gate, 8 of up, 8 of gate, ...: the gate and the up
// value of one element meet in one thread's accumulators while the weights keep Hugging Face's
// order.
TensorMapSpec interleaved_gate_up(const GroupedGemmParams& params, const TileConfig& tile) {
  const auto k = static_cast<uint64_t>(params.shape.a_columns);
  const auto width = static_cast<uint64_t>(params.shape.columns / 2);
  const auto experts = static_cast<uint64_t>(params.shape.num_experts);
  return {params.b,
          5,
          {k, 8, 2, width / 8, experts},
          {k, width * k, 8 * k, 2 * width * k},
          {kStepK, 8, 2, static_cast<uint32_t>(tile.block_n / tile.cluster_m / 16), 1},
          Swizzle::k128Bytes};
}

// [R, 2I] as (column, gate or up, row): a copy that passes the edge of gate does not reach up.
TensorMapSpec gate_up_halves(const void* address, int64_t expert_width, int64_t num_rows) {
  const auto width = static_cast<uint64_t>(expert_width);
  const auto rows = static_cast<uint64_t>(num_rows);
  return {address, 3, {width, 2, rows}, {width, 2 * width}, {32, 1, 64}, Swizzle::k64Bytes};
}

TensorMapSpec activation_chunks(const GroupedGemmParams& params, int64_t expert_width) {
  const auto width = static_cast<uint64_t>(expert_width);
  const auto rows = static_cast<uint64_t>(params.shape.rows);
  return {params.activation,
          3,
          {width, rows, 1},
          {width, width * rows},
          {32, 64, 1},
          Swizzle::k64Bytes};
}

cudaError_t encode_all(const GroupedGemmParams& params,
                       const TileConfig& tile,
                       KernelArguments* args) {
  const GroupedGemmShape& s = params.shape;
  // A K-major operand that a cluster shares is halved by rows, an MN-major one along K.
  const int step_a = kStepK / tile.cluster_n, step_b = kStepK / tile.cluster_m;
  const int rows_a = tile.block_m / tile.cluster_n, rows_b = tile.block_n / tile.cluster_m;
  TensorMapSpec a, b, out;
  if (s.layout == GemmLayout::kTN) {
    a = matrices(params.a, s.a_columns, s.rows, 1, step_a);
    b = matrices(params.b, s.columns, s.rows, 1, step_b);
    out = matrices(params.out, s.columns, s.a_columns, s.num_experts, kChunk);
  } else {
    a = matrices(params.a, s.a_columns, s.rows, 1, rows_a);
    b = s.layout == GemmLayout::kNT
            ? matrices(params.b, s.a_columns, s.columns, s.num_experts, rows_b)
            : matrices(params.b, s.columns, s.a_columns, s.num_experts, step_b);
    out = matrices(params.out, s.columns, s.rows, 1, kChunk);
  }
  if (s.epilogue == GemmEpilogue::kAccumulate) {
    out.box[0] = kFloatColumns;
    out.is_float32 = true;
  }
  cudaError_t error = cudaSuccess;
  if (s.epilogue == GemmEpilogue::kSwiglu || s.epilogue == GemmEpilogue::kSwigluBackward) {
    const bool is_backward = s.epilogue == GemmEpilogue::kSwigluBackward;
    const int64_t width = is_backward ? s.columns : s.columns / 2;
    out = gate_up_halves(params.out, width, s.rows);
    if (!is_backward) b = interleaved_gate_up(params, tile);
    if (is_backward) error = encode_tensor_map(gate_up_halves(params.z, width, s.rows), &args->z);
    if (error == cudaSuccess) {
      error = encode_tensor_map(activation_chunks(params, width), &args->activation);
    }
  }
  if (error == cudaSuccess) error = encode_tensor_map(a, &args->a);
  if (error == cudaSuccess) error = encode_tensor_map(b, &args->b);
  if (error == cudaSuccess) error = encode_tensor_map(out, &args->out);
  return error;
}

}  // namespace

const char* refusal(const GroupedGemmShape& shape) {
  constexpr int64_t kMaxIndex = int64_t{1} << 31;
  if (shape.num_experts < 1 || shape.num_experts > kMaxLocalExperts) {
    return "sm90 grouped GEMM takes 1 to 512 local experts";
  }
  if (shape.columns < 8 || shape.columns % 8 != 0 || shape.a_columns < 8 ||
      shape.a_columns % 8 != 0) {
    return "sm90 grouped GEMM takes column counts that are positive multiples of 8";
  }
  if (shape.epilogue == GemmEpilogue::kSwiglu &&
      (shape.layout != GemmLayout::kNT || shape.columns % 16 != 0)) {
    return "the SwiGLU epilogue takes layout NT and an expert width that is a multiple of 8";
  }
  if (shape.epilogue == GemmEpilogue::kSwigluBackward && shape.layout != GemmLayout::kNN) {
    return "the epilogue of SwiGLU's gradient takes layout NN";
  }
  if (shape.epilogue == GemmEpilogue::kAccumulate && shape.layout != GemmLayout::kTN) {
    return "the accumulating epilogue takes layout TN";
  }
  if (shape.rows < 0 || shape.rows % kRowAlignment != 0) {
    return "sm90 grouped GEMM takes a row count that is a multiple of 128";
  }
  if (shape.rows >= kMaxIndex || shape.columns >= kMaxIndex / 2 ||
      shape.a_columns >= kMaxIndex / 2) {
    return "sm90 grouped GEMM takes fewer than 2^31 rows and 2^30 columns";
  }
  const int64_t out_rows = shape.layout == GemmLayout::kTN
                               ? shape.num_experts * ceil_div(shape.a_columns, 128)
                               : shape.rows / 128 + shape.num_experts;
  if (out_rows * ceil_div(shape.columns, 128) >= kMaxIndex) {
    return "sm90 grouped GEMM takes results of fewer than 2^31 tiles";
  }
  return nullptr;
}

int64_t num_column_tiles(const GroupedGemmShape& shape) {
  return ceil_div(shape.columns, choose_tile(shape).block_n);
}

cudaError_t grouped_gemm_with_tile(const GroupedGemmParams& params,
                                   const TileConfig& tile,
                                   cudaStream_t stream) {
  const GroupedGemmShape& s = params.shape;
  if (!is_supported(s) || tile.group_m < 1 || tile.group_m > kMaxGroupM ||
      params.next_tile == nullptr) {
    return cudaErrorInvalidValue;
  }
  const bool is_tn = s.layout == GemmLayout::kTN;
  if (s.rows == 0) {
    if (!is_tn || s.epilogue == GemmEpilogue::kAccumulate) return cudaSuccess;
    return cudaMemsetAsync(params.out, 0, s.num_experts * s.a_columns * s.columns * 2, stream);
  }
  KernelArguments args = {};
  const cudaError_t error = encode_all(params, tile, &args);
  if (error != cudaSuccess) return error;
  const int super_m = tile.block_m * tile.cluster_m;
  args.space.segments = params.segments;
  args.space.num_experts = static_cast<int>(s.num_experts);
  args.space.fixed_tiles_m = is_tn ? static_cast<int>(ceil_div(s.a_columns, super_m)) : 0;
  args.space.tiles_n =
      static_cast<int>(ceil_div(s.columns, int64_t{tile.block_n} * tile.cluster_n));
  args.space.group_m = tile.group_m;
  args.next_tile = params.next_tile;
  args.k_steps = is_tn ? 0 : static_cast<int>(ceil_div(s.a_columns, kStepK));
  args.out_rows = is_tn ? static_cast<int>(s.a_columns) : 0;
  args.columns = static_cast<int>(s.columns);
  args.alpha = params.alpha;
  args.row_weights = params.row_weights;
  args.partial_dots = params.partial_dots;
  args.rows = s.rows;
  const int64_t max_tiles_m =
      is_tn ? s.num_experts * args.space.fixed_tiles_m : s.rows / super_m + s.num_experts;
  const int64_t max_super_tiles = max_tiles_m * args.space.tiles_n;
  if (s.epilogue == GemmEpilogue::kAccumulate) {
    return launch_tn_accumulate(tile, args, max_super_tiles, stream);
  }
  if (is_tn) return launch_tn(tile, args, max_super_tiles, stream);
  if (s.epilogue == GemmEpilogue::kSwigluBackward) {
    return launch_nn_swiglu_backward(tile, args, max_super_tiles, stream);
  }
  if (s.layout == GemmLayout::kNN) return launch_nn(tile, args, max_super_tiles, stream);
  if (s.epilogue == GemmEpilogue::kSwiglu) {
    return launch_nt_swiglu(tile, args, max_super_tiles, stream);
  }
  return launch_nt(tile, args, max_super_tiles, stream);
}

cudaError_t grouped_gemm(const GroupedGemmParams& params, cudaStream_t stream) {
  return grouped_gemm_with_tile(params, choose_tile(params.shape), stream);
}

}  // namespace torch_moe_ep::sm90
