// Both operators for a device, from the functions that it has.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "chunks/chunks.h"
#include "chunks/collective_transport.h"
#include "chunks/pipeline.h"
#include "dispatch/dispatch.h"

namespace torch_moe_ep {

// What the plan was made for. packed: the send buffer of plan_chunks, or none.
template <const ChunkDevice& kDevice>
std::unique_ptr<ChunkTransport> make_transport(const ChunkPlan& plan,
                                               ChunkStages stages,
                                               const ChunkRows& tokens,
                                               const ChunkRows& packed) {
  if (plan.is_over_peers()) return kDevice.over_peers(plan, stages, tokens);
  return std::make_unique<CollectiveChunks>(plan, kDevice, stages, tokens, packed);
}

template <const ChunkDevice& kDevice>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> chunked_experts_forward(
    const at::Tensor& x,
    const at::Tensor& weights,
    const at::Tensor& slot_of_copy,
    const at::Tensor& counts,
    const at::Tensor& host_counts,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    int64_t top_k,
    int64_t row_alignment,
    const std::string& group_name,
    const std::optional<at::Tensor>& segment_offsets,
    int64_t capacity,
    int64_t num_sms,
    int64_t slots_per_pass,
    const std::optional<at::Tensor>& send_rows,
    const std::optional<at::Tensor>& send_weights,
    bool keep_rows,
    bool keep_gate_up) {
  check_dispatch(x, weights, slot_of_copy, top_k);
  if (send_rows) check_packed(x, /*has_weights=*/true, slot_of_copy, *send_rows, send_weights);
  const c10::DeviceGuard guard(x.device());
  const ChunkPlan plan = {slot_of_copy,
                          counts,
                          host_counts,
                          top_k,
                          row_alignment,
                          group_name,
                          segment_offsets.value_or(at::Tensor()),
                          capacity,
                          num_sms};
  const ChunkRows packed = send_rows ? ChunkRows{*send_rows, *send_weights} : ChunkRows{};
  const auto transport = make_transport<kDevice>(
      plan, {"dispatch", "combine"}, {x.contiguous(), weights.contiguous()}, packed);
  const ChunkExperts experts = {gate_up, down, slots_per_pass};
  const ChunkForward found =
      run_forward(*transport, transport->segments(), experts, keep_rows, keep_gate_up);
  return {found.output, found.kept.arrived.rows, found.kept.arrived.weights, found.kept.z};
}

template <const ChunkDevice& kDevice>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> chunked_experts_backward(
    const at::Tensor& grad_output,
    const at::Tensor& rows,
    const at::Tensor& row_weights,
    const at::Tensor& z,
    const at::Tensor& slot_of_copy,
    const at::Tensor& counts,
    const at::Tensor& host_counts,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    int64_t top_k,
    int64_t row_alignment,
    const std::string& group_name,
    const std::optional<at::Tensor>& segment_offsets,
    int64_t capacity,
    int64_t num_sms,
    double weight_grad_scale,
    int64_t slots_per_pass,
    bool needs_weight_grads) {
  check_dispatch(grad_output, std::nullopt, slot_of_copy, top_k);
  const c10::DeviceGuard guard(grad_output.device());
  const ChunkPlan plan = {slot_of_copy,
                          counts,
                          host_counts,
                          top_k,
                          row_alignment,
                          group_name,
                          segment_offsets.value_or(at::Tensor()),
                          capacity,
                          num_sms};
  // The gradient of the results is dispatched, that of the rows combined.
  const auto transport = make_transport<kDevice>(
      plan, {"combine backward", "dispatch backward"}, {grad_output.contiguous(), {}}, {});
  const ChunkSegments& segments = transport->segments();
  const bool needs_rows = needs_weight_grads || z.size(0) == 0;
  TORCH_CHECK_VALUE(!needs_rows || rows.size(0) == segments.num_slots,
                    "rows must be the ",
                    segments.num_slots,
                    " that chunked_experts_forward kept, got shape ",
                    rows.sizes());
  const ChunkBackward found = run_backward(*transport,
                                           segments,
                                           {gate_up, down, slots_per_pass},
                                           {{rows, row_weights}, z},
                                           {needs_weight_grads, weight_grad_scale});
  return {found.x, found.weights, found.gate_up, found.down};
}

}  // namespace torch_moe_ep
