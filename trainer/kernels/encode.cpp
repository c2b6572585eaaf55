// The encoder product of one bank, and the active entries in it.
//
// Shapes: B rows, D width, n slots of the bank, E active entries. Entries are kept slot by slot: those of slot j are
// start[j] .. start[j + 1], each with its row and its z > 0.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <tuple>
#include <vector>

#include "lanes.h"

namespace {
using at::Tensor;

// Row of fp32 weights -> bf16, round to nearest even; returns the sum of squares. The rows after it are asked for meanwhile.
float to_low(const float* w, uint16_t* out, int64_t size) {
  constexpr int64_t AHEAD = 2048;  // floats
  float sum = 0;
  int64_t i = 0;
#if defined(WIDE) && defined(__AVX512BF16__)
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
    uint32_t bits;
    std::memcpy(&bits, w + i, 4);
    out[i] = (w[i] != w[i]) ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    sum += w[i] * w[i];
  }
  return sum;
}

// bf16 bits as integers that order like the numbers.
int16_t ordered(uint16_t bits) { return (bits & 0x8000) ? int16_t(bits ^ 0x7fff) : int16_t(bits); }

int16_t ordered_below(float value) {  // the largest bf16 not above value
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint16_t high = bits >> 16;
  if ((bits & 0xffff) && (bits >> 31)) ++high;  // cutting a negative number raises it
  return ordered(high);
}

template <typename F>
void scan(const uint16_t* product, int64_t rows, float threshold, F&& hit) {
  const int16_t limit = ordered_below(threshold);
  int64_t b = 0;
#ifdef WIDE
  const __m512i least = _mm512_set1_epi16(limit), flip = _mm512_set1_epi16(0x7fff);
  for (; b + 32 <= rows; b += 32) {
    __m512i v = _mm512_loadu_si512(product + b);
    v = _mm512_xor_si512(v, _mm512_and_si512(_mm512_srai_epi16(v, 15), flip));
    for (uint32_t mask = _mm512_cmpgt_epi16_mask(v, least); mask; mask &= mask - 1) hit(b + __builtin_ctz(mask));
  }
#endif
  for (; b < rows; ++b)
    if (ordered(product[b]) > limit) hit(b);
}

template <typename F>
void scan(const float* product, int64_t rows, float threshold, F&& hit) {
  for (int64_t b = 0; b < rows; ++b)
    if (product[b] > threshold) hit(b);
}

struct Scratch {  // of one thread, kept for good: fresh pages for every bank would cost more than the scan of the product
  Tensor weights, product;
  std::vector<float> threshold;
};

struct Found {  // in one chunk of slots, slot by slot
  std::vector<int32_t> row, slot;
  std::vector<float> z;
};

Tensor shaped(Tensor& buffer, int64_t a, int64_t b, at::ScalarType type) {
  if (!buffer.defined() || buffer.scalar_type() != type || buffer.numel() < a * b) buffer = at::empty({a * b}, type);
  return buffer.narrow(0, 0, a * b).view({a, b});
}

// Slots c .. c + size. An entry is a candidate when the product does not rule it out (margin: `error` of the product's arithmetic);
// its pre-activation is then computed again in fp32, and kept where it is above 0.
template <typename T>
void find(const Tensor& W_enc, const float* bias, const float* rows, int64_t B, const Tensor& columns, float reach, float error,
          int64_t c, int64_t size, Scratch& scratch, Found& found, int64_t* start) {
  constexpr bool low = std::is_same<T, uint16_t>::value;
  const int64_t D = W_enc.size(1);
  const float* w = W_enc.const_data_ptr<float>() + c * D;
  Tensor weights = low ? shaped(scratch.weights, size, D, at::kBFloat16) : W_enc.narrow(0, c, size);
  uint16_t* w_low = low ? (uint16_t*)weights.mutable_data_ptr() : nullptr;
  scratch.threshold.resize(size);
  for (int64_t j = 0; j < size; ++j) {
    const float square = low ? to_low(w + j * D, w_low + j * D, D) : dot(w + j * D, w + j * D, D);
    const float t = -bias[c + j] - error * (std::abs(bias[c + j]) + 2 * reach * std::sqrt(square / D));
    scratch.threshold[j] = std::isfinite(t) ? t : -INFINITY;  // not a number: everything is looked at again
  }
  Tensor product = shaped(scratch.product, size, B, columns.scalar_type());
  at::mm_out(product, weights, columns);
  const T* p = (const T*)product.const_data_ptr();
  auto &row = found.row, &slot = found.slot;
  for (int64_t j = 0; j < size; ++j) {
    auto candidate = [&](int64_t b) { row.push_back(b), slot.push_back(j); };
    if (scratch.threshold[j] == -INFINITY)
      for (int64_t b = 0; b < B; ++b) candidate(b);
    else
      scan(p + j * B, B, scratch.threshold[j], candidate);
  }
  size_t kept = 0;
  for (size_t e = 0; e < row.size(); ++e) {
    if (e + 1 < row.size()) fetch_ahead(rows + row[e + 1] * D, D), fetch_ahead(w + slot[e + 1] * D, D);
    const int64_t j = slot[e];
    const float pre = dot(w + j * D, rows + row[e] * D, D) + bias[c + j];
    if (pre <= 0) continue;  // a pre-activation that is not a number goes on, to be seen in the loss
    row[kept++] = row[e];
    found.z.push_back(pre);
    ++start[c + j + 1];
  }
  row.resize(kept);
}

constexpr int64_t CHUNK_ENTRIES = 1 << 19;  // of the product: half a MiB in bf16, so that one thread's piece stays in its own cache

// -> start [n + 1] int64, row [E] int32, z [E]. columns [D, B] is x transposed, in bf16 or fp32; reach is the largest norm of a row of x.
// Every thread takes chunks of slots on its own: weights to bf16, product, scan, all on one core's cache, and no thread waits.
std::tuple<Tensor, Tensor, Tensor> encode(const Tensor& W_enc, const Tensor& b_enc, const Tensor& x, const Tensor& columns,
                                          double reach) {
  static auto* scratch = new std::vector<Scratch>;
  static std::mutex guard;
  std::lock_guard<std::mutex> lock(guard);
  const int64_t n = W_enc.size(0), B = x.size(0), threads = at::get_num_threads();
  const int64_t size = std::max<int64_t>(64, std::min(n, CHUNK_ENTRIES / std::max<int64_t>(B, 1)));
  const int64_t chunks = B > 0 ? (n + size - 1) / size : 0;
  if ((int64_t)scratch->size() < threads) scratch->resize(threads);
  std::vector<Found> found(chunks);
  Tensor start = at::zeros({n + 1}, at::kLong);
  int64_t* s = start.mutable_data_ptr<int64_t>();
  std::atomic<int64_t> next{0};
  const float *bias = b_enc.const_data_ptr<float>(), *rows = x.const_data_ptr<float>();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    for (int64_t me = begin; me < end; ++me)
      for (int64_t k = next++; k < chunks; k = next++) {
        const int64_t c = k * size, here = std::min(size, n - c);
        Scratch& mine = (*scratch)[me];
        if (columns.scalar_type() == at::kBFloat16)
          find<uint16_t>(W_enc, bias, rows, B, columns, reach, 0x1p-8f, c, here, mine, found[k], s);
        else
          find<float>(W_enc, bias, rows, B, columns, reach, 0x1p-18f, c, here, mine, found[k], s);
      }
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

TORCH_LIBRARY_FRAGMENT(alignsae, m) { m.def("encode", &encode); }
