// Memory for gradients that is used again at every step: touching fresh pages costs more than writing the gradient.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <mutex>
#include <vector>

namespace {
std::mutex guard;
std::vector<c10::Storage>& pool() {
  static auto* buffers = new std::vector<c10::Storage>;  // never destroyed: torch may be gone before us at exit
  return *buffers;
}

// An fp32 tensor like `like`, contents arbitrary, on a buffer that nothing else holds (the pool's own reference aside).
at::Tensor buffer_like(const at::Tensor& like) {
  std::lock_guard<std::mutex> lock(guard);
  const size_t bytes = like.numel() * sizeof(float);
  for (auto& storage : pool())
    if (storage.use_count() == 1 && storage.nbytes() == bytes)
      return at::empty({0}, at::kFloat).set_(storage, 0, like.sizes(), like.strides());
  at::Tensor fresh = at::empty_like(like);
  pool().push_back(fresh.storage());
  return fresh;
}

// Gives back the buffers that nothing holds.
void release_buffers() {
  std::lock_guard<std::mutex> lock(guard);
  std::erase_if(pool(), [](const c10::Storage& s) { return s.use_count() == 1; });
}
}  // namespace

TORCH_LIBRARY_FRAGMENT(alignsae, m) {
  m.def("buffer_like", &buffer_like);
  m.def("release_buffers", &release_buffers);
}
