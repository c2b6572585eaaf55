// Memory for gradients that is used again at every step: touching fresh pages costs more than writing the gradient.
// With each buffer goes the sum of squares of what a kernel wrote there, so that clipping needs no pass over the
// gradients.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <mutex>
#include <optional>
#include <vector>

namespace {
struct Buffer {
  c10::Storage storage;
  double square;
  int64_t version;  // of the tensor when `square` was noted; any later change in place raises it. -1: nothing noted
};

std::mutex guard;
std::vector<Buffer>& pool() {
  static auto* buffers = new std::vector<Buffer>;  // never destroyed: torch may be gone before us at exit
  return *buffers;
}

// An fp32 tensor, contents arbitrary, on a buffer that nothing else holds (the pool's own reference aside).
at::Tensor buffer(at::IntArrayRef size) {
  std::lock_guard<std::mutex> lock(guard);
  const size_t bytes = c10::multiply_integers(size) * sizeof(float);
  for (auto& held : pool())
    if (held.storage.use_count() == 1 && held.storage.nbytes() == bytes) {
      held.version = -1;
      return at::empty({0}, at::kFloat).set_(held.storage, 0, size);
    }
  at::Tensor fresh = at::empty(size, at::kFloat);
  pool().push_back({fresh.storage(), 0.0, -1});
  return fresh;
}

// Valid until the gradient changes or its buffer is used again; nothing is noted for memory that is not from here.
void note_square(const at::Tensor& gradient, double square) {
  std::lock_guard<std::mutex> lock(guard);
  for (auto& held : pool())
    if (held.storage.unsafeGetStorageImpl() == gradient.storage().unsafeGetStorageImpl()) {
      held.square = square;
      held.version = gradient._version();
    }
}

// The sum of squares noted for this gradient, if nothing has changed it since.
std::optional<double> noted_square(const at::Tensor& gradient) {
  std::lock_guard<std::mutex> lock(guard);
  for (auto& held : pool())
    if (held.storage.unsafeGetStorageImpl() == gradient.storage().unsafeGetStorageImpl() &&
        gradient.numel() * sizeof(float) == held.storage.nbytes() && held.version == gradient._version())
      return held.square;
  return std::nullopt;
}
}  // namespace

TORCH_LIBRARY_FRAGMENT(alignsae, m) {
  m.def("buffer(int[] size) -> Tensor", &buffer);
  m.def("note_square(Tensor(a!) gradient, float square) -> ()", &note_square);
  m.def("noted_square(Tensor gradient) -> float?", &noted_square);
}
