// The encoder product of one bank, and the active entries in it.
//
// Shapes: B rows, D width, n slots of the bank, E active entries. Entries are kept slot by slot: those of slot j are
// start[j] .. start[j + 1], each with its row and its z > 0.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
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

struct Part {  // what one thread found: a run of slots, in order
  int64_t slot, first;
};

struct Scratch {
  Tensor weights, product;
  std::vector<std::vector<int32_t>> row, slot;
  std::vector<std::vector<float>> z;
  std::vector<std::vector<Part>> parts;
};

Tensor shaped(Tensor& buffer, int64_t a, int64_t b, at::ScalarType type) {
  if (!buffer.defined() || buffer.scalar_type() != type || buffer.numel() < a * b) buffer = at::empty({a * b}, type);
  return buffer.narrow(0, 0, a * b).view({a, b});
}

constexpr int64_t CHUNK_ENTRIES = 1 << 20;  // of the product: 2 MiB in bf16, about the size of a level-2 cache

// The encoder product of one bank in pieces that stay in the cache. An entry is a candidate when the product does not rule it out
// (margin = `error` of the product's arithmetic); its pre-activation is then computed again in fp32, and kept where it is above 0.
template <typename T>
void find(const Tensor& W_enc, const Tensor& b_enc, const Tensor& x, const Tensor& columns, float reach, float error,
          Scratch& scratch, int64_t* start) {
  const int64_t n = W_enc.size(0), D = W_enc.size(1), B = x.size(0);
  constexpr bool low = std::is_same<T, uint16_t>::value;
  const int64_t chunk = std::max<int64_t>(64, std::min(n, CHUNK_ENTRIES / std::max<int64_t>(B, 1)));
  const float *w = W_enc.const_data_ptr<float>(), *bias = b_enc.const_data_ptr<float>(), *rows = x.const_data_ptr<float>();
  std::vector<float> threshold(n);
  for (int64_t c = 0; c < n; c += chunk) {
    const int64_t size = std::min(chunk, n - c);
    Tensor weights = low ? shaped(scratch.weights, size, D, at::kBFloat16) : W_enc.narrow(0, c, size);
    uint16_t* w_low = low ? (uint16_t*)weights.mutable_data_ptr() : nullptr;
    at::parallel_for(0, size, 16, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const float* wj = w + (c + j) * D;
        const float square = low ? to_low(wj, w_low + j * D, D) : dot(wj, wj, D);
        const float margin = error * (std::abs(bias[c + j]) + 2 * reach * std::sqrt(square / D));
        const float t = -bias[c + j] - margin;
        threshold[c + j] = std::isfinite(t) ? t : -INFINITY;  // not a number: everything is looked at again
      }
    });
    Tensor product = shaped(scratch.product, size, B, columns.scalar_type());
    at::mm_out(product, weights, columns);
    const T* p = (const T*)product.const_data_ptr();
    at::parallel_for(0, size, 16, [&](int64_t begin, int64_t end) {
      const int me = at::get_thread_num();
      auto &row = scratch.row[me], &slot = scratch.slot[me];
      auto& z = scratch.z[me];
      const size_t first = row.size();
      scratch.parts[me].push_back({c + begin, (int64_t)first});
      for (int64_t j = begin; j < end; ++j) {
        auto candidate = [&](int64_t b) { row.push_back(b), slot.push_back(j); };
        if (threshold[c + j] == -INFINITY)
          for (int64_t b = 0; b < B; ++b) candidate(b);
        else
          scan(p + j * B, B, threshold[c + j], candidate);
      }
      size_t kept = first;
      for (size_t e = first; e < row.size(); ++e) {
        if (e + 1 < row.size()) fetch_ahead(rows + row[e + 1] * D, D), fetch_ahead(w + (c + slot[e + 1 - first]) * D, D);
        const int64_t j = c + slot[e - first];
        const float pre = dot(w + j * D, rows + row[e] * D, D) + bias[j];
        if (pre <= 0) continue;  // a pre-activation that is not a number goes on, to be seen in the loss
        row[kept++] = row[e];
        z.push_back(pre);
        ++start[j + 1];
      }
      row.resize(kept);
      slot.clear();
    });
  }
}

// -> start [n + 1] int64, row [E] int32, z [E]. columns [D, B] is x transposed, in bf16 or fp32; reach is the largest norm of a row of x.
std::tuple<Tensor, Tensor, Tensor> encode(const Tensor& W_enc, const Tensor& b_enc, const Tensor& x, const Tensor& columns,
                                          double reach) {
  static thread_local Scratch* scratch = new Scratch;  // kept for good: fresh pages every bank would cost more than the product's scan
  const int threads = at::get_num_threads();
  scratch->row.resize(std::max<size_t>(scratch->row.size(), threads));
  scratch->z.resize(scratch->row.size());
  scratch->slot.resize(scratch->row.size());
  scratch->parts.resize(scratch->row.size());
  for (size_t t = 0; t < scratch->row.size(); ++t) scratch->row[t].clear(), scratch->z[t].clear(), scratch->parts[t].clear();
  const int64_t n = W_enc.size(0);
  Tensor start = at::zeros({n + 1}, at::kLong);
  int64_t* s = start.mutable_data_ptr<int64_t>();
  if (x.size(0) > 0) {
    if (columns.scalar_type() == at::kBFloat16)
      find<uint16_t>(W_enc, b_enc, x, columns, reach, 0x1p-8f, *scratch, s);
    else
      find<float>(W_enc, b_enc, x, columns, reach, 0x1p-18f, *scratch, s);
  }
  for (int64_t j = 0; j < n; ++j) s[j + 1] += s[j];
  Tensor row = at::empty({s[n]}, at::kInt), z = at::empty({s[n]}, at::kFloat);
  for (size_t t = 0; t < scratch->parts.size(); ++t) {
    const auto& parts = scratch->parts[t];
    for (size_t k = 0; k < parts.size(); ++k) {
      const int64_t first = parts[k].first;
      const int64_t size = (k + 1 < parts.size() ? parts[k + 1].first : (int64_t)scratch->row[t].size()) - first;
      std::memcpy(row.mutable_data_ptr<int32_t>() + s[parts[k].slot], scratch->row[t].data() + first, size * 4);
      std::memcpy(z.mutable_data_ptr<float>() + s[parts[k].slot], scratch->z[t].data() + first, size * 4);
    }
  }
  return {start, row, z};
}
}  // namespace

TORCH_LIBRARY_FRAGMENT(alignsae, m) { m.def("encode", &encode); }
