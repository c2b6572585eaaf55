// What lives on the active entries of one bank: decode, L1, moments of the correlation, and the whole backward pass.
//
// Shapes: B rows, D width, R concepts, n slots of the bank, E active entries, m columns (slots active on some rank).
// Entries are kept slot by slot: those of slot j are start[j] .. start[j + 1], each with its row and its z > 0.
// Formulas: docs/design.md, "One pass per bank".

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <tuple>
#include <vector>

#include "lanes.h"

namespace {
using at::Tensor;

constexpr int64_t PARTS = 64;

// Runs f(begin, end, part) on PARTS ranges of slots (or rows) that hold about equal numbers of entries. Threads take them as they go,
// so that none waits for another that was held up; what a range writes does not depend on who takes it.
template <typename F>
void over(const int64_t* start, int64_t slots, F&& f) {
  const int64_t work = start[slots] + slots;  // an idle slot costs about as much as an entry: its gradient is written
  auto boundary = [&](int64_t p) {
    int64_t low = 0, high = slots;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if ((start[middle] + middle) * PARTS < work * p) low = middle + 1;
      else high = middle;
    }
    return p == PARTS ? slots : low;
  };
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t p = next++; p < PARTS; p = next++) f(boundary(p), boundary(p + 1), p);
  });
}

// The same entries row by row -> row_start [B + 1] int64, slot [E] int32, entry [E] int32 (position in the slot order).
std::tuple<Tensor, Tensor, Tensor> by_row(const Tensor& start, const Tensor& row, int64_t B) {
  const int64_t n = start.size(0) - 1, E = row.size(0);
  Tensor row_start = at::zeros({B + 1}, at::kLong), slot = at::empty({E}, at::kInt), entry = at::empty({E}, at::kInt);
  const int64_t* s = start.const_data_ptr<int64_t>();
  const int32_t* r = row.const_data_ptr<int32_t>();
  int64_t* rs = row_start.mutable_data_ptr<int64_t>();
  for (int64_t e = 0; e < E; ++e) ++rs[r[e] + 1];
  for (int64_t b = 0; b < B; ++b) rs[b + 1] += rs[b];
  std::vector<int64_t> next(rs, rs + B);
  for (int64_t j = 0; j < n; ++j)
    for (int64_t e = s[j]; e < s[j + 1]; ++e) {
      const int64_t at = next[r[e]]++;
      slot.mutable_data_ptr<int32_t>()[at] = j;
      entry.mutable_data_ptr<int32_t>()[at] = e;
    }
  return {row_start, slot, entry};
}

// -> recon + z W_dec [B, D], and the L1 term.
std::tuple<Tensor, double> decode(const Tensor& W_dec, const Tensor& recon, const Tensor& z, const Tensor& row_start,
                                  const Tensor& slot, const Tensor& entry, bool unit) {
  const int64_t D = W_dec.size(1), B = recon.size(0);
  Tensor out = at::empty_like(recon), l1 = at::zeros({B}, at::kDouble);
  const float *w = W_dec.const_data_ptr<float>(), *zs = z.const_data_ptr<float>(), *before = recon.const_data_ptr<float>();
  const int64_t* rs = row_start.const_data_ptr<int64_t>();
  const int32_t *slots = slot.const_data_ptr<int32_t>(), *entries = entry.const_data_ptr<int32_t>();
  float* o = out.mutable_data_ptr<float>();
  double* sums = l1.mutable_data_ptr<double>();
  over(rs, B, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t b = begin; b < end; ++b) {
      std::memcpy(o + b * D, before + b * D, D * sizeof(float));
      for (int64_t k = rs[b]; k < rs[b + 1]; ++k) {
        if (k + 1 < rs[end]) fetch_ahead(w + slots[k + 1] * D, D);
        const float* wj = w + slots[k] * D;
        // The norm costs nothing here, where the row is in the cache; a pass of its own would fetch every row once more.
        const float norm = std::sqrt(dot(wj, wj, D)), zk = zs[entries[k]];
        sums[b] += unit ? zk : zk * norm;
        add_scaled(o + b * D, wj, unit ? zk / std::max(norm, 1e-12f) : zk, D);
      }
    }
  });
  return {out, l1.sum().item<double>()};
}

