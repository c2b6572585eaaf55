// The encoder product of one bank, and the active entries in it.
//
// Shapes: B rows, D width, n slots of the bank, E active entries. Entries are kept slot by slot: those of slot j are
// start[j] .. start[j + 1], each with its row and its code z: its pre-activation where that is above the threshold of
// the slot, else 0, for an entry in the window below.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "product.h"

namespace {
using at::Tensor;

// Places of a row of products that are above `bound`; what is not a number is not ruled out.
template <typename F>
void scan(const float* product, int64_t rows, float bound, F&& hit) {
  int64_t b = 0;
#ifdef WIDE
  const __m512 most = _mm512_set1_ps(bound);
  for (; b + 32 <= rows; b += 32) {
    const uint32_t low = _mm512_cmp_ps_mask(_mm512_loadu_ps(product + b), most, _CMP_NLE_UQ),
                   high = _mm512_cmp_ps_mask(_mm512_loadu_ps(product + b + 16), most, _CMP_NLE_UQ);
    for (uint32_t mask = low | (high << 16); mask; mask &= mask - 1) hit(b + __builtin_ctz(mask));
  }
#else
  for (; b + 32 <= rows; b += 32) {
    int any = 0;  // a loop that compilers turn into vector code; few blocks hold a candidate
    for (int64_t k = b; k < b + 32; ++k) any |= !(product[k] <= bound);
    if (!any) continue;
    for (int64_t k = b; k < b + 32; ++k)
      if (!(product[k] <= bound)) hit(k);
  }
#endif
  for (; b < rows; ++b)
    if (!(product[b] <= bound)) hit(b);
}

// What a thread needs for one chunk of slots.
struct Scratch {
  std::vector<uint16_t> weights;      // as the product takes them
  std::vector<float> product, bound;  // bound: of each slot, what `prepare` returns
  std::vector<int32_t> row, slot;     // of the candidates

  // That of the calling thread, which alone uses it and keeps it until it ends: fresh pages for every bank would cost
  // more than the scan.
  static Scratch& of_this_thread() {
    thread_local Scratch scratch;
    return scratch;
  }
};

struct Found {  // in one chunk of slots, slot by slot
  std::vector<int32_t> row;
  std::vector<float> z;
};

// What all chunks of a bank share.
struct Bank {
  const float *weights, *bias, *thresholds;  // [n, D], [n], [n] or nullptr: 0
  const float* rows;                         // [B, D]
  const void* blocks;                        // the rows as the product takes them
  int64_t B, D, width, block_rows, count;    // count: of blocks
  float max_row_norm, window;                // window: below a threshold, in which entries are kept with a code of 0
  bool plain;                                // no block product

