// The orthogonality term on the active entries of one bank: by the correlations [m, R] of its columns, or over pairs of
// rows (pairs.py).
//
// Shapes: B rows, R concepts, n slots of the bank, E active entries, m columns (slots active on some rank). Formulas:
// docs/design.md, "One pass per bank".

#include <torch/library.h>

#include <tuple>
#include <vector>

#include "entries.h"
#include "lanes.h"

namespace {
// Local sums of the given columns, written into `out` [m, R + 2]: of z, z^2 and code^T z.
void column_sums(at::TensorList slot_order, const Tensor& code, const Tensor& columns, Tensor out) {
  const Entries entries(slot_order);
  const int64_t R = code.size(1), *slots = columns.const_data_ptr<int64_t>();
  const float* a = code.const_data_ptr<float>();
  float* sums = out.mutable_data_ptr<float>();
  at::parallel_for(0, columns.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      float* column = sums + k * (R + 2);
      const int64_t first = entries.start[slots[k]], last = entries.start[slots[k] + 1];
      if (first == last) set_zero(column + 2, R);  // active on another rank alone
      double total = 0, square = 0;                // the variance is a small difference of these
      for (int64_t e = first; e < last; ++e) {
        if (e + 1 < last) fetch_ahead(a + entries.row[e + 1] * R, R);
        const float z = entries.z[e];
        total += z;
        square += double(z) * z;
        (e == first ? set_scaled : add_scaled)(column + 2, a + entries.row[e] * R, z, R);
      }
      column[0] = total;
      column[1] = square;
    }
  });
}

// Turns the global sums [m, R + 2] of `column_sums` into w_j C_ij/n_j, in place (the first two numbers of a column are
// left), and returns q_i = sum_j w_j C_ij^2, shift_i = sum_j mu_j w_j C_ij/n_j, and of each column sum_i C_ij^2. One
// pass, since [m, R] is the largest thing here when R is.
std::tuple<Tensor, Tensor, Tensor> weigh(Tensor sums, const Tensor& mean, const Tensor& inv_norm,
                                         const Tensor& weight) {
  const int64_t m = sums.size(0), R = sums.size(1) - 2;
  Tensor q = at::zeros({PARTS, R}, at::kFloat), shift = at::zeros({PARTS, R}, at::kFloat);
  Tensor squares = at::empty({m}, at::kFloat);
  float* data = sums.mutable_data_ptr<float>();
  const float *mu = mean.const_data_ptr<float>(), *inv = inv_norm.const_data_ptr<float>(),
              *w = weight.const_data_ptr<float>();
  float *qs = q.mutable_data_ptr<float>(), *shifts = shift.mutable_data_ptr<float>(),
        *of_column = squares.mutable_data_ptr<float>();
  at::parallel_for(0, PARTS, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      for (int64_t k = m * part / PARTS; k < m * (part + 1) / PARTS; ++k) {
        float* c = data + k * (R + 2) + 2;
        const float once = inv[k], twice = w[k] * inv[k] * inv[k], centre = mu[k];
        float square = 0;
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < R; ++i) {
          const float correlation = c[i] * once;
          square += correlation * correlation;
          qs[part * R + i] += w[k] * correlation * correlation;
          c[i] *= twice;
          shifts[part * R + i] += centre * c[i];
        }
        of_column[k] = square;
      }
  });
  return {q.sum(0), shift.sum(0), squares};
}

// grad_concept_bi += 2/nu_i ( sum_j z_bj C_ij/n_j - shift_i - a_bi q_i ), where weighted [m, R + 2], shift and q are
// what `weigh` leaves, place [n] the column of each slot, and a and 1/nu the standardised concept code and its inverse
// norm.
void add_concept_gradient(at::TensorList row_order, const Tensor& z, const Tensor& place, const Tensor& weighted,
                          const Tensor& shift, const Tensor& q, const Tensor& code, const Tensor& inv_norm,
                          Tensor grad_concept) {
  const RowEntries by(row_order);
  const int64_t R = code.size(1), *column = place.const_data_ptr<int64_t>();
  const float *zs = z.const_data_ptr<float>(), *correlations = weighted.const_data_ptr<float>(),
              *shifts = shift.const_data_ptr<float>(), *qs = q.const_data_ptr<float>(),
              *a = code.const_data_ptr<float>(), *inv = inv_norm.const_data_ptr<float>();
  float* out = grad_concept.mutable_data_ptr<float>();
  in_parts(by.start, by.rows, [&](int64_t begin, int64_t end, int64_t) {
    std::vector<float> sum(R);
    for (int64_t b = begin; b < end; ++b) {
      set_zero(sum.data(), R);
      for (int64_t k = by.start[b]; k < by.start[b + 1]; ++k) {
        if (k + 1 < by.start[end]) fetch_ahead(correlations + column[by.slot[k + 1]] * (R + 2), R + 2);
        add_scaled(sum.data(), correlations + column[by.slot[k]] * (R + 2) + 2, zs[by.entry[k]], R);
      }
      for (int64_t i = 0; i < R; ++i) out[b * R + i] += 2 * inv[i] * (sum[i] - shifts[i] - a[b * R + i] * qs[i]);
    }
  });
}

