// The active entries of one bank as the operators walk them, and how threads share them out.
//
// Shapes: B rows, R concepts, n slots of the bank, E active entries, m columns (slots active on some rank). A view
// points into tensors that its operator was given.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <atomic>

namespace {
using at::Tensor;

// Slot by slot: the entries of slot j are start[j] .. start[j + 1], each with its row and its code z, which the gate
// let pass, or 0 in the window below a threshold that is trained.
struct Entries {
  int64_t slots;         // n
  const int64_t* start;  // [n + 1]
  const int32_t* row;    // [E]
  const float* z;        // [E]

  // Of (start, row, z).
  explicit Entries(at::TensorList parts) {
    TORCH_CHECK(parts.size() == 3, "entries are start, row and z");
    slots = parts[0].size(0) - 1;
    start = parts[0].const_data_ptr<int64_t>();
    row = parts[1].const_data_ptr<int32_t>();
    z = parts[2].const_data_ptr<float>();
  }
};

// The same entries row by row: those of row b are start[b] .. start[b + 1], each with its slot and its position in the
// slot order.
struct RowEntries {
  int64_t rows;          // B
  const int64_t* start;  // [B + 1]
  const int32_t* slot;   // [E]
  const int32_t* entry;  // [E]

  // Of (start, slot, entry), as `by_row` returns them.
  explicit RowEntries(at::TensorList parts) {
    TORCH_CHECK(parts.size() == 3, "entries by row are start, slot and entry");
    rows = parts[0].size(0) - 1;
    start = parts[0].const_data_ptr<int64_t>();
    slot = parts[1].const_data_ptr<int32_t>();
    entry = parts[2].const_data_ptr<int32_t>();
  }
};

// The correlation of a bank's columns with the concepts.
struct Correlation {
  int64_t concepts = 0;             // R; 0 where the bank has no such term
  const float* code = nullptr;      // [B, R]: the standardised concept code
  const int64_t* place = nullptr;   // [n]: the column of each slot
  const float* mean = nullptr;      // [m]
  const float* inv_norm = nullptr;  // [m]
  const float* weight = nullptr;    // [m]: how much each column counts
  const float* sums = nullptr;      // [m, R + 2]: global sums of z, z^2 and code^T z

  // Of nothing, or of (code, place, mean, inv_norm, weight, sums).
  explicit Correlation(at::TensorList parts) {
    if (parts.empty()) return;
    TORCH_CHECK(parts.size() == 6, "a correlation is code, place, mean, inv_norm, weight and sums");
    concepts = parts[0].size(1);
    code = parts[0].const_data_ptr<float>();
    place = parts[1].const_data_ptr<int64_t>();
    mean = parts[2].const_data_ptr<float>();
    inv_norm = parts[3].const_data_ptr<float>();
    weight = parts[4].const_data_ptr<float>();
    sums = parts[5].const_data_ptr<float>();
  }
};

constexpr int64_t PARTS = 64;

// Runs f(begin, end, part) on PARTS ranges of slots (or rows) that hold about equal numbers of entries. Threads take
// them as they go, so that none waits for another that was held up; what a range writes does not depend on who takes
// it.
template <typename F>
void in_parts(const int64_t* start, int64_t slots, F&& f) {
  const int64_t work = start[slots] + slots;  // an idle slot costs about as much as an entry: its gradient is written
  auto boundary = [&](int64_t part) {
    int64_t low = 0, high = slots;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if ((start[middle] + middle) * PARTS < work * part) low = middle + 1;
      else high = middle;
    }
    return part == PARTS ? slots : low;
  };
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t part = next++; part < PARTS; part = next++) f(boundary(part), boundary(part + 1), part);
  });
}
}  // namespace
