// The product of a chunk of slots with blocks of rows, in bf16, int16 or fp32. It only says where to look, so each
// arithmetic comes with a bound on what it can be wrong by.
//
// Shapes: D width, `width` the same padded to whole words. A block holds the rows of x as the processor takes them:
// fp32 [D, rows], or [width / 2, rows, 2] of bf16 or int16, where the numbers of a pair are neighbours in a row of x.
#pragma once

#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>
#include <vector>

#include "lanes.h"

namespace {

// Row of fp32 weights -> bf16, round to nearest even; returns the sum of squares. The rows after it are asked for
// meanwhile.
float to_bf16(const float* w, at::BFloat16* out, int64_t size) {
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

// int16 numbers are w / norm(w) * INT16_NORM and x / max_row_norm * INT16_NORM, rounded: no sum of their products
// leaves int32 (Cauchy-Schwarz), and whether a row of x has a few large numbers or many alike makes no difference to
// the rounding.
constexpr float INT16_NORM = 32000;
// Sum of 2 D independent roundings, each of at most 1/2, times numbers whose squares sum to 2 INT16_NORM^2: beyond this
// many INT16_NORM with a probability of 2 exp(-36) = 5e-16 (Hoeffding).
constexpr float INT16_ERROR = 6;

void to_int16(const float* w, int16_t* out, int64_t size, float scale) {
  int64_t i = 0;
#ifdef __AVX2__
  const __m256 by = _mm256_set1_ps(scale);
  for (; i + 16 <= size; i += 16) {
    const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(w + i), by)),
                  high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(w + i + 8), by));
    _mm256_storeu_si256((__m256i*)(out + i), _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0b11011000));
  }
#endif
  for (; i < size; ++i) out[i] = int16_t(std::lrint(std::clamp(w[i] * scale, -INT16_NORM, INT16_NORM)));
}

// What `prepare` is told of a slot, and of the rows that it meets.
struct SlotBounds {
  float bias, threshold;
  float max_row_norm;  // largest norm of a row of x
};

// Writes `row` [D] of the weights of one slot as the product takes it, if it does not take fp32. Returns the product at
// and below which the entry's pre-activation is not above the threshold, whatever the rounding; NaN where nothing can
// be said, as for weights that are not finite.
template <typename T>
float prepare(const float* row, T* copy, int64_t D, const SlotBounds& slot) {
  constexpr bool bf16 = std::is_same<T, at::BFloat16>::value;
  const float added = std::abs(slot.bias) + std::abs(slot.threshold);
  float square, margin;
  float per_count = 1;  // pre-activation of a product of 1
  if constexpr (std::is_same<T, int16_t>::value) {
    square = dot(row, row, D);
    const float norm = std::sqrt(square);
    to_int16(row, copy, D, norm > 0 && std::isfinite(norm) ? INT16_NORM / norm : 0);
    per_count = std::max(slot.max_row_norm / INT16_NORM * (norm / INT16_NORM), FLT_MIN);
    margin = 0x1p-18f * added + INT16_ERROR * INT16_NORM * per_count;
  } else {
    if constexpr (bf16) square = to_bf16(row, copy, D);
    else square = dot(row, row, D);
    margin = (bf16 ? 0x1p-8f : 0x1p-18f) * (added + 2 * slot.max_row_norm * std::sqrt(square / D));
  }
  const float least = slot.threshold - slot.bias - margin;
  return std::isfinite(least) ? least / per_count : NAN;
}

// out [slots, rows] = weights [slots, width] times one block, by torch's block product; T fp32 or bf16.
template <typename T>
void multiply(int64_t slots, int64_t rows, int64_t width, const T* weights, const T* block, float* out,
              int64_t stride) {
  constexpr bool pairs = std::is_same<T, at::BFloat16>::value;  // in the layout of `block`
  at::native::cpublas::brgemm(slots, rows, width, width, rows, stride, false, weights, block, out, pairs);
}

// The same in int16, of which an instruction of AVX2 multiplies sixteen, against eight fp32 numbers. Six slots by
// sixteen rows keep their sums in registers.
constexpr int64_t INT16_SLOTS = 6, INT16_ROWS = 16;
#ifdef __AVX2__
struct Int16Sums {
  __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256();

