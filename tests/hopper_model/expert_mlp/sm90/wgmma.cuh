// In the place of csrc's file of this name: what a wgmma finds where its descriptors point.
#pragma once

#include "device.h"
#include "expert_mlp/sm90/matrix_descriptor.cuh"

namespace torch_moe_ep::sm90 {

inline void wgmma_fence() {}
inline void wgmma_commit() {
  device::Group& group = device::group_of_current();
  const int thread = device::current->thread % device::kGroup;
  group.committed[thread].push_back(group.issued_by[thread]);
}
template <int kPending>
void wgmma_wait() {
  device::Group& group = device::group_of_current();
  const auto& committed = group.committed[device::current->thread % device::kGroup];
  const int number = static_cast<int>(committed.size()) - 1 - kPending;
  const int wanted = number < 0 ? 0 : committed[number];
  device::block_until([&group, wanted] { return group.num_executed >= wanted; });
}

// What 8 rows of a K-major operand, or 16 k of a chunk of 64 columns, are a part of.
template <bool kIsTransposed>
device::Operand part_at(const device::Memory& memory, uint32_t place) {
  auto found = memory.upper_bound(place);
  if (found == memory.begin()) device::fail("a product reads what nobody loaded");
  const auto& [start, box] = *--found;
  const int row = (place - start) / 128, bytes = (place - start) % 128;
  if (row + (kIsTransposed ? 16 : 8) > box.rows) device::fail("a product reads past a box", row);
  if (kIsTransposed) return {box.operand, box.x0, box.x1 + row, box.x2};
  return {box.operand, box.x1 + row, box.x0 + bytes / 2, box.x2};
}

// The operand of one product, kExtent rows or, if kIsTransposed, columns.
template <int kExtent, bool kIsTransposed>
device::Operand operand_at(int cta, uint64_t descriptor) {
  constexpr int kPart = kIsTransposed ? 64 : 8;
  const uint32_t address = (descriptor & 0x3fff) << 4;
  const uint32_t part_bytes = kIsTransposed ? (descriptor >> 16 & 0x3fff) << 4 : 1024;
  const device::Memory& memory = device::of<device::Memory>(cta);
  const device::Operand first = part_at<kIsTransposed>(memory, address);
  for (int part = 1; part < kExtent / kPart; ++part) {
    device::Operand here = part_at<kIsTransposed>(memory, address + part * part_bytes);
    here.mn -= part * kPart;
    if (here != first) device::fail("a product reads boxes of different steps", here.k, first.k);
  }
  return first;
}

template <int kN, bool kTransposeA, bool kTransposeB>
struct Wgmma {
  template <class Accumulators>
  static void run(Accumulators&, uint64_t a, uint64_t b, bool accumulates) {
    device::Group& group = device::group_of_current();
    const int number = group.issued_by[device::current->thread % device::kGroup]++;
    if (number < static_cast<int>(group.issued.size())) return;
    group.issued.push_back([cta = device::current->cta, a, b, accumulates]() -> device::Product {
      return {
          operand_at<64, kTransposeA>(cta, a), operand_at<kN, kTransposeB>(cta, b), accumulates};
    });
  }
};

}  // namespace torch_moe_ep::sm90
