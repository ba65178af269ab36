// Linear combinations of tensors: one pass on the CPU for the kinds that samplers use, ATen's own operations
// for everything else.
#include "kernels.h"
#include "shim.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/result_type.h>

#include <algorithm>
#include <array>
#include <utility>

using at::Tensor;

namespace {

template <size_t N>
using Inputs = std::array<const Tensor*, N>;

template <size_t N>
void check_inputs(const std::array<const char*, N>& names, const Inputs<N>& in) {
  for (size_t i = 0; i < N; ++i) TORCH_CHECK(in[i]->defined(), "`", names[i], "` is an undefined tensor");
  for (size_t i = 1; i < N; ++i) {
    TORCH_CHECK(in[i]->sizes() == in[0]->sizes(), "`", names[0], "` has shape ", in[0]->sizes(), ", but `", names[i], "` has shape ", in[i]->sizes());
    TORCH_CHECK(in[i]->device() == in[0]->device(), "`", names[0], "` is on ", in[0]->device(), ", but `", names[i], "` is on ", in[i]->device());
  }
}

// Everything that can fail in the second operation of a fall-back is checked before the first changes `x`.
template <size_t N>
void check_in_place(const std::array<const char*, N>& names, const Inputs<N>& in) {
  const Tensor& x = *in[0];
  TORCH_CHECK(!(at::GradMode::is_enabled() && x.requires_grad()), "`", names[0], "` requires a gradient and cannot be changed in place while gradients are recorded");
  TORCH_CHECK(!at::isIntegralType(x.scalar_type(), /*includeBool=*/true), "`", names[0], "` is ", x.scalar_type(), " and cannot store fractions");
  at::assert_no_internal_overlap(x);
  for (size_t i = 1; i < N; ++i) {
    const auto kind = at::result_type(x, *in[i]);
    TORCH_CHECK(at::canCast(kind, x.scalar_type()), "`", names[0], "` is ", x.scalar_type(), ", which cannot store the ", kind, " result of combining it with `", names[i], "`");
    at::assert_no_partial_overlap(x, *in[i]);
  }
}

template <size_t N>
bool records_gradient(const Inputs<N>& in) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor* t : in) {
    if (t->requires_grad()) return true;
  }
  return false;
}

// Whether a loop of the shim over these tensors computes the same as ATen's operations.
template <size_t N>
bool suits_one_pass(const Inputs<N>& in) {
  const auto kind = in[0]->scalar_type();
  if (kind != at::kFloat && kind != at::kDouble) return false;
  for (const Tensor* t : in) {
    const bool plain = t->is_cpu() && t->layout() == at::kStrided && !t->is_neg() && !t->_is_zerotensor();
    if (!plain || t->scalar_type() != kind) return false;
  }
  return !records_gradient(in);
}

template <typename T, typename F, size_t... I>
void run_row(const F& f, char* const* data, const int64_t* strides, int64_t n, std::index_sequence<I...>) {
  T* out = reinterpret_cast<T*>(data[0]);
  const bool dense = strides[0] == sizeof(T) && ((strides[I + 1] == sizeof(T)) && ...);
  if (dense) return ddil::run(f, out, reinterpret_cast<const T*>(data[I + 1])..., n);
  for (int64_t i = 0; i < n; ++i) {
    *reinterpret_cast<T*>(data[0] + i * strides[0]) = f(*reinterpret_cast<const T*>(data[I + 1] + i * strides[I + 1])...);
  }
}

// The iterator orders dimensions by storage, merges them and splits the work over libtorch's own threads.
template <typename T, typename F, size_t N>
Tensor one_pass(const F& f, const Tensor& out, const Inputs<N>& in) {
  at::NoGradGuard no_grad;
  at::TensorIteratorConfig config;
  config.add_output(out);
  for (const Tensor* t : in) config.add_const_input(*t);
  auto iterator = config.build();
  // As ATen's in-place operations do: autograd must see that a tensor it saved has changed.
  if (out.defined()) out.unsafeGetTensorImpl()->bump_version();
  iterator.for_each([&](char** data, const int64_t* strides, int64_t n, int64_t rows) {
    std::array<char*, N + 1> row;
    std::copy_n(data, N + 1, row.begin());
    for (int64_t r = 0; r < rows; ++r) {
      run_row<T>(f, row.data(), strides, n, std::make_index_sequence<N>{});
      for (size_t i = 0; i <= N; ++i) row[i] += strides[N + 1 + i];
    }
  });
  return iterator.output();
}

template <template <typename> class F, size_t N, typename... C>
Tensor one_pass_of_kind(const Tensor& out, const Inputs<N>& in, C... coefficients) {
  if (in[0]->scalar_type() == at::kFloat) return one_pass<float>(F<float>{static_cast<float>(coefficients)...}, out, in);
  return one_pass<double>(F<double>{coefficients...}, out, in);
}

Tensor plus(const Tensor& fresh, const Tensor& y, double b) {
  const bool in_place = !(at::GradMode::is_enabled() && (fresh.requires_grad() || y.requires_grad())) && fresh.scalar_type() == at::result_type(fresh, y);
  return in_place ? fresh.add_(y, b) : at::add(fresh, y, b);
}