  // In assembly, so that all sums stay in registers: GCC moves the loads of six slots ahead of their products, and the
  // sums to memory.
  static void accumulate(__m256i& sum, __m256i a, __m256i b) {
    __m256i products;
    asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(a), "x"(b));
  }

  void add(const int16_t* pair, __m256i a, __m256i b) {
    int32_t both;
    std::memcpy(&both, pair, sizeof both);
    const __m256i w = _mm256_set1_epi32(both);
    accumulate(low, a, w), accumulate(high, b, w);
  }

  void store(float* out) const {
    _mm256_storeu_ps(out, _mm256_cvtepi32_ps(low));
    _mm256_storeu_ps(out + 8, _mm256_cvtepi32_ps(high));
  }
};

inline void multiply(int64_t slots, int64_t rows, int64_t width, const int16_t* weights, const int16_t* block,
                     float* out, int64_t stride) {
  TORCH_CHECK(rows == INT16_ROWS, "int16 blocks have ", INT16_ROWS, " rows");
  auto row_pair = [&](int64_t k) { return _mm256_loadu_si256((const __m256i*)(block + k)); };
  int64_t j = 0;
  for (; j + INT16_SLOTS <= slots; j += INT16_SLOTS, weights += INT16_SLOTS * width, out += INT16_SLOTS * stride) {
    Int16Sums s0, s1, s2, s3, s4, s5;  // an array of them would live in memory
    for (int64_t k = 0; k < width; k += 2) {
      const __m256i a = row_pair(k * rows), b = row_pair(k * rows + 16);
      const int16_t* w = weights + k;
      s0.add(w, a, b), s1.add(w + width, a, b), s2.add(w + 2 * width, a, b);
      s3.add(w + 3 * width, a, b), s4.add(w + 4 * width, a, b), s5.add(w + 5 * width, a, b);
    }
    s0.store(out), s1.store(out + stride), s2.store(out + 2 * stride);
    s3.store(out + 3 * stride), s4.store(out + 4 * stride), s5.store(out + 5 * stride);
  }
  for (; j < slots; ++j, weights += width, out += stride) {
    Int16Sums sums;
    for (int64_t k = 0; k < width; k += 2) sums.add(weights + k, row_pair(k * rows), row_pair(k * rows + 16));
    sums.store(out);
  }
}
#else
inline void multiply(int64_t, int64_t, int64_t, const int16_t*, const int16_t*, float*, int64_t) {
  TORCH_CHECK(false, "int16 products need AVX2");
}
#endif

// Whether torch has its block product for T here: not where oneDNN is missing, switched off, or held to an older
// instruction set.
template <typename T>
bool has_blocks() {
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool found = [] {
    std::vector<T> ones(32, 1.0f);
    std::vector<float> out(16);
    try {
      multiply<T>(1, 16, 2, ones.data(), ones.data(), out.data(), 16);
      at::native::cpublas::brgemm_release(true);
    } catch (const c10::Error&) { return false; }
    return out[0] == 2.0f;
  }();
  return found;
}

// Whether bf16 products run on this machine; without them the product is not bf16, since emulated ones would be slower.
inline bool bf16_products() {
#if defined(__AVX512BF16__)
  return has_blocks<at::BFloat16>();
#else
  return false;
#endif
}

// Whether int16 products are faster than fp32 ones. With AVX-512 they should not be: product and sum are two
// instructions there for what two of fp32 do, on the same pipes.
inline bool int16_products() {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return true;
#else
  return false;
#endif
}

// `multiply` for fp32 where torch has no block product.
void multiply_plainly(int64_t slots, int64_t rows, int64_t width, const float* weights, const float* block, float* out,
                      int64_t stride) {
  auto matrix = [](const float* data, int64_t height, int64_t columns, int64_t step) {
    return at::from_blob(const_cast<float*>(data), {height, columns}, {step, 1}, at::kFloat);
  };
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  at::Tensor product = matrix(out, slots, rows, stride);
  at::mm_out(product, matrix(weights, slots, width, width), matrix(block, width, rows, rows));
}
}  // namespace
