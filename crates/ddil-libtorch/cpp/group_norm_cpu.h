// Group normalization of channels-last maps on the CPU, and its gradients.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

namespace ddil {

struct GroupNorm {
  const at::Tensor* x;
  int64_t num_groups;
  // Null if absent.
  const at::Tensor* weight;
  const at::Tensor* bias;
  const at::Tensor* offset;
  double eps;
  bool silu;

  std::array<const at::Tensor*, 4> tensors() const { return {x, weight, bias, offset}; }
};

// Whether the functions below support these tensors.
bool suits_group_norm_cpu(const GroupNorm& of);

// `silu((x + offset - mean) * rstd * weight + bias)`. `moments` receives mean and rstd of each group, `[batch, groups, 2]` of
// doubles, unless it is null.
at::Tensor group_norm_cpu(const GroupNorm& of, at::Tensor* moments);

// Gradients of `x`, weight, bias and offset, given the gradient of the result; undefined for absent ones.
std::array<at::Tensor, 4> group_norm_cpu_backward(const GroupNorm& of, const at::Tensor& moments, const at::Tensor& gradient);

}  // namespace ddil
