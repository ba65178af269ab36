// Work on libtorch's own threads. ATen's `parallel_for` is compiled into its caller, and is a plain loop without OpenMP, of
// which there must not be a second copy in the process.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>

namespace ddil {

// Calls `body(begin, end)` for parts of 0 to n, in parallel if there are more than `grain`.
template <typename Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  grain = std::max<int64_t>(1, grain);
  if (n <= grain || at::get_num_threads() == 1 || at::in_parallel_region()) {
    if (n > 0) body(int64_t{0}, n);
    return;
  }
  // A TensorIterator over n bytes, which are never accessed, splits the range.
  const at::Tensor places = at::empty({n}, at::kByte);
  const auto* first = static_cast<const char*>(places.const_data_ptr());
  const auto part = [&](char** data, const int64_t*, int64_t size, int64_t rows) {
    const int64_t begin = data[0] - first;
    body(begin, begin + size * rows);
  };
  at::TensorIterator::borrowing_nullary_op(places).for_each(part, grain);
}

}  // namespace ddil
