// AdamW in one pass over weights, gradients and moments, gradients scaled on the way.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {
constexpr int64_t GRAIN = 1 << 14;

// All tensors fp32 and contiguous; the update of torch.optim.AdamW with gradients `scale` * grad, at step number `step`.
void adamw(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs, double step, double lr,
           double beta1, double beta2, double eps, double weight_decay, double scale) {
  const float decay = 1 - lr * weight_decay, b1 = beta1, b2 = beta2, c1 = 1 - beta1, c2 = 1 - beta2, s = scale, e = eps;
  const float size = lr / (1 - std::pow(beta1, step)), root = 1 / std::sqrt(1 - std::pow(beta2, step));
  for (size_t t = 0; t < params.size(); ++t) {
    TORCH_CHECK(grads[t].is_contiguous() && params[t].is_contiguous(), "adamw needs contiguous tensors");
    float* __restrict p = params[t].mutable_data_ptr<float>();
    const float* __restrict g = grads[t].const_data_ptr<float>();
    float *__restrict m = exp_avgs[t].mutable_data_ptr<float>(), *__restrict v = exp_avg_sqs[t].mutable_data_ptr<float>();
    at::parallel_for(0, params[t].numel(), GRAIN, [&](int64_t begin, int64_t end) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) {
        const float grad = g[i] * s;
        const float first = b1 * m[i] + c1 * grad, second = b2 * v[i] + c2 * grad * grad;
        m[i] = first;
        v[i] = second;
        p[i] = decay * p[i] - size * first / (std::sqrt(second) * root + e);
      }
    });
  }
}

uint32_t mixed(uint32_t x) {  // of optimizer.py, which says what it is for
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

float widened(uint16_t low) {
  const uint32_t bits = uint32_t(low) << 16;
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
struct Step {
  float b1, c1, b2, c2, decay, size, root, eps, scale;
  uint32_t seed;
};

void low_range(float* __restrict p, const float* __restrict g, uint16_t* __restrict m, uint16_t* __restrict v, int64_t begin, int64_t end, Step s) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float grad = g[i] * s.scale;
    const float first = widened(m[i]) * s.b1 + grad * s.c1, second = widened(v[i]) * s.b2 + grad * grad * s.c2;
    const uint32_t noise = mixed(uint32_t(i) + s.seed);
    m[i] = rounded(first, noise & 0xffff);
    v[i] = rounded(second, noise >> 16);
    p[i] = p[i] * s.decay - first * s.size / (std::sqrt(second) * s.root + s.eps);
  }
}
#pragma GCC pop_options

// The same update with moments in bf16, rounded at random; the numbers of a step are those of ScaledAdamW._low_step.
void adamw_low(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs, at::ArrayRef<double> numbers,
               int64_t seed) {
  TORCH_CHECK(numbers.size() == 9, "adamw_low needs nine numbers");
  const auto f = [&](int i) { return static_cast<float>(numbers[i]); };
  const Step step{f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), static_cast<uint32_t>(seed)};
  for (size_t t = 0; t < params.size(); ++t) {
    TORCH_CHECK(grads[t].is_contiguous() && params[t].is_contiguous(), "adamw_low needs contiguous tensors");
    float* p = params[t].mutable_data_ptr<float>();
    const float* g = grads[t].const_data_ptr<float>();
    auto *m = reinterpret_cast<uint16_t*>(exp_avgs[t].mutable_data_ptr<at::BFloat16>()),
         *v = reinterpret_cast<uint16_t*>(exp_avg_sqs[t].mutable_data_ptr<at::BFloat16>());
    at::parallel_for(0, params[t].numel(), GRAIN, [&](int64_t begin, int64_t end) { low_range(p, g, m, v, begin, end, step); });
  }
}
}  // namespace

TORCH_LIBRARY_FRAGMENT(alignsae, m) {
  m.def("adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, float step, float lr, float beta1, "
        "float beta2, float eps, float weight_decay, float scale) -> ()", &adamw);
  m.def("adamw_low(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, float[] numbers, int seed) -> ()",
        &adamw_low);
}
