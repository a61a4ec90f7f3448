// The only TORCH_LIBRARY: every operator's schema, in pipeline order. Each implementation file ends
// with its TORCH_LIBRARY_IMPL. Letters and contracts: csrc/README.md and <stage>/<stage>.h.

#include <torch/library.h>

TORCH_LIBRARY(torch_moe_ep, m) {
  // A few numbers of every rank, in rank order: [n] -> [P, n]. For the checks around the pipeline.
  m.def("all_gather(Tensor row, str group_name) -> Tensor");

  // Softmax over all experts and the top_k of it; weights fp32 [T, K] descending, ids int64 [T, K].
  m.def("route(Tensor logits, int top_k, bool normalize) -> (Tensor weights, Tensor expert_ids)");
  // Gradient of the logits from that of the weights.
  m.def(
      "route_backward(Tensor grad_weights, Tensor logits, Tensor weights, Tensor expert_ids, "
      "bool normalize) -> Tensor");
  // exp(logits) scaled so that every expert has the same share: fp32 [T, E]; not differentiable.
  m.def("sinkhorn(Tensor logits, int num_iterations) -> Tensor");

  // Where each copy goes: counts meet over the EP group, nothing else travels. With x (P > 1) the
  // send buffer is packed while they do, for dispatch of the same tokens.
  m.def(
      "plan(Tensor expert_ids, int num_experts, int row_alignment, int max_rows, str group_name, "
      "Tensor(a!) invalid_flag, Tensor? x=None, Tensor? weights=None) -> (Tensor slot_of_copy, "
      "Tensor slot_of_received, Tensor expert_offsets, Tensor counts, Tensor host_counts, "
      "Tensor send_rows, Tensor send_weights)");
  // Expert offsets on the CPU, from a plan's counts: [L + 1], or [0] where the host has no counts.
  m.def("plan_host_offsets(Tensor host_counts, int row_alignment, str group_name) -> Tensor");

  // Copies to their experts' owners, in expert order; padding rows are zeros.
  m.def(
      "dispatch(Tensor x, Tensor? weights, Tensor slot_of_copy, Tensor slot_of_received, "
      "Tensor expert_offsets, Tensor counts, Tensor host_counts, int top_k, int row_alignment, "
      "str group_name, Tensor? send_rows=None, Tensor? send_weights=None) "
      "-> (Tensor rows, Tensor row_weights)");

  // The plan of tokens that travel in chunks: every chunk's counts meet in one exchange.
  m.def(
      "plan_chunks(Tensor expert_ids, int num_experts, int num_chunks, int row_alignment, "
      "int max_rows, str group_name, Tensor(a!) invalid_flag, Tensor? x=None, "
      "Tensor? weights=None) -> (Tensor slot_of_copy, Tensor counts, Tensor host_counts, "
      "Tensor send_rows, Tensor send_weights)");

  // The same two in two hops, where a token crosses to each node once; bytes_sent [2] grows by the
  // bytes of rows, and of ids and weights, that leave this rank's node.
  m.def(
      "node_plan(Tensor expert_ids, int num_experts, int row_alignment, int max_rows, "
      "int ranks_per_node, str group_name, Tensor(a!) invalid_flag, Tensor(b!)? bytes_sent=None) "
      "-> (Tensor row_of_copy, Tensor slot_of_forwarded, Tensor slot_of_received, "
      "Tensor expert_offsets, Tensor counts, Tensor host_counts)");
  m.def(
      "node_dispatch(Tensor x, Tensor? weights, Tensor row_of_copy, Tensor slot_of_forwarded, "
      "Tensor slot_of_received, Tensor expert_offsets, Tensor counts, Tensor host_counts, "
      "int top_k, int row_alignment, int ranks_per_node, str group_name, "
      "Tensor(a!)? bytes_sent=None) -> (Tensor rows, Tensor row_weights)");

  // The same two between GPUs that map each other's memory: rows straight into their slots on the
  // owner. capacity: slots of every rank, 0 for what the counts ask for (one wait on the host);
  // slots_needed grows to the number needed where it is exceeded.
  m.def(
      "peer_plan(Tensor expert_ids, int num_experts, int row_alignment, int max_rows, int "
      "capacity, "
      "str group_name, Tensor(a!) invalid_flag, Tensor(b!) slots_needed) -> (Tensor slot_of_copy, "
      "Tensor expert_offsets, Tensor counts, Tensor host_counts)");
  // The same for tokens in chunks: every chunk's counts meet in one exchange.
  m.def(
      "peer_plan_chunks(Tensor expert_ids, int num_experts, int num_chunks, int row_alignment, "
      "int max_rows, int capacity, str group_name, Tensor(a!) invalid_flag, "
      "Tensor(b!) slots_needed) -> (Tensor slot_of_copy, Tensor segment_offsets, Tensor counts, "
      "Tensor host_counts)");
  // Without keep the rows lie in memory that the group's next operation overwrites.
  m.def(
      "peer_dispatch(Tensor x, Tensor? weights, Tensor slot_of_copy, Tensor expert_offsets, "
      "Tensor counts, Tensor host_counts, int top_k, int row_alignment, int capacity, int num_sms, "
      "str group_name, bool keep=True) -> (Tensor rows, Tensor row_weights)");
  // Waits on the host for the current stream of a device; raises when a rank of a group that shares
  // memory was given up on.
  m.def("check_peers(Tensor like, str group_name) -> ()");

  // y = (row_weight * silu(rows gate^T) * (rows up^T)) down^T, expert by expert; differentiable.
  // With x and the plan's parts (P = 1) backward dispatches x again instead of keeping rows; with
  // main_grads it adds the weights' gradients there and returns none.
  m.def(
      "expert_mlp(Tensor rows, Tensor row_weights, Tensor expert_offsets, Tensor host_offsets, "
      "Tensor gate_up, Tensor down, float weight_grad_scale, int slots_per_pass, "
      "bool recompute_gate_up, Tensor? x=None, Tensor? slot_of_copy=None, Tensor? counts=None, "
      "int top_k=1, int row_alignment=1, Tensor? main_grad_gate_up=None, "
      "Tensor? main_grad_down=None) -> Tensor");
  // The same with z = rows gate_up^T [R, 2I] for backward; [0, 2I] when computed in several passes.
  m.def(
      "expert_mlp_forward(Tensor rows, Tensor row_weights, Tensor expert_offsets, "
      "Tensor host_offsets, Tensor gate_up, Tensor down, int slots_per_pass) "
      "-> (Tensor y, Tensor z)");
  // All four gradients; those of the weights are scaled here and nowhere else, and are [0] where
  // nobody needs them.
  m.def(
      "expert_mlp_backward(Tensor grad_y, Tensor rows, Tensor row_weights, Tensor z, "
      "Tensor expert_offsets, Tensor host_offsets, Tensor gate_up, Tensor down, "
      "float weight_grad_scale, int slots_per_pass, bool needs_weight_grads=True) -> "
      "(Tensor grad_rows, Tensor grad_row_weights, Tensor grad_gate_up, Tensor grad_down)");
  // The same with those of the weights added to fp32 tensors.
  m.def(
      "expert_mlp_backward_add(Tensor grad_y, Tensor rows, Tensor row_weights, Tensor z, "
      "Tensor expert_offsets, Tensor host_offsets, Tensor gate_up, Tensor down, "
      "float weight_grad_scale, int slots_per_pass, Tensor(a!) main_grad_gate_up, "
      "Tensor(b!) main_grad_down) -> (Tensor grad_rows, Tensor grad_row_weights)");

  // Forward of one chunk of tokens, whose rows lie in segments of buffers of all chunks.
  m.def(
      "expert_mlp_forward_chunk(Tensor rows, Tensor row_weights, Tensor segment_offsets, "
      "Tensor host_offsets, int num_chunks, int chunk, Tensor gate_up, Tensor down, "
      "int slots_per_pass, Tensor(a!) y, Tensor(b!)? z) -> ()");
  // Its backward in two parts. First, of one chunk, what travels back, and what the weights'
  // gradients are made of: z is given, or rows to compute it again.
  m.def(
      "expert_mlp_input_grads_chunk(Tensor grad_y, Tensor? rows, Tensor row_weights, Tensor? z, "
      "Tensor segment_offsets, Tensor host_offsets, int num_chunks, int chunk, Tensor gate_up, "
      "Tensor down, Tensor(a!) grad_rows, Tensor(b!) grad_row_weights, Tensor(c!) grad_z, "
      "Tensor(d!) activation) -> ()");
  // Then both weight gradients over the rows of all chunks.
  m.def(
      "expert_mlp_weight_grads(Tensor grad_y, Tensor rows, Tensor grad_z, Tensor activation, "
      "Tensor segment_offsets, Tensor host_offsets, int num_chunks, float weight_grad_scale) "
      "-> (Tensor grad_gate_up, Tensor grad_down)");
  // Both parts over all chunks at once, in passes.
  m.def(
      "expert_mlp_backward_chunks(Tensor grad_y, Tensor rows, Tensor row_weights, Tensor z, "
      "Tensor segment_offsets, Tensor host_offsets, int num_chunks, Tensor gate_up, Tensor down, "
      "float weight_grad_scale, int slots_per_pass, Tensor(a!) grad_rows, "
      "Tensor(b!) grad_row_weights, bool needs_weight_grads=True) -> (Tensor grad_gate_up, "
      "Tensor grad_down)");

  // One GEMM of them alone, bf16 on CUDA: a [R, K] with b [L, N, K] (layout NT) or [L, K, N] (NN)
  // -> [R, N]; a [R, M] with b [R, N] (TN) -> [L, M, N]. Contract: expert_mlp/grouped_gemm.h. For
  // tests and benchmarks; not differentiable.
  // With num_chunks expert_offsets has the segments of each expert in each chunk, of which only the
  // chunk's rows are taken. max_shared_bytes: the sm80 tile of devices that have no more of shared
  // memory for a CTA.
  m.def(
      "grouped_gemm(Tensor a, Tensor b, Tensor expert_offsets, str layout, int num_chunks=1, "
      "int chunk=0, int? max_shared_bytes=None) -> Tensor");
  // One of them with SwiGLU's gradient behind it, in its epilogue (sm90) or by a kernel of its own:
  // for the gradient of y [R, H], down [L, H, I] and z [R, 2I]. For tests and benchmarks.
  m.def(
      "swiglu_backward_gemm(Tensor grad_y, Tensor down, Tensor z, Tensor row_weights, "
      "Tensor expert_offsets, bool is_fused) -> (Tensor grad_z, Tensor activation, "
      "Tensor grad_row_weights)");
  // The tile that the sm_90a kernels take for a shape: block M and N, ping-pong or not, cluster M
  // and N, B kept or not; [] where the epilogue swiglu_backward is not used. Builds with CUDA;
  // needs no GPU.
  m.def(
      "grouped_gemm_tile(str layout, int num_experts, int rows, int columns, int a_columns, "
      "str epilogue, int num_chunks=1) -> int[]");

  // Results back to their tokens, summed over K; its backward adds this rank's copies per expert to
  // tokens_per_expert.
  m.def(
      "combine(Tensor rows, Tensor? row_weights, Tensor slot_of_copy, Tensor slot_of_received, "
      "Tensor expert_offsets, Tensor counts, Tensor host_counts, int top_k, int row_alignment, "
      "str group_name, Tensor? tokens_per_expert=None) -> (Tensor x, Tensor weights)");
  // The same in two hops: summed on each node before it crosses.
  m.def(
      "node_combine(Tensor rows, Tensor? row_weights, Tensor row_of_copy, "
      "Tensor slot_of_forwarded, Tensor slot_of_received, Tensor expert_offsets, Tensor counts, "
      "Tensor host_counts, int top_k, int row_alignment, int ranks_per_node, str group_name, "
      "Tensor? tokens_per_expert=None, Tensor(a!)? bytes_sent=None) -> (Tensor x, Tensor weights)");
  // The same between GPUs that map each other's memory: read back from the owners.
  m.def(
      "peer_combine(Tensor rows, Tensor? row_weights, Tensor slot_of_copy, Tensor expert_offsets, "
      "Tensor counts, Tensor host_counts, int top_k, int row_alignment, int capacity, int num_sms, "
      "str group_name, Tensor? tokens_per_expert=None) -> (Tensor x, Tensor weights)");

  // dispatch, expert_mlp and combine of tokens in chunks: a chunk travels under the GEMMs of the
  // one before, in forward and in backward; differentiable. segment_offsets, capacity and num_sms
  // are those of peer_plan_chunks; none and 0 with the process group's all-to-alls.
  m.def(
      "chunked_experts(Tensor x, Tensor weights, Tensor slot_of_copy, Tensor counts, "
      "Tensor host_counts, Tensor gate_up, Tensor down, int top_k, int row_alignment, "
      "str group_name, Tensor? segment_offsets, int capacity, int num_sms, "
      "float weight_grad_scale, int slots_per_pass, bool recompute_gate_up, "
      "Tensor? tokens_per_expert=None, Tensor? send_rows=None, Tensor? send_weights=None) "
      "-> Tensor");
  // The same with what backward reads, in the order that one chunk would have: rows, row_weights
  // and z, or [0] where they are not kept.
  m.def(
      "chunked_experts_forward(Tensor x, Tensor weights, Tensor slot_of_copy, Tensor counts, "
      "Tensor host_counts, Tensor gate_up, Tensor down, int top_k, int row_alignment, "
      "str group_name, Tensor? segment_offsets, int capacity, int num_sms, int slots_per_pass, "
      "Tensor? send_rows, Tensor? send_weights, bool keep_rows, bool keep_gate_up) "
      "-> (Tensor output, Tensor rows, Tensor row_weights, Tensor z)");
  // Gradients of x, of the router weights, and of both expert weights ([0] where nobody needs
  // them).
  m.def(
      "chunked_experts_backward(Tensor grad_output, Tensor rows, Tensor row_weights, Tensor z, "
      "Tensor slot_of_copy, Tensor counts, Tensor host_counts, Tensor gate_up, Tensor down, "
      "int top_k, int row_alignment, str group_name, Tensor? segment_offsets, int capacity, "
      "int num_sms, float weight_grad_scale, int slots_per_pass, bool needs_weight_grads=True) -> "
      "(Tensor grad_x, Tensor grad_weights, Tensor grad_gate_up, Tensor grad_down)");
}