// Local moments of the given columns, written into `out` [m, R + 2]: sum z, sum z^2, code^T z.
void moments(const Tensor& start, const Tensor& row, const Tensor& z, const Tensor& code, const Tensor& columns, Tensor out) {
  const int64_t m = columns.size(0), R = code.size(1);
  const int64_t *s = start.const_data_ptr<int64_t>(), *slots = columns.const_data_ptr<int64_t>();
  const int32_t* r = row.const_data_ptr<int32_t>();
  const float *zs = z.const_data_ptr<float>(), *a = code.const_data_ptr<float>();
  at::parallel_for(0, m, 16, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      float* o = out.mutable_data_ptr<float>() + k * (R + 2);
      if (s[slots[k]] == s[slots[k] + 1]) set_zero(o + 2, R);  // active on another rank alone
      double total = 0, square = 0;  // the variance is a small difference of these
      for (int64_t e = s[slots[k]]; e < s[slots[k] + 1]; ++e) {
        if (e + 1 < s[slots[k] + 1]) fetch_ahead(a + r[e + 1] * R, R);
        total += zs[e];
        square += double(zs[e]) * zs[e];
        (e == s[slots[k]] ? set_scaled : add_scaled)(o + 2, a + r[e] * R, zs[e], R);
      }
      o[0] = total;
      o[1] = square;
    }
  });
}

// Turns the global moments [m, R + 2] of `moments` into weighted correlations C_ij/n_j, in place (its first two columns are left), and
// returns q_i = sum_j C_ij^2 and shift_i = sum_j mu_j C_ij/n_j. One pass, since [m, R] is the largest thing here when R is.
std::tuple<Tensor, Tensor> weigh(Tensor packed, const Tensor& mean, const Tensor& inv_norm) {
  const int64_t m = packed.size(0), R = packed.size(1) - 2;
  Tensor q = at::zeros({PARTS, R}, at::kFloat), shift = at::zeros({PARTS, R}, at::kFloat);
  float* data = packed.mutable_data_ptr<float>();
  const float *mu = mean.const_data_ptr<float>(), *inv = inv_norm.const_data_ptr<float>();
  float *qs = q.mutable_data_ptr<float>(), *shifts = shift.mutable_data_ptr<float>();
  at::parallel_for(0, PARTS, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      for (int64_t k = m * part / PARTS; k < m * (part + 1) / PARTS; ++k) {
        float* c = data + k * (R + 2) + 2;
        const float once = inv[k], twice = inv[k] * inv[k], centre = mu[k];
#pragma omp simd
        for (int64_t i = 0; i < R; ++i) {
          const float correlation = c[i] * once;
          qs[part * R + i] += correlation * correlation;
          c[i] *= twice;
          shifts[part * R + i] += centre * c[i];
        }
      }
  });
  return {q.sum(0), shift.sum(0)};
}

// grad_concept_bi += 2/nu_i ( sum_j z_bj C_ij/n_j - shift_i - a_bi q_i ), where weighted [m, R + 2] is what `weigh` leaves and place [n] its rows.
void add_concept_gradient(const Tensor& row_start, const Tensor& slot, const Tensor& entry, const Tensor& z, const Tensor& place,
                          const Tensor& weighted, const Tensor& shift, const Tensor& q, const Tensor& code,
                          const Tensor& inv_norm, Tensor grad_concept) {
  const int64_t B = code.size(0), R = code.size(1);
  const int64_t *rs = row_start.const_data_ptr<int64_t>(), *at_place = place.const_data_ptr<int64_t>();
  const int32_t *slots = slot.const_data_ptr<int32_t>(), *entries = entry.const_data_ptr<int32_t>();
  const float *zs = z.const_data_ptr<float>(), *wc = weighted.const_data_ptr<float>(), *sh = shift.const_data_ptr<float>(),
              *qi = q.const_data_ptr<float>(), *a = code.const_data_ptr<float>(), *inv = inv_norm.const_data_ptr<float>();
  float* out = grad_concept.mutable_data_ptr<float>();
  over(rs, B, [&](int64_t begin, int64_t end, int64_t) {
    std::vector<float> sum(R);
    for (int64_t b = begin; b < end; ++b) {
      set_zero(sum.data(), R);
      for (int64_t k = rs[b]; k < rs[b + 1]; ++k) {
        if (k + 1 < rs[end]) fetch_ahead(wc + at_place[slots[k + 1]] * (R + 2), R + 2);
        add_scaled(sum.data(), wc + at_place[slots[k]] * (R + 2) + 2, zs[entries[k]], R);
      }
      for (int64_t i = 0; i < R; ++i) out[b * R + i] += 2 * inv[i] * (sum[i] - sh[i] - a[b * R + i] * qi[i]);
    }
  });
}

