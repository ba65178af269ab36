// Lists of tensors kept on the C++ side, and the operations over whole lists.
#include "shim.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_lerp.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_foreach_zero.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

using at::Tensor;
using List = std::vector<Tensor>;

namespace {

void check_length(const char* name, const List& list, const List& like) {
  TORCH_CHECK(list.size() == like.size(), "`", name, "` has ", list.size(), " tensors; expected ", like.size());
}

// libtorch checks tensor by tensor, after it has changed the earlier ones: all are checked here first.
void check_like(const char* name, const List& list, const List& like) {
  check_length(name, list, like);
  for (size_t i = 0; i < list.size(); ++i) {
    const Tensor &a = list[i], &b = like[i];
    TORCH_CHECK(a.sizes() == b.sizes(), "`", name, "` [", i, "] has shape ", a.sizes(), "; expected ", b.sizes());
    TORCH_CHECK(a.scalar_type() == b.scalar_type(), "`", name, "` [", i, "] is ", a.scalar_type(), "; expected ", b.scalar_type());
    TORCH_CHECK(a.device() == b.device(), "`", name, "` [", i, "] is on ", a.device(), "; expected ", b.device());
    TORCH_CHECK(a.layout() == b.layout(), "`", name, "` [", i, "] is ", a.layout(), "; expected ", b.layout());
  }
}

void check_steps(const List& steps, const List& params) {
  check_length("steps", steps, params);
  for (size_t i = 0; i < steps.size(); ++i) {
    TORCH_CHECK(steps[i].numel() == 1 && steps[i].scalar_type() == at::kFloat, "`steps` [", i, "] is ", steps[i].scalar_type(), " of shape ", steps[i].sizes(), "; expected one Float");
    TORCH_CHECK(steps[i].device() == params[i].device(), "`steps` [", i, "] is on ", steps[i].device(), ", its parameter on ", params[i].device());
  }
}

// The fused kernels process all four lists in storage order and ignore strides.
void check_storage_order(const char* name, const List& list, const List& params) {
  for (size_t i = 0; i < list.size(); ++i) {
    TORCH_CHECK(list[i].strides() == params[i].strides(), "`", name, "` [", i, "] has strides ", list[i].strides(), ", its parameter ", params[i].strides());
  }
}

List in_storage_order_of(const List& params, const List& grads) {
  List ordered;
  ordered.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const bool same = grads[i].strides() == params[i].strides();
    ordered.push_back(same ? grads[i] : at::empty_like(params[i]).copy_(grads[i]));
  }
  return ordered;
}

Tensor norm_of(const List& list) {
  if (list.empty()) return at::zeros({}, at::kFloat);
  List norms = at::_foreach_norm(list, 2);
  for (Tensor& norm : norms) norm = norm.to(norms.front().device());
  return at::linalg_vector_norm(at::stack(norms), 2);
}

void scale(const List& list, const Tensor& factor) {
  std::vector<std::pair<at::Device, List>> by_device;
  for (const Tensor& tensor : list) {
    auto same = [&](const auto& group) { return group.first == tensor.device(); };
    auto group = std::find_if(by_device.begin(), by_device.end(), same);
    if (group == by_device.end()) group = by_device.insert(group, {tensor.device(), List()});
    group->second.push_back(tensor);
  }
  for (const auto& [device, tensors] : by_device) at::_foreach_mul_(tensors, factor.to(device));
}

}  // namespace

DDIL_EXPORT int ddil_list_new(List** out) noexcept {
  return ddil::guarded([&] { *out = new List(); });
}

DDIL_EXPORT void ddil_list_free(List* list) noexcept { delete list; }

DDIL_EXPORT size_t ddil_list_len(const List* list) noexcept { return list->size(); }

DDIL_EXPORT int ddil_list_push(List* list, const Tensor* tensor) noexcept {
  return ddil::guarded([&] {
    TORCH_CHECK(tensor->defined(), "the tensor at index ", list->size(), " is undefined");
    list->push_back(*tensor);
  });
}

DDIL_EXPORT int ddil_list_get(const List* list, size_t index, Tensor** out) noexcept {
  return ddil::guarded([&] { *out = new Tensor(list->at(index)); });
}

