// Group normalization with an offset before it and SiLU after it: one operation with its own gradient for channels-last maps
// on the CPU. ATen's operations for everything else, which are as fast for contiguous maps.
#include "group_norm_cpu.h"
#include "shim.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/silu.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

using at::Tensor;
using ddil::GroupNorm;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

Tensor with_offset(const Tensor& x, const Tensor& offset) {
  std::vector<int64_t> shape(x.dim(), 1);
  std::copy_n(offset.sizes().begin(), 2, shape.begin());
  return at::add(x, offset.view(shape));
}

std::optional<Tensor> optional(const Tensor* t) { return t == nullptr ? std::nullopt : std::optional<Tensor>(*t); }

// libtorch's operation, which also reports errors in weights and groups.
Tensor several_operations(const GroupNorm& of) {
  const Tensor x = of.offset == nullptr ? *of.x : with_offset(*of.x, *of.offset);
  const Tensor normed = at::group_norm(x, of.num_groups, optional(of.weight), optional(of.bias), of.eps, /*cudnn_enabled=*/true);
  return of.silu ? at::silu(normed) : normed;
}

// The inputs of the gradient.
struct Kept {
  Kept(AutogradContext& context, const variable_list& saved)
      : num_groups(context.saved_data["num_groups"].toInt()), eps(context.saved_data["eps"].toDouble()), silu(context.saved_data["silu"].toBool()) {
    std::copy_n(saved.begin(), tensors.size(), tensors.begin());
  }

  GroupNorm face() const {
    const auto at = [&](size_t i) { return tensors[i].defined() ? &tensors[i] : nullptr; };
    return {&tensors[0], num_groups, at(1), at(2), at(3), eps, silu};
  }

  std::array<Tensor, 4> tensors;
  int64_t num_groups;
  double eps;
  bool silu;
};

// As part of the graph, so that it can be differentiated again: through ATen's operations.
std::array<Tensor, 4> differentiable_gradients(Kept kept, const Tensor& gradient) {
  variable_list wanted;
  std::vector<size_t> places;
  for (size_t i = 0; i < kept.tensors.size(); ++i) {
    Tensor& t = kept.tensors[i];
    if (!t.defined() || !t.requires_grad()) continue;
    // A node that no other path passes through: `x` itself may depend on the weight.
    t = t.view_as(t);
    wanted.push_back(t);
    places.push_back(i);
  }
  const auto found = torch::autograd::grad({several_operations(kept.face())}, wanted, {gradient}, /*retain_graph=*/true, /*create_graph=*/true);
  std::array<Tensor, 4> all;
  for (size_t i = 0; i < found.size(); ++i) all[places[i]] = found[i];
  return all;
}

struct RecordedGroupNorm : torch::autograd::Function<RecordedGroupNorm> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& offset, int64_t num_groups, double eps, bool silu) {
    const auto pointer = [](const std::optional<Tensor>& t) { return t ? &*t : nullptr; };
    const GroupNorm of{&x, num_groups, pointer(weight), pointer(bias), pointer(offset), eps, silu};
    Tensor moments;
    Tensor y = ddil::group_norm_cpu(of, &moments);
    const auto or_undefined = [](const std::optional<Tensor>& t) { return t.value_or(Tensor()); };
    context->save_for_backward({x, or_undefined(weight), or_undefined(bias), or_undefined(offset), moments});
    context->saved_data["num_groups"] = num_groups;
    context->saved_data["eps"] = eps;
    context->saved_data["silu"] = silu;
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    const Kept kept(*context, saved);
    const auto found = at::GradMode::is_enabled() ? differentiable_gradients(kept, gradients[0])
                                                  : ddil::group_norm_cpu_backward(kept.face(), saved[4], gradients[0]);
    return {found[0], found[1], found[2], found[3], Tensor(), Tensor(), Tensor()};
  }
};

bool is_recorded(const GroupNorm& of) {
  const auto tensors = of.tensors();
  return at::GradMode::is_enabled() && std::any_of(tensors.begin(), tensors.end(), [](const Tensor* t) { return t != nullptr && t->requires_grad(); });
}

Tensor group_norm(const GroupNorm& of) {
  if (!ddil::suits_group_norm_cpu(of)) return several_operations(of);
  if (!is_recorded(of)) return ddil::group_norm_cpu(of, /*moments=*/nullptr);
  return RecordedGroupNorm::apply(*of.x, optional(of.weight), optional(of.bias), optional(of.offset), of.num_groups, of.eps, of.silu);
}

void check_arguments(const GroupNorm& of) {
  constexpr std::array<const char*, 4> names{"x", "weight", "bias", "offset"};
  const auto tensors = of.tensors();
  for (size_t i = 0; i < names.size(); ++i) {
    TORCH_CHECK(tensors[i] == nullptr || tensors[i]->defined(), "`", names[i], "` is an undefined tensor");
  }
  const Tensor& x = *of.x;
  TORCH_CHECK(x.dim() >= 2, "`x` has shape ", x.sizes(), ", but must have a batch and channels");
  if (of.offset == nullptr) return;
  const Tensor& offset = *of.offset;
  TORCH_CHECK(offset.sizes() == x.sizes().slice(0, 2), "`offset` has shape ", offset.sizes(), ", but `x` of shape ", x.sizes(), " requires ", x.sizes().slice(0, 2));
  TORCH_CHECK(offset.device() == x.device(), "`x` is on ", x.device(), ", but `offset` is on ", offset.device());
}

}  // namespace

DDIL_EXPORT int ddil_group_norm(const Tensor* x, int64_t num_groups, const Tensor* weight, const Tensor* bias, const Tensor* offset, double eps, bool silu,
                                Tensor** out) noexcept {
  return ddil::guarded([&] {
    const GroupNorm of{x, num_groups, weight, bias, offset, eps, silu};
    check_arguments(of);
    *out = new Tensor(group_norm(of));
  });
}
