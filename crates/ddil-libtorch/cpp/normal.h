// Standard normal numbers: libtorch's, bit for bit, drawn faster on the CPU.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

namespace ddil {

// As `tensor.normal_(0, 1, generator)`: the same numbers, and the generator ends in the same state.
void fill_normal(const at::Tensor& tensor, const at::Generator& generator);

// Whether float32 tensors on the CPU are filled by the loops of the shim. They are if the processor has the
// instructions and the bits equal libtorch's, which is checked once per process.
bool fills_normal_itself();

}  // namespace ddil