DDIL_EXPORT int ddil_list_zeros_like(const List* list, List** out) noexcept {
  return ddil::guarded([&] {
    at::NoGradGuard no_grad;
    auto zeros = std::make_unique<List>();
    for (const Tensor& tensor : *list) zeros->push_back(at::zeros_like(tensor));
    *out = zeros.release();
  });
}

DDIL_EXPORT int ddil_list_steps(const List* list, List** out) noexcept {
  return ddil::guarded([&] {
    auto steps = std::make_unique<List>();
    for (const Tensor& tensor : *list) {
      steps->push_back(at::zeros({}, at::TensorOptions().dtype(at::kFloat).device(tensor.device())));
    }
    *out = steps.release();
  });
}

// `missing` is the index of the first tensor without a gradient, or -1; then `out` is not written.
DDIL_EXPORT int ddil_list_grads(const List* list, int64_t* missing, List** out) noexcept {
  return ddil::guarded([&] {
    *missing = -1;
    auto grads = std::make_unique<List>();
    for (const Tensor& tensor : *list) {
      if (!tensor.grad().defined()) {
        *missing = static_cast<int64_t>(grads->size());
        return;
      }
      grads->push_back(tensor.grad());
    }
    *out = grads.release();
  });
}

DDIL_EXPORT int ddil_drop_grads(const List* list) noexcept {
  return ddil::guarded([&] {
    for (const Tensor& tensor : *list) tensor.mutable_grad().reset();
  });
}

DDIL_EXPORT int ddil_foreach_lerp(const List* list, const List* targets, double weight) noexcept {
  return ddil::guarded([&] {
    at::NoGradGuard no_grad;
    check_like("targets", *targets, *list);
    if (!list->empty()) at::_foreach_lerp_(*list, *targets, weight);
  });
}

DDIL_EXPORT int ddil_foreach_zero(const List* list) noexcept {
  return ddil::guarded([&] {
    at::NoGradGuard no_grad;
    if (!list->empty()) at::_foreach_zero_(*list);
  });
}

DDIL_EXPORT int ddil_grad_norm(const List* list, Tensor** out) noexcept {
  return ddil::guarded([&] {
    at::NoGradGuard no_grad;
    *out = new Tensor(norm_of(*list));
  });
}

DDIL_EXPORT int ddil_clip_grad_norm(const List* list, double max_norm, Tensor** out) noexcept {
  return ddil::guarded([&] {
    at::NoGradGuard no_grad;
    Tensor norm = norm_of(*list);
    Tensor coefficient = norm.add(1e-6).reciprocal().mul(max_norm).clamp_max(1.0);
    // Reading the coefficient needs no synchronization on the CPU, and saves a pass over all gradients.
    const bool nothing_to_do = norm.is_cpu() && coefficient.item<double>() == 1.0;
    if (!nothing_to_do) scale(*list, coefficient);
    *out = new Tensor(norm);
  });
}

DDIL_EXPORT int ddil_fused_adamw(
    const List* params, const List* grads, const List* exp_avgs, const List* exp_avg_sqs, const List* steps,
    double lr, double beta1, double beta2, double weight_decay, double eps) noexcept {
  return ddil::guarded([&] {
    at::NoGradGuard no_grad;
    check_like("grads", *grads, *params);
    check_like("exp_avgs", *exp_avgs, *params);
    check_like("exp_avg_sqs", *exp_avg_sqs, *params);
    check_steps(*steps, *params);
    if (params->empty()) return;
    for (size_t i = 0; i < params->size(); ++i) {
      TORCH_CHECK((*params)[i].is_non_overlapping_and_dense(), "`params` [", i, "] has gaps or overlaps in memory");
      TORCH_CHECK(at::isFloatingType((*params)[i].scalar_type()), "`params` [", i, "] is ", (*params)[i].scalar_type(), ", not a floating point kind");
    }
    check_storage_order("exp_avgs", *exp_avgs, *params);
    check_storage_order("exp_avg_sqs", *exp_avg_sqs, *params);
    const List ordered = in_storage_order_of(*params, *grads);
    at::_foreach_add_(*steps, 1);
    at::_fused_adamw_(*params, ordered, *exp_avgs, *exp_avg_sqs, {}, *steps, lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false);
  });
}