// The correlation over pairs of rows (pairs.py): adds z_bj z_cj / n_j^2 to shared [B, B] and returns (K z_j)_b of the active entries [E].
// Row by row, so that what is read and written at random is one row of each block, and no two threads write the same.
Tensor pair_products(const Tensor& start, const Tensor& row, const Tensor& z, const Tensor& row_start, const Tensor& slot, const Tensor& entry,
                     const Tensor& inv_norm, const Tensor& gram, Tensor shared) {
  const int64_t B = gram.size(0);
  Tensor out = at::empty_like(z);
  const int64_t *s = start.const_data_ptr<int64_t>(), *rs = row_start.const_data_ptr<int64_t>();
  const int32_t *r = row.const_data_ptr<int32_t>(), *slots = slot.const_data_ptr<int32_t>(), *entries = entry.const_data_ptr<int32_t>();
  const float *zs = z.const_data_ptr<float>(), *inv = inv_norm.const_data_ptr<float>(), *k = gram.const_data_ptr<float>();
  float *h = shared.mutable_data_ptr<float>(), *products = out.mutable_data_ptr<float>();
  over(rs, B, [&](int64_t first, int64_t last, int64_t) {
    for (int64_t b = first; b < last; ++b) {
      const float* kb = k + b * B;
      float* __restrict hb = h + b * B;
      for (int64_t e = rs[b]; e < rs[b + 1]; ++e) {
        const int64_t j = slots[e];
        const float mine = zs[entries[e]] * inv[j] * inv[j];
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = s[j]; i < s[j + 1]; ++i) {
          sum += kb[r[i]] * zs[i];
          hb[r[i]] += mine * zs[i];
        }
        products[entries[e]] = sum;
      }
    }
  });
  return out;
}

