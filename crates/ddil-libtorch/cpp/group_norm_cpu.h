// Group normalisation of maps on the CPU whose channels lie side by side, and its gradients.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

namespace ddil {

struct GroupNorm {
  const at::Tensor* x;
  int64_t num_groups;
  // Null if there is none.
  const at::Tensor* weight;
  const at::Tensor* bias;
  const at::Tensor* offset;
  double eps;
  bool silu;

  std::array<const at::Tensor*, 4> tensors() const { return {x, weight, bias, offset}; }
};

// Whether what follows is for these tensors.
bool suits_group_norm_cpu(const GroupNorm& of);

// `silu((x + offset - mean) * rstd * weight + bias)`. `moments` takes mean and rstd of each group, `[batch, groups, 2]` of
// doubles, unless it is null.
at::Tensor group_norm_cpu(const GroupNorm& of, at::Tensor* moments);

// Gradients of `x`, weight, bias and offset, given that of the result; undefined for what there is not.
std::array<at::Tensor, 4> group_norm_cpu_backward(const GroupNorm& of, const at::Tensor& moments, const at::Tensor& gradient);

}  // namespace ddil
