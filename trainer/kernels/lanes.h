// Vector loops on rows of floats. Plain loops and GCC vector types; intrinsics only where the machine has them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX__
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define WIDE 1
#endif

typedef float Lane __attribute__((vector_size(64), aligned(4)));
constexpr int64_t LANE = 16;

// Asks for a row before it is needed: rows of active slots lie far apart, which no hardware prefetcher foresees.
inline void fetch_ahead(const float* row, int64_t size) {
  for (int64_t i = 0; i < size; i += LANE) __builtin_prefetch(row + i);
}

inline float dot(const float* a, const float* b, int64_t size) {
  Lane s0{}, s1{}, s2{}, s3{};  // four sums hide the latency of the multiply-add
  int64_t i = 0;
  for (; i + 4 * LANE <= size; i += 4 * LANE) {
    s0 += *(const Lane*)(a + i) * *(const Lane*)(b + i);
    s1 += *(const Lane*)(a + i + LANE) * *(const Lane*)(b + i + LANE);
    s2 += *(const Lane*)(a + i + 2 * LANE) * *(const Lane*)(b + i + 2 * LANE);
    s3 += *(const Lane*)(a + i + 3 * LANE) * *(const Lane*)(b + i + 3 * LANE);
  }
  s0 = (s0 + s1) + (s2 + s3);
  float sum = 0;
  for (int64_t k = 0; k < LANE; ++k) sum += s0[k];
  for (; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

// dot(a, a, size) that no finite row makes infinite.
inline double square_of(const float* a, int64_t size) {
  const float square = dot(a, a, size);
  if (std::isfinite(square)) return square;
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += double(a[i]) * a[i];
  return sum;
}

inline void add_scaled(float* out, const float* a, float scale, int64_t size) {
  int64_t i = 0;
  for (; i + LANE <= size; i += LANE) *(Lane*)(out + i) += scale * *(const Lane*)(a + i);
  for (; i < size; ++i) out[i] += scale * a[i];
}

inline void set_scaled(float* out, const float* a, float scale, int64_t size) {
  int64_t i = 0;
  for (; i + LANE <= size; i += LANE) *(Lane*)(out + i) = scale * *(const Lane*)(a + i);
  for (; i < size; ++i) out[i] = scale * a[i];
}

// A loop, since memset's string instruction takes longer to start than a row takes to clear.
inline void set_zero(float* out, int64_t size) {
  int64_t i = 0;
  for (; i + LANE <= size; i += LANE) *(Lane*)(out + i) = Lane{};
  for (; i < size; ++i) out[i] = 0;
}

// Writes a row that nobody reads before it has left the cache: past the cache, so that it is not fetched first.
inline void stream_out(float* out, const float* a, int64_t size) {
#ifdef __AVX__
  if (size % LANE == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0) {  // whole cache lines
    for (int64_t i = 0; i < size; i += 8) _mm256_stream_ps(out + i, _mm256_loadu_ps(a + i));
    return;
  }
#endif
  std::memcpy(out, a, size * sizeof(float));
}

inline void stream_zero(float* out, int64_t size) {
#ifdef __AVX__
  if (size % LANE == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
    for (int64_t i = 0; i < size; i += 8) _mm256_stream_ps(out + i, _mm256_setzero_ps());
    return;
  }
#endif
  std::memset(out, 0, size * sizeof(float));
}

// What was written past the cache by this thread, other threads see from here on.
inline void stream_end() {
#ifdef __AVX__
  _mm_sfence();
#endif
}
