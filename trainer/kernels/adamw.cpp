// AdamW in one pass over weights, gradients and moments, gradients scaled on the way; and the sum of squares of gradients.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>

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

double square_sum(const at::Tensor& tensor) {
  const at::Tensor whole = tensor.contiguous();
  const float* x = whole.const_data_ptr<float>();
  return at::parallel_reduce(
      int64_t{0}, whole.numel(), GRAIN, 0.0,
      [&](int64_t begin, int64_t end, double sum) {
        for (int64_t i = begin; i < end; i += 4096) {  // in fp32 for a while, then in double
          float part = 0;
#pragma omp simd reduction(+ : part)
          for (int64_t k = i; k < std::min(i + 4096, end); ++k) part += x[k] * x[k];
          sum += part;
        }
        return sum;
      },
      std::plus<double>());
}
}  // namespace

TORCH_LIBRARY_FRAGMENT(alignsae, m) {
  m.def("adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, float step, float lr, float beta1, "
        "float beta2, float eps, float weight_decay, float scale) -> ()", &adamw);
  m.def("square_sum", &square_sum);
}