Tensor affine(const Tensor& x, const Tensor& y, double a, double b) { return plus(at::mul(x, a), y, b); }

}  // namespace

// Whether no other tensor, view or saved variable shares the memory, which libtorch's own allocator gave.
DDIL_EXPORT bool ddil_is_sole_owner(const Tensor* x) noexcept {
  return x->defined() && x->use_count() == 1 && x->has_storage() && x->storage().use_count() == 1 && x->storage().resizable();
}

DDIL_EXPORT int ddil_affine(const Tensor* x, const Tensor* y, double a, double b, Tensor** out) noexcept {
  return ddil::guarded([&] {
    const Inputs<2> in{x, y};
    check_inputs<2>({"x", "y"}, in);
    *out = new Tensor(suits_one_pass(in) ? one_pass_of_kind<ddil::Affine>({}, in, a, b) : affine(*x, *y, a, b));
  });
}

DDIL_EXPORT int ddil_affine_in_place(const Tensor* x, const Tensor* y, double a, double b) noexcept {
  return ddil::guarded([&] {
    const Inputs<2> in{x, y};
    check_inputs<2>({"x", "y"}, in);
    check_in_place<2>({"x", "y"}, in);
    if (suits_one_pass(in)) {
      one_pass_of_kind<ddil::Affine>(*x, in, a, b);
    } else if (at::get_overlap_status(*x, *y) == at::MemOverlapStatus::No) {
      x->mul_(a).add_(*y, b);
    } else {
      // The multiplication would change `y` as well.
      x->copy_(affine(*x, *y, a, b));
    }
  });
}

DDIL_EXPORT int ddil_affine_noise(const Tensor* x, const Tensor* y, const Tensor* noise, double a, double b, double c, Tensor** out) noexcept {
  return ddil::guarded([&] {
    const Inputs<3> in{x, y, noise};
    check_inputs<3>({"x", "y", "noise"}, in);
    *out = new Tensor(suits_one_pass(in) ? one_pass_of_kind<ddil::AffineNoise>({}, in, a, b, c) : plus(affine(*x, *y, a, b), *noise, c));
  });
}

DDIL_EXPORT int ddil_affine_noise_in_place(const Tensor* x, const Tensor* y, const Tensor* noise, double a, double b, double c) noexcept {
  return ddil::guarded([&] {
    const Inputs<3> in{x, y, noise};
    check_inputs<3>({"x", "y", "noise"}, in);
    check_in_place<3>({"x", "y", "noise"}, in);
    if (suits_one_pass(in)) {
      one_pass_of_kind<ddil::AffineNoise>(*x, in, a, b, c);
    } else {
      x->copy_(plus(affine(*x, *y, a, b), *noise, c));
    }
  });
}

DDIL_EXPORT int ddil_affine_four(const Tensor* x, const Tensor* y, const Tensor* z, const Tensor* w, double a, double b, double c, double d, Tensor** out) noexcept {
  return ddil::guarded([&] {
    const Inputs<4> in{x, y, z, w};
    check_inputs<4>({"x", "y", "z", "w"}, in);
    *out = new Tensor(suits_one_pass(in) ? one_pass_of_kind<ddil::AffineFour>({}, in, a, b, c, d) : plus(plus(affine(*x, *y, a, b), *z, c), *w, d));
  });
}

DDIL_EXPORT int ddil_affine_four_in_place(const Tensor* x, const Tensor* y, const Tensor* z, const Tensor* w, double a, double b, double c, double d) noexcept {
  return ddil::guarded([&] {
    const Inputs<4> in{x, y, z, w};
    check_inputs<4>({"x", "y", "z", "w"}, in);
    check_in_place<4>({"x", "y", "z", "w"}, in);
    if (suits_one_pass(in)) {
      one_pass_of_kind<ddil::AffineFour>(*x, in, a, b, c, d);
    } else {
      x->copy_(plus(plus(affine(*x, *y, a, b), *z, c), *w, d));
    }
  });
}

DDIL_EXPORT int ddil_affine_clamped(const Tensor* x, const Tensor* y, double a, double b, double lo, double hi, double c, double d, Tensor** out) noexcept {
  return ddil::guarded([&] {
    const Inputs<2> in{x, y};
    check_inputs<2>({"x", "y"}, in);
    *out = new Tensor(suits_one_pass(in) ? one_pass_of_kind<ddil::AffineClamped>({}, in, a, b, lo, hi, c, d)
                                         : affine(*x, at::clamp(affine(*x, *y, a, b), lo, hi), c, d));
  });
}

DDIL_EXPORT int ddil_affine_clamped_in_place(const Tensor* x, const Tensor* y, double a, double b, double lo, double hi, double c, double d) noexcept {
  return ddil::guarded([&] {
    const Inputs<2> in{x, y};
    check_inputs<2>({"x", "y"}, in);
    check_in_place<2>({"x", "y"}, in);
    if (suits_one_pass(in)) {
      one_pass_of_kind<ddil::AffineClamped>(*x, in, a, b, lo, hi, c, d);
    } else {
      const Tensor clamped = at::clamp(affine(*x, *y, a, b), lo, hi);
      x->copy_(affine(*x, clamped, c, d));
    }
  });
}
