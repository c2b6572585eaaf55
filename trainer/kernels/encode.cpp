// The encoder product of one bank, and the active entries in it.
//
// Shapes: B rows, D width, n slots of the bank, E active entries. Entries are kept slot by slot: those of slot j are
// start[j] .. start[j + 1], each with its row and its z > 0.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <vector>

#include "lanes.h"

namespace {
using at::Tensor;

// Row of fp32 weights -> bf16, round to nearest even; returns the sum of squares. The rows after it are asked for meanwhile.
float to_low(const float* w, at::BFloat16* out, int64_t size) {
  float sum = 0;
  int64_t i = 0;
#if defined(WIDE) && defined(__AVX512BF16__)
  constexpr int64_t AHEAD = 2048;  // floats
  Lane squares{};
  for (; i + LANE <= size; i += LANE) {
    __builtin_prefetch(w + i + AHEAD);
    const Lane v = *(const Lane*)(w + i);
    _mm256_storeu_si256((__m256i*)(out + i), (__m256i)_mm512_cvtneps_pbh((__m512)v));
    squares += v * v;
  }
  for (int64_t k = 0; k < LANE; ++k) sum += squares[k];
#endif
  for (; i < size; ++i) {
    out[i] = w[i];
    sum += w[i] * w[i];
  }
  return sum;
}

// Places of a row of products that `threshold` does not rule out; what is not a number is not ruled out.
template <typename F>
void scan(const float* product, int64_t rows, float threshold, F&& hit) {
  int64_t b = 0;
#ifdef WIDE
  const __m512 most = _mm512_set1_ps(threshold);
  for (; b + 32 <= rows; b += 32) {
    const uint32_t low = _mm512_cmp_ps_mask(_mm512_loadu_ps(product + b), most, _CMP_NLE_UQ),
                   high = _mm512_cmp_ps_mask(_mm512_loadu_ps(product + b + 16), most, _CMP_NLE_UQ);
    for (uint32_t mask = low | (high << 16); mask; mask &= mask - 1) hit(b + __builtin_ctz(mask));
  }
#else
  for (; b + 32 <= rows; b += 32) {
    int any = 0;  // a loop that compilers turn into vector code; few blocks hold a candidate
    for (int64_t k = b; k < b + 32; ++k) any |= !(product[k] <= threshold);
    if (!any) continue;
    for (int64_t k = b; k < b + 32; ++k)
      if (!(product[k] <= threshold)) hit(k);
  }
#endif
  for (; b < rows; ++b)
    if (!(product[b] <= threshold)) hit(b);
}

// out [slots, rows] = weights [slots, width] times one block of rows of x: fp32 [width, rows], or bf16 [width / 2, rows, 2], where the numbers
// of a pair are neighbours in a row of x, which is how the processor takes them.
template <typename T>
void multiply(int64_t slots, int64_t rows, int64_t width, const T* weights, const T* block, float* out, int64_t stride) {
  constexpr bool low = std::is_same<T, at::BFloat16>::value;
  at::native::cpublas::brgemm(slots, rows, width, width, rows, stride, false, weights, block, out, low);
}

// Whether torch has its block product for T here: not where oneDNN is missing, switched off, or held to an older instruction set.
template <typename T>
bool has_blocks() {
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool found = [] {
    std::vector<T> ones(32, 1.0f);
    std::vector<float> out(16);
    try {
      multiply<T>(1, 16, 2, ones.data(), ones.data(), out.data(), 16);
      at::native::cpublas::brgemm_release(true);
    } catch (const c10::Error&) {
      return false;
    }
    return out[0] == 2.0f;
  }();
  return found;
}

// Whether bf16 products run on this machine; without them the product is fp32, since emulated ones would be slower.
bool low_products() {
#if defined(__AVX512BF16__)
  return has_blocks<at::BFloat16>();
#else
  return false;
#endif
}

// `multiply` for fp32 where torch has no block product.
void multiply_plainly(int64_t slots, int64_t rows, int64_t width, const float* weights, const float* block, float* out, int64_t stride) {
  auto matrix = [](const float* data, int64_t height, int64_t columns, int64_t step) {
    return at::from_blob(const_cast<float*>(data), {height, columns}, {step, 1}, at::kFloat);
  };
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  Tensor product = matrix(out, slots, rows, stride);
  at::mm_out(product, matrix(weights, slots, width, width), matrix(block, width, rows, rows));
}

struct Scratch {  // of one thread, kept for good: fresh pages for every bank would cost more than the scan of the product
  std::vector<at::BFloat16> weights;
  std::vector<float> product, threshold;
  std::vector<int32_t> row, slot;  // of the candidates of one chunk
};

struct Found {  // in one chunk of slots, slot by slot
  std::vector<int32_t> row;
  std::vector<float> z;
};

// What all chunks of a bank share.
struct Bank {
  const float *weights, *bias, *rows;
  const void* blocks;
  int64_t B, D, words, block_rows, count;  // count: of blocks
  float reach;
  bool plain;  // no block product
};

// Slots c .. c + size. An entry is a candidate when the product does not rule it out (margin: `error` of the product's arithmetic);
// its pre-activation is then computed again in fp32, and kept where it is above 0.
template <typename T>
void find(const Bank& bank, float error, int64_t c, int64_t size, Scratch& scratch, Found& found, int64_t* start) {
  constexpr bool low = std::is_same<T, at::BFloat16>::value;
  const int64_t B = bank.B, D = bank.D, width = low ? 2 * bank.words : D, rows = bank.block_rows;
  const int64_t stride = bank.count * rows + 16;  // not a power of two, which would put all slots into the same sets of the cache
  const float* w = bank.weights + c * D;
  auto& threshold = scratch.threshold;
  threshold.resize(size);
  scratch.product.resize(size * stride);
  if (low) scratch.weights.resize(size * width);
  for (int64_t j = 0; j < size; ++j) {
    float square;
    if constexpr (low) {
      T* copy = scratch.weights.data() + j * width;
      square = to_low(w + j * D, copy, D);
      if (width > D) copy[D] = 0.0f;
    } else {
      square = dot(w + j * D, w + j * D, D);
    }
    const float bias = bank.bias[c + j], t = -bias - error * (std::abs(bias) + 2 * bank.reach * std::sqrt(square / D));
    threshold[j] = std::isfinite(t) ? t : NAN;  // which rules nothing out: everything is looked at again
  }
  for (int64_t k = 0; k < bank.count; ++k) {
    float* out = scratch.product.data() + k * rows;
    const T* block = (const T*)bank.blocks + k * rows * width;
    if constexpr (low) multiply<T>(size, rows, width, scratch.weights.data(), block, out, stride);
    else if (bank.plain) multiply_plainly(size, rows, width, w, block, out, stride);
    else multiply<T>(size, rows, width, w, block, out, stride);
  }
  auto &row = scratch.row, &slot = scratch.slot;
  int64_t candidates = 0;
  for (int64_t j = 0; j < size; ++j) {
    if ((int64_t)row.size() < candidates + B) row.resize(2 * candidates + B), slot.resize(2 * candidates + B);
    int32_t *row_out = row.data() + candidates, *slot_out = slot.data() + candidates;
    scan(scratch.product.data() + j * stride, B, threshold[j], [&](int64_t b) { *row_out++ = b, *slot_out++ = j; });
    candidates = row_out - row.data();
  }
  for (int64_t e = 0; e < candidates; ++e) {
    if (e + 1 < candidates) fetch_ahead(bank.rows + row[e + 1] * D, D), fetch_ahead(w + slot[e + 1] * D, D);
    const int64_t j = slot[e];
    const float pre = dot(w + j * D, bank.rows + row[e] * D, D) + bank.bias[c + j];
    if (pre <= 0) continue;  // a pre-activation that is not a number goes on, to be seen in the loss
    found.row.push_back(row[e]);
    found.z.push_back(pre);
    ++start[c + j + 1];
  }
}

// Slots of a chunk: enough for the product to be fast, and few enough for it and the weights to stay in one core's cache.
constexpr int64_t MOST_SLOTS = 64, LEAST_SLOTS = 16, CHUNK_ENTRIES = 1 << 17;

// -> start [n + 1] int64, row [E] int32, z [E]. blocks [count, words, block_rows], contiguous, is x in blocks of rows as `multiply` takes them, the
// last one padded with zeros: words are fp32 numbers or (int32) pairs of bf16 ones. reach is the largest norm of a row of x.
// Every thread takes chunks of slots on its own: weights to bf16, product, scan, all on one core's cache, and no thread waits.
std::tuple<Tensor, Tensor, Tensor> encode(const Tensor& W_enc, const Tensor& b_enc, const Tensor& x, const Tensor& blocks, double reach) {
  static auto* scratch = new std::vector<Scratch>;
  static std::mutex guard;
  std::lock_guard<std::mutex> lock(guard);
  const bool low = blocks.scalar_type() == at::kInt;
  const int64_t n = W_enc.size(0), B = x.size(0), threads = at::get_num_threads();
  TORCH_CHECK(blocks.is_contiguous() && blocks.size(0) * blocks.size(2) >= B, "encode needs blocks of all rows");
  const Bank bank{W_enc.const_data_ptr<float>(), b_enc.const_data_ptr<float>(), x.const_data_ptr<float>(), blocks.const_data_ptr(),
                  B, W_enc.size(1), blocks.size(1), blocks.size(2), blocks.size(0), float(reach), !low && !has_blocks<float>()};
  const int64_t size = std::clamp(CHUNK_ENTRIES / std::max<int64_t>(B, 1), LEAST_SLOTS, MOST_SLOTS);
  const int64_t chunks = B > 0 ? (n + size - 1) / size : 0;
  if ((int64_t)scratch->size() < threads) scratch->resize(threads);
  std::vector<Found> found(chunks);
  Tensor start = at::zeros({n + 1}, at::kLong);
  int64_t* s = start.mutable_data_ptr<int64_t>();
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t me = begin; me < end; ++me)
      for (int64_t k = next++; k < chunks; k = next++) {
        const int64_t c = k * size, here = std::min(size, n - c);
        if (low) find<at::BFloat16>(bank, 0x1p-8f, c, here, (*scratch)[me], found[k], s);
        else find<float>(bank, 0x1p-18f, c, here, (*scratch)[me], found[k], s);
      }
    at::native::cpublas::brgemm_release(low);
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
  m.def("encode", &encode);
  m.def("low_products", &low_products);
}
