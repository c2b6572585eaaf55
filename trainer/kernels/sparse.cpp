// What lives on the active entries of one bank: their order by row, decode with L1, and the backward pass.
//
// Shapes: B rows, D width, R concepts, n slots of the bank, E active entries. Formulas: docs/design.md, "One pass per
// bank".

#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "entries.h"
#include "lanes.h"

namespace {
constexpr float LEAST_NORM = 1e-12f;  // a decoder row that is divided by its norm is divided by no less

// The entries row by row -> start [B + 1] int64, slot [E] int32, entry [E] int32 (position in the slot order).
std::tuple<Tensor, Tensor, Tensor> by_row(at::TensorList slot_order, int64_t rows) {
  const Entries entries(slot_order);
  const int64_t E = entries.start[entries.slots];
  Tensor start = at::zeros({rows + 1}, at::kLong), slot = at::empty({E}, at::kInt), entry = at::empty({E}, at::kInt);
  int64_t* starts = start.mutable_data_ptr<int64_t>();
  for (int64_t e = 0; e < E; ++e) ++starts[entries.row[e] + 1];
  for (int64_t b = 0; b < rows; ++b) starts[b + 1] += starts[b];
  std::vector<int64_t> next(starts, starts + rows);
  int32_t *slot_out = slot.mutable_data_ptr<int32_t>(), *entry_out = entry.mutable_data_ptr<int32_t>();
  for (int64_t j = 0; j < entries.slots; ++j)
    for (int64_t e = entries.start[j]; e < entries.start[j + 1]; ++e) {
      const int64_t at = next[entries.row[e]]++;
      slot_out[at] = j;
      entry_out[at] = e;
    }
  return {start, slot, entry};
}

// -> recon + z W_dec [B, D], and the L1 term. unit_rows: decoder rows are used at norm 1.
std::tuple<Tensor, double> decode(const Tensor& W_dec, const Tensor& recon, const Tensor& z, at::TensorList row_order,
                                  bool unit_rows) {
  const RowEntries by(row_order);
  const int64_t D = W_dec.size(1);
  Tensor out = at::empty_like(recon), l1 = at::zeros({by.rows}, at::kDouble);
  const float *w = W_dec.const_data_ptr<float>(), *code = z.const_data_ptr<float>(),
              *before = recon.const_data_ptr<float>();
  float* after = out.mutable_data_ptr<float>();
  double* l1_of_row = l1.mutable_data_ptr<double>();
  in_parts(by.start, by.rows, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t b = begin; b < end; ++b) {
      std::memcpy(after + b * D, before + b * D, D * sizeof(float));
      for (int64_t k = by.start[b]; k < by.start[b + 1]; ++k) {
        if (k + 1 < by.start[end]) fetch_ahead(w + by.slot[k + 1] * D, D);
        if (code[by.entry[k]] == 0) continue;  // in the window
        const float* decoder = w + by.slot[k] * D;
        // The norm costs nothing here, where the row is in the cache; a pass of its own would fetch every row again.
        const float norm = std::sqrt(dot(decoder, decoder, D)), value = code[by.entry[k]];
        l1_of_row[b] += unit_rows ? value : value * norm;
        add_scaled(after + b * D, decoder, unit_rows ? value / std::max(norm, LEAST_NORM) : value, D);
      }
    }
  });
  return {out, l1.sum().item<double>()};
}

// dperp/dz of the entries of one slot is 2/n_j^2 ( (a C')_b - (z - mu) q ), where C' = C n_j are its column's sums.
struct ColumnSlope {
  const float* column;  // C' [R]
  int64_t concepts;
  float inv_norm, mean, weight, q;

  ColumnSlope(const Correlation& all, int64_t slot) : concepts(all.concepts) {
    const int64_t place = all.place[slot];
    column = all.sums + place * (concepts + 2) + 2;
    inv_norm = all.inv_norm[place];
    mean = all.mean[place];
    weight = all.weight[place];
    q = dot(column, column, concepts) * inv_norm * inv_norm;
  }

  // The bracket; 2 w_j/n_j^2 is left to the caller, who has it in double.
  float at(const float* code, float z) const { return dot(code, column, concepts) - (z - mean) * q; }
};

// Thresholds that are trained, by the rectangle kernel: dL/dthreshold is -1/bandwidth times the sum over the entries
// within half a bandwidth of (threshold dL/dz + dL/dsp), where sp counts active entries.
struct Jump {
  const float* threshold;  // [n]; nullptr where they are constants
  float bandwidth, g_sp;
  float* grad;  // [n]

  // Adds to `sum`, for an entry of slot j with this code and dL/dz, what is summed.
  void add(double& sum, int64_t j, float z, float slope) const {
    if (z < threshold[j] + bandwidth / 2) sum += threshold[j] * slope + g_sp;
  }
};

// What the gradients of one bank are made of.
struct Backward {
  const float *W_dec, *x, *g_recon;  // [n, D], [B, D], [B, D]
  int64_t D;
  double g_sp, g_perp;
  bool unit_rows;
  Entries entries;
  Correlation correlation;
  const float* slopes;  // dperp/dz [E] where it is known already, else nullptr
  Jump jump;

  // dL/dz of entry e of a slot, which is also its dL/dpre.
  float slope(int64_t e, const float* decoder, float norm, const std::optional<ColumnSlope>& column) const {
    const int64_t b = entries.row[e];
    const float inverse = 1 / std::max(norm, LEAST_NORM);
    float sum = dot(g_recon + b * D, decoder, D) * (unit_rows ? inverse : 1) + g_sp * (unit_rows ? 1 : norm);
    if (column) {
      const float scale = column->inv_norm;
      sum += g_perp * 2 * column->weight * scale * scale *
             column->at(correlation.code + b * correlation.concepts, entries.z[e]);
    }
    if (slopes) sum += g_perp * slopes[e];
    return sum;
  }