// Turns (K z_j)_b into dperp/dz_bj = 2/n_j^2 ( (K z_j)_b - (z_bj - mu_j) q_j ), in place, with q_j = z_j^T K z_j / n_j^2; returns sum_j q_j.
double pair_slopes(const Tensor& start, const Tensor& z, const Tensor& mean, const Tensor& inv_norm, Tensor products) {
  const int64_t n = start.size(0) - 1;
  const int64_t* s = start.const_data_ptr<int64_t>();
  const float *zs = z.const_data_ptr<float>(), *mu = mean.const_data_ptr<float>(), *inv = inv_norm.const_data_ptr<float>();
  float* u = products.mutable_data_ptr<float>();
  std::vector<double> sums(PARTS);
  over(s, n, [&](int64_t begin, int64_t end, int64_t part) {
    for (int64_t j = begin; j < end; ++j) {
      const float square = inv[j] * inv[j];
      double q = 0;
      for (int64_t e = s[j]; e < s[j + 1]; ++e) q += double(zs[e]) * u[e];
      q *= square;
      sums[part] += q;
      for (int64_t e = s[j]; e < s[j + 1]; ++e) u[e] = 2 * square * (u[e] - (zs[e] - mu[j]) * float(q));
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

// Gradients of W_enc [n, D], b_enc [n] and W_dec [n, D], written into the three tensors given; rows of idle slots are zero.
// Returns the sums of squares of the first and the last.
// With a correlation term: code [B, R], the global moments [m, R + 2], mean [m], inv_norm [m], place [n]; g_perp = dL/dperp. Without: R = 0.
// Or, where they are known already, its gradients [E] with respect to z.
std::tuple<double, double> backward(const Tensor& W_dec, const Tensor& x, const Tensor& g_recon, const Tensor& start, const Tensor& row,
              const Tensor& z, double g_sp, bool unit, double g_perp, const Tensor& code, const Tensor& packed, const Tensor& mean,
              const Tensor& inv_norm, const Tensor& place, const Tensor& known, Tensor grad_enc, Tensor grad_b, Tensor grad_dec) {
  const int64_t n = W_dec.size(0), D = W_dec.size(1), R = code.size(1);
  const float *w = W_dec.const_data_ptr<float>(), *xs = x.const_data_ptr<float>(),
              *g = g_recon.const_data_ptr<float>(), *zs = z.const_data_ptr<float>(), *a = code.const_data_ptr<float>(),
              *cs = packed.const_data_ptr<float>(), *mu = mean.const_data_ptr<float>(), *inv = inv_norm.const_data_ptr<float>();
  const int64_t *s = start.const_data_ptr<int64_t>(), *at_place = place.const_data_ptr<int64_t>();
  const int32_t* r = row.const_data_ptr<int32_t>();
  const float* slopes = known.numel() ? known.const_data_ptr<float>() : nullptr;
  float *ge = grad_enc.mutable_data_ptr<float>(), *gb = grad_b.mutable_data_ptr<float>(), *gd = grad_dec.mutable_data_ptr<float>();
  std::vector<std::pair<double, double>> squares(PARTS);
  over(s, n, [&](int64_t begin, int64_t end, int64_t part) {
    std::vector<float> enc(D), dec(D);
    double enc_square = 0, dec_square = 0;
    for (int64_t j = begin; j < end; ++j) {
      if (j + 1 < end && s[j + 1] < s[j + 2]) fetch_ahead(w + (j + 1) * D, D);
      if (s[j] == s[j + 1]) {
        gb[j] = 0;
        stream_zero(ge + j * D, D);
        stream_zero(gd + j * D, D);
        continue;
      }
      float bias = 0, total = 0;
      const float* wj = w + j * D;
      const float norm = std::sqrt(dot(wj, wj, D)), inverse = 1 / std::max(norm, 1e-12f);
      const float* c = R ? cs + at_place[j] * (R + 2) + 2 : nullptr;  // C_ij n_j
      const float over = c ? inv[at_place[j]] : 0, centre = c ? mu[at_place[j]] : 0, q = c ? dot(c, c, R) * over * over : 0;
      for (int64_t e = s[j]; e < s[j + 1]; ++e) {
        if (e + 1 < s[end]) fetch_ahead(g + r[e + 1] * D, D), fetch_ahead(xs + r[e + 1] * D, D), fetch_ahead(a + r[e + 1] * R, R);
        float slope = dot(g + r[e] * D, wj, D) * (unit ? inverse : 1) + g_sp * (unit ? 1 : norm);
        if (c) slope += g_perp * 2 * over * over * (dot(a + r[e] * R, c, R) - (zs[e] - centre) * q);
        if (slopes) slope += g_perp * slopes[e];
        bias += slope;
        total += zs[e];
        if (e == s[j]) {
          set_scaled(enc.data(), xs + r[e] * D, slope, D);
          set_scaled(dec.data(), g + r[e] * D, zs[e], D);
        } else {
          add_scaled(enc.data(), xs + r[e] * D, slope, D);
          add_scaled(dec.data(), g + r[e] * D, zs[e], D);
        }
      }
      if (unit) {  // gradient of a row divided by its norm: what is orthogonal to the row
        const float along = dot(dec.data(), wj, D) * inverse * inverse;
        for (int64_t i = 0; i < D; ++i) dec[i] = (dec[i] - along * wj[i]) * inverse;
      } else if (total > 0) {
        add_scaled(dec.data(), wj, g_sp * total * inverse, D);
      }
      gb[j] = bias;
      enc_square += square_of(enc.data(), D);
      dec_square += square_of(dec.data(), D);
      stream_out(ge + j * D, enc.data(), D);
      stream_out(gd + j * D, dec.data(), D);
    }
    squares[part] = {enc_square, dec_square};
    stream_end();
  });
  double enc_square = 0, dec_square = 0;
  for (const auto& part : squares) enc_square += part.first, dec_square += part.second;
  return {enc_square, dec_square};
}
}  // namespace

TORCH_LIBRARY_FRAGMENT(alignsae, m) {
  m.def("by_row", &by_row);
  m.def("decode", &decode);
  m.def("moments", &moments);
  m.def("weigh", &weigh);
  m.def("add_concept_gradient", &add_concept_gradient);
  m.def("pair_products", &pair_products);
  m.def("pair_slopes", &pair_slopes);
  m.def("backward", &backward);
}
