// AdamW in one pass over weights, gradients and moments, gradients scaled on the way.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {
using at::Tensor;

constexpr int64_t GRAIN = 1 << 14;

// What a step multiplies with, in the order of `Factors` in optimizer.py.
struct Factors {
  float b1, c1, b2, c2, decay, size, root, eps, scale;

  explicit Factors(at::ArrayRef<double> f)
      : b1(f.at(0)),
        c1(f.at(1)),
        b2(f.at(2)),
        c2(f.at(3)),
        decay(f.at(4)),
        size(f.at(5)),
        root(f.at(6)),
        eps(f.at(7)),
        scale(f.at(8)) {}
};

void check(const Tensor& parameter, const Tensor& gradient) {
  TORCH_CHECK(parameter.is_contiguous() && gradient.is_contiguous(), "AdamW needs contiguous weights and gradients");
}

// All tensors fp32 and contiguous; the update of torch.optim.AdamW with gradients `scale` * grad.
void adamw(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
           at::ArrayRef<double> factors) {
  const Factors f(factors);
  for (size_t t = 0; t < params.size(); ++t) {
    check(params[t], grads[t]);
    float* __restrict p = params[t].mutable_data_ptr<float>();
    const float* __restrict g = grads[t].const_data_ptr<float>();
    float* __restrict m = exp_avgs[t].mutable_data_ptr<float>();
    float* __restrict v = exp_avg_sqs[t].mutable_data_ptr<float>();
    at::parallel_for(0, params[t].numel(), GRAIN, [&](int64_t begin, int64_t end) {
      const Factors own = f;  // in registers, whatever the stores may alias
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) {
        const float grad = g[i] * own.scale;
        const float first = own.b1 * m[i] + own.c1 * grad, second = own.b2 * v[i] + own.c2 * grad * grad;
        m[i] = first;
        v[i] = second;
        p[i] = own.decay * p[i] - own.size * first / (std::sqrt(second) * own.root + own.eps);
      }
    });
  }
}

uint32_t mixed(uint32_t x) {  // `_mixed` of optimizer.py, which says what it is for
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

float widened(uint16_t bf16) {
  const uint32_t bits = uint32_t(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t rounded(float value, uint32_t noise) {  // 16 bits of noise, then cut off
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits + noise) >> 16;
}

// No fused multiply-add: the same step in PyTorch (optimizer.py) must give the same bits.
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
// m and v are bf16.
void update_bf16(float* __restrict p, const float* __restrict g, uint16_t* __restrict m, uint16_t* __restrict v,
                 int64_t begin, int64_t end, Factors f, uint32_t seed) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float grad = g[i] * f.scale;
    const float first = widened(m[i]) * f.b1 + grad * f.c1, second = widened(v[i]) * f.b2 + grad * grad * f.c2;
    const uint32_t noise = mixed(uint32_t(i) + seed);
    m[i] = rounded(first, noise & 0xffff);
    v[i] = rounded(second, noise >> 16);
    p[i] = p[i] * f.decay - first * f.size / (std::sqrt(second) * f.root + f.eps);
  }
}
#pragma GCC pop_options

// The same update with moments in bf16, rounded at random; in plain PyTorch it is `step_bf16` of optimizer.py.
void adamw_bf16(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                at::ArrayRef<double> factors, int64_t seed) {
  const Factors f(factors);
  for (size_t t = 0; t < params.size(); ++t) {
    check(params[t], grads[t]);
    float* p = params[t].mutable_data_ptr<float>();
    const float* g = grads[t].const_data_ptr<float>();
    auto *m = reinterpret_cast<uint16_t*>(exp_avgs[t].mutable_data_ptr<at::BFloat16>()),
         *v = reinterpret_cast<uint16_t*>(exp_avg_sqs[t].mutable_data_ptr<at::BFloat16>());
    at::parallel_for(0, params[t].numel(), GRAIN, [&](int64_t begin, int64_t end) {
      update_bf16(p, g, m, v, begin, end, f, static_cast<uint32_t>(seed));
    });
  }
}
}  // namespace

TORCH_LIBRARY_FRAGMENT(alignsae, m) {
  m.def(
      "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "float[] factors) -> ()",
      &adamw);
  m.def(
      "adamw_bf16(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "float[] factors, int seed) -> ()",
      &adamw_bf16);
}