  float threshold(int64_t slot) const { return thresholds ? thresholds[slot] : 0; }
};

// Slots c .. c + size. An entry is a candidate when the product does not rule it out; its pre-activation is then
// computed again in fp32, and kept where it is above the window.
template <typename T>
void find(const Bank& bank, int64_t c, int64_t size, Scratch& scratch, Found& found, int64_t* start) {
  constexpr bool narrow = sizeof(T) == sizeof(uint16_t);
  const int64_t B = bank.B, D = bank.D, width = bank.width, rows = bank.block_rows;
  // Not a power of two, which would put all slots into the same sets of the cache.
  const int64_t stride = bank.count * rows + 16;
  const float* w = bank.weights + c * D;
  scratch.bound.resize(size);
  scratch.product.resize(size * stride);
  if (narrow) scratch.weights.resize(size * width);
  T* copy = (T*)scratch.weights.data();
  for (int64_t j = 0; j < size; ++j) {
    const SlotBounds slot{bank.bias[c + j], bank.threshold(c + j) - bank.window, bank.max_row_norm};
    scratch.bound[j] = prepare<T>(w + j * D, copy + j * width, D, slot);
    if (width > D) copy[j * width + D] = 0;
  }
  for (int64_t k = 0; k < bank.count; ++k) {
    float* out = scratch.product.data() + k * rows;
    const T* block = (const T*)bank.blocks + k * rows * width;
    if constexpr (narrow) multiply(size, rows, width, copy, block, out, stride);
    else if (bank.plain) multiply_plainly(size, rows, width, w, block, out, stride);
    else multiply(size, rows, width, w, block, out, stride);
  }
  auto &row = scratch.row, &slot = scratch.slot;
  int64_t candidates = 0;
  for (int64_t j = 0; j < size; ++j) {
    if ((int64_t)row.size() < candidates + B) row.resize(2 * candidates + B), slot.resize(2 * candidates + B);
    int32_t *row_out = row.data() + candidates, *slot_out = slot.data() + candidates;
    scan(scratch.product.data() + j * stride, B, scratch.bound[j], [&](int64_t b) { *row_out++ = b, *slot_out++ = j; });
    candidates = row_out - row.data();
  }
  for (int64_t e = 0; e < candidates; ++e) {
    if (e + 1 < candidates) fetch_ahead(bank.rows + row[e + 1] * D, D), fetch_ahead(w + slot[e + 1] * D, D);
    const int64_t j = slot[e];
    const float pre = dot(w + j * D, bank.rows + row[e] * D, D) + bank.bias[c + j];
    const float threshold = bank.threshold(c + j);
    if (pre <= threshold - bank.window) continue;  // what is not a number goes on, to be seen in the loss
    found.row.push_back(row[e]);
    found.z.push_back(pre <= threshold ? 0 : pre);
    ++start[c + j + 1];
  }
}

// Slots of a chunk: enough for the product to be fast, and few enough for it and the weights to stay in one core's
// cache.
constexpr int64_t MOST_SLOTS = 64, LEAST_SLOTS = 16, CHUNK_ENTRIES = 1 << 17;

// -> start [n + 1] int64, row [E] int32, z [E]. threshold [n], or none for 0, and the window below it. blocks,
// contiguous, is x in blocks of rows as `multiply` takes them (product.h), the last one padded with zeros: fp32 [count,
// D, block_rows], or bf16 or int16 [count, words, block_rows * 2]. max_row_norm is the largest norm of a row of x.
// Every thread takes chunks of slots on its own: weights converted, product, scan, all on one core's cache, and no
// thread waits.
std::tuple<Tensor, Tensor, Tensor> encode(const Tensor& W_enc, const Tensor& b_enc,
                                          const std::optional<Tensor>& threshold, double window, const Tensor& x,
                                          const Tensor& blocks, double max_row_norm) {
  const auto type = blocks.scalar_type();
  const int64_t pair = type == at::kFloat ? 1 : 2;
  const int64_t n = W_enc.size(0), B = x.size(0), threads = at::get_num_threads();
  TORCH_CHECK(!threshold || (threshold->sizes() == b_enc.sizes() && threshold->is_contiguous()),
              "encode needs one threshold for each slot");
  const Bank bank{
      .weights = W_enc.const_data_ptr<float>(),
      .bias = b_enc.const_data_ptr<float>(),
      .thresholds = threshold ? threshold->const_data_ptr<float>() : nullptr,
      .rows = x.const_data_ptr<float>(),
      .blocks = blocks.const_data_ptr(),
      .B = B,
      .D = W_enc.size(1),
      .width = blocks.size(1) * pair,
      .block_rows = blocks.size(2) / pair,
      .count = blocks.size(0),
      .max_row_norm = float(max_row_norm),
      .window = float(window),
      .plain = type == at::kFloat && !has_blocks<float>(),
  };
  TORCH_CHECK(blocks.is_contiguous() && bank.count * bank.block_rows >= B, "encode needs blocks of all rows");
  int64_t size = std::clamp(CHUNK_ENTRIES / std::max<int64_t>(B, 1), LEAST_SLOTS, MOST_SLOTS);
  if (type == at::kShort) size -= size % INT16_SLOTS;
  const int64_t chunks = B > 0 ? (n + size - 1) / size : 0;
  std::vector<Found> found(chunks);
  Tensor start = at::zeros({n + 1}, at::kLong);
  int64_t* s = start.mutable_data_ptr<int64_t>();
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Scratch& scratch = Scratch::of_this_thread();
    for (int64_t k = next++; k < chunks; k = next++) {
      const int64_t c = k * size, here = std::min(size, n - c);
      if (type == at::kBFloat16) find<at::BFloat16>(bank, c, here, scratch, found[k], s);
      else if (type == at::kShort) find<int16_t>(bank, c, here, scratch, found[k], s);
      else find<float>(bank, c, here, scratch, found[k], s);
    }
    if (type != at::kShort) at::native::cpublas::brgemm_release(type == at::kBFloat16);
  });
  for (int64_t j = 0; j < n; ++j) s[j + 1] += s[j];
  Tensor row = at::empty({s[n]}, at::kInt), z = at::empty({s[n]}, at::kFloat);
  int32_t* r = row.mutable_data_ptr<int32_t>();
  float* values = z.mutable_data_ptr<float>();
  for (const Found& f : found) {
    r = std::copy(f.row.begin(), f.row.end(), r);
    values = std::copy(f.z.begin(), f.z.end(), values);
  }
  return {start, row, z};
}
}  // namespace

TORCH_LIBRARY_FRAGMENT(alignsae, m) {
  m.def(
      "encode(Tensor W_enc, Tensor b_enc, Tensor? threshold, float window, Tensor x, Tensor blocks, "
      "float max_row_norm) "
      "-> (Tensor start, Tensor row, Tensor z)",
      &encode);
  m.def("bf16_products() -> bool", &bf16_products);
  m.def("int16_products() -> bool", &int16_products);
  m.def("int16_norm() -> float", [] { return double(INT16_NORM); });
}