  void fetch(int64_t e) const {
    const int64_t b = entries.row[e];
    fetch_ahead(g_recon + b * D, D), fetch_ahead(x + b * D, D);
    fetch_ahead(correlation.code + b * correlation.concepts, correlation.concepts);
  }

  // The gradients of slot j, which has an entry: those of W_enc and W_dec into enc and dec [D]; returns that of the
  // bias. Entries up to `last` are the next to be asked for.
  float of_slot(int64_t j, int64_t last, float* enc, float* dec) const {
    const float* decoder = W_dec + j * D;
    const float norm = std::sqrt(dot(decoder, decoder, D)), inverse = 1 / std::max(norm, LEAST_NORM);
    const auto column = correlation.concepts ? std::optional<ColumnSlope>({correlation, j}) : std::nullopt;
    float bias = 0, total = 0;
    double jumped = 0;
    bool none = true;  // was active so far
    for (int64_t e = entries.start[j]; e < entries.start[j + 1]; ++e) {
      if (e + 1 < last) fetch(e + 1);
      const float own = slope(e, decoder, norm, column), z = entries.z[e];
      if (jump.threshold) {
        jump.add(jumped, j, z, own);
        if (z == 0) continue;
      }
      bias += own;
      total += z;
      const float *x_row = x + entries.row[e] * D, *g_row = g_recon + entries.row[e] * D;
      (none ? set_scaled : add_scaled)(enc, x_row, own, D);
      (none ? set_scaled : add_scaled)(dec, g_row, z, D);
      none = false;
    }
    if (none) set_zero(enc, D), set_zero(dec, D);
    if (jump.threshold) jump.grad[j] = -jumped / jump.bandwidth;
    if (unit_rows) {  // gradient of a row divided by its norm: what is orthogonal to the row
      const float along = dot(dec, decoder, D) * inverse * inverse;
      for (int64_t i = 0; i < D; ++i) dec[i] = (dec[i] - along * decoder[i]) * inverse;
    } else {
      add_scaled(dec, decoder, g_sp * total * inverse, D);
    }
    return bias;
  }
};

// Gradients of W_enc [n, D], b_enc [n], W_dec [n, D] and, where `threshold` [n] is trained with a bandwidth, of it,
// written into the four `grads`; rows of idle slots are zero. Returns the sums of squares of the first and the third.
// g_sp is dL/dsp, g_perp dL/dperp; with a threshold sp counts active entries, else it is the L1 term. With a
// correlation term, `correlation` is what Correlation is made of; or `slopes` [E] are its gradients with respect to z,
// where they are known already.
std::tuple<double, double> backward(const Tensor& W_dec, const Tensor& x, const Tensor& g_recon, at::TensorList entries,
                                    double g_sp, bool unit_rows, double g_perp, at::TensorList correlation,
                                    const std::optional<Tensor>& slopes, const std::optional<Tensor>& threshold,
                                    double bandwidth, at::TensorList grads) {
  TORCH_CHECK(grads.size() == 4, "gradients are those of W_enc, b_enc, W_dec and the thresholds");
  const Jump jump{threshold ? threshold->const_data_ptr<float>() : nullptr, float(bandwidth), float(g_sp),
                  grads[3].mutable_data_ptr<float>()};
  const Backward bank{W_dec.const_data_ptr<float>(),
                      x.const_data_ptr<float>(),
                      g_recon.const_data_ptr<float>(),
                      W_dec.size(1),
                      threshold ? 0 : g_sp,
                      g_perp,
                      unit_rows,
                      Entries(entries),
                      Correlation(correlation),
                      slopes ? slopes->const_data_ptr<float>() : nullptr,
                      jump};
  const int64_t D = bank.D, *start = bank.entries.start;
  float *grad_enc = grads[0].mutable_data_ptr<float>(), *grad_b = grads[1].mutable_data_ptr<float>(),
        *grad_dec = grads[2].mutable_data_ptr<float>();
  std::vector<std::pair<double, double>> squares(PARTS);
  in_parts(start, bank.entries.slots, [&](int64_t begin, int64_t end, int64_t part) {
    std::vector<float> enc(D), dec(D);
    double enc_square = 0, dec_square = 0;
    for (int64_t j = begin; j < end; ++j) {
      if (j + 1 < end && start[j + 1] < start[j + 2]) fetch_ahead(bank.W_dec + (j + 1) * D, D);
      if (start[j] == start[j + 1]) {
        grad_b[j] = 0;
        if (jump.threshold) jump.grad[j] = 0;
        stream_zero(grad_enc + j * D, D);
        stream_zero(grad_dec + j * D, D);
        continue;
      }
      grad_b[j] = bank.of_slot(j, start[end], enc.data(), dec.data());
      enc_square += square_of(enc.data(), D);
      dec_square += square_of(dec.data(), D);
      stream_out(grad_enc + j * D, enc.data(), D);
      stream_out(grad_dec + j * D, dec.data(), D);
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
  m.def("by_row(Tensor[] entries, int rows) -> (Tensor start, Tensor slot, Tensor entry)", &by_row);
  m.def("decode(Tensor W_dec, Tensor recon, Tensor z, Tensor[] by_row, bool unit_rows) -> (Tensor recon, float sp)",
        &decode);
  m.def(
      "backward(Tensor W_dec, Tensor x, Tensor g_recon, Tensor[] entries, float g_sp, bool unit_rows, float g_perp, "
      "Tensor[] correlation, Tensor? slopes, Tensor? threshold, float bandwidth, Tensor(a!)[] grads) "
      "-> (float enc_square, float dec_square)",
      &backward);
}