// Over pairs of rows: adds w_j z_bj z_cj / n_j^2 to shared [B, B] and returns (K z_j)_b of the active entries [E], K =
// gram [B, B]. Row by row, so that what is read and written at random is one row of each block, and no two threads
// write the same.
Tensor pair_products(at::TensorList slot_order, at::TensorList row_order, const Tensor& inv_norm, const Tensor& weight,
                     const Tensor& gram, Tensor shared) {
  const Entries entries(slot_order);
  const RowEntries by(row_order);
  const int64_t B = by.rows;
  Tensor out = at::empty_like(slot_order[2]);
  const float *inv = inv_norm.const_data_ptr<float>(), *w = weight.const_data_ptr<float>(),
              *k = gram.const_data_ptr<float>();
  float *h = shared.mutable_data_ptr<float>(), *products = out.mutable_data_ptr<float>();
  in_parts(by.start, B, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t b = begin; b < end; ++b) {
      const float* k_row = k + b * B;
      float* __restrict h_row = h + b * B;
      for (int64_t e = by.start[b]; e < by.start[b + 1]; ++e) {
        const int64_t j = by.slot[e];
        const float mine = entries.z[by.entry[e]] * inv[j] * inv[j] * w[j];
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = entries.start[j]; i < entries.start[j + 1]; ++i) {
          sum += k_row[entries.row[i]] * entries.z[i];
          h_row[entries.row[i]] += mine * entries.z[i];
        }
        products[by.entry[e]] = sum;
      }
    }
  });
  return out;
}

// Turns (K z_j)_b into dperp/dz_bj = 2 w_j/n_j^2 ( (K z_j)_b - (z_bj - mu_j) q_j ), in place, and returns q [n], q_j =
// z_j^T K z_j / n_j^2 = sum_i C_ij^2.
Tensor pair_slopes(at::TensorList slot_order, const Tensor& mean, const Tensor& inv_norm, const Tensor& weight,
                   Tensor products) {
  const Entries entries(slot_order);
  const float *mu = mean.const_data_ptr<float>(), *inv = inv_norm.const_data_ptr<float>(),
              *w = weight.const_data_ptr<float>();
  Tensor squares = at::empty({entries.slots}, at::kFloat);
  float *u = products.mutable_data_ptr<float>(), *of_slot = squares.mutable_data_ptr<float>();
  in_parts(entries.start, entries.slots, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t first = entries.start[j], last = entries.start[j + 1];
      const float square = inv[j] * inv[j];
      double q = 0;
      for (int64_t e = first; e < last; ++e) q += double(entries.z[e]) * u[e];
      q *= square;
      of_slot[j] = q;
      const float scale = 2 * w[j] * square;
      for (int64_t e = first; e < last; ++e) u[e] = scale * (u[e] - (entries.z[e] - mu[j]) * float(q));
    }
  });
  return squares;
}
}  // namespace

TORCH_LIBRARY_FRAGMENT(alignsae, m) {
  m.def("column_sums(Tensor[] entries, Tensor code, Tensor columns, Tensor(a!) out) -> ()", &column_sums);
  m.def(
      "weigh(Tensor(a!) sums, Tensor mean, Tensor inv_norm, Tensor weight) -> (Tensor q, Tensor shift, Tensor squares)",
      &weigh);
  m.def(
      "add_concept_gradient(Tensor[] by_row, Tensor z, Tensor place, Tensor weighted, Tensor shift, Tensor q, "
      "Tensor code, Tensor inv_norm, Tensor(a!) grad_concept) -> ()",
      &add_concept_gradient);
  m.def(
      "pair_products(Tensor[] entries, Tensor[] by_row, Tensor inv_norm, Tensor weight, Tensor gram, "
      "Tensor(a!) shared) -> Tensor",
      &pair_products);
  m.def("pair_slopes(Tensor[] entries, Tensor mean, Tensor inv_norm, Tensor weight, Tensor(a!) products) -> Tensor",
        &pair_slopes);
}
