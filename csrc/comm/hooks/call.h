// One call of a process group's backend, as the hooks note it, and its form in the store.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "comm/label.h"

namespace torch_moe_ep::comm {

struct Call {
  uint64_t number = 0;         // counts the group's collectives from 1; 0: between two ranks only
  const char* operation = "";  // lives as long as the process
  std::optional<at::ScalarType> dtype;
  int64_t sent_bytes = 0;      // of this rank's inputs
  int64_t received_bytes = 0;  // of its outputs
  // Bytes by rank of the group, where the caller said how they are split.
  std::vector<int64_t> sent_to;
  std::vector<int64_t> received_from;
  Label label;
  std::optional<c10::Device> device;

  // What every rank of the group must agree on, sizes left out: operation, type, layer, stage.
  uint64_t fingerprint() const;
};

// A call as another rank reads it.
struct ReadCall {
  uint64_t number = 0;
  std::string operation;
  std::string dtype;
  std::string layer;
  std::string stage;
  int64_t sent_bytes = 0;
  int64_t received_bytes = 0;
  std::vector<int64_t> sent_to;
  std::vector<int64_t> received_from;

  // "#7 (all-to-all of uint8, 96 bytes sent, 64 received; layer model.layers.0, stage dispatch)"
  std::string describe() const;
};

// One line each way, without a newline.
std::string to_line(const Call& call);
ReadCall from_line(const std::string& line);

inline ReadCall read(const Call& call) { return from_line(to_line(call)); }

}  // namespace torch_moe_ep::comm
