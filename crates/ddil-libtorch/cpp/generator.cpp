// Random generators with their own state, and the state of the default generators. A device is a CUDA index, or -1 for
// the CPU.
#include "normal.h"
#include "shim.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randperm.h>

#include <cstdint>
#include <mutex>

using at::Generator;
using at::Tensor;

namespace {

at::Device device_of(int index) {
  return index < 0 ? at::Device(at::kCPU) : at::Device(at::kCUDA, static_cast<at::DeviceIndex>(index));
}

Generator make_generator(const at::Device& device, uint64_t seed) {
  if (device.is_cpu()) return at::detail::createCPUGenerator(seed);
  auto& context = at::globalContext();
  context.lazyInitDevice(device.type());
  Generator generator = context.getAcceleratorHooksInterface(device.type()).getNewGenerator(device.index());
  generator.set_current_seed(seed);
  return generator;
}

// libtorch accepts a state that claims more words than it contains, and would read past its end.
void set_state(Generator& generator, const Tensor& state) {
  if (generator.device().is_cpu()) {
    Generator copy = generator.clone();
    copy.set_state(state);
    const at::mt19937_data_pod words = at::check_generator<at::CPUGeneratorImpl>(copy)->engine().data();
    TORCH_CHECK(static_cast<int64_t>(words.next_) + words.left_ - 1 <= at::MERSENNE_STATE_N, "the state is damaged: ", words.left_ - 1, " words are left from word ", words.next_, ", but there are ", at::MERSENNE_STATE_N);
  }
  generator.set_state(state);
}

Tensor empty_for(const Generator& generator, const int64_t* shape, size_t rank, int kind) {
  const auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(kind)).device(generator.device());
  return at::empty(at::IntArrayRef(shape, rank), options);
}

}  // namespace

DDIL_EXPORT int ddil_generator_new(int device, uint64_t seed, Generator** out) noexcept {
  return ddil::guarded([&] { *out = new Generator(make_generator(device_of(device), seed)); });
}

DDIL_EXPORT void ddil_generator_free(Generator* generator) noexcept { delete generator; }

DDIL_EXPORT int ddil_generator_state(const Generator* generator, Tensor** out) noexcept {
  return ddil::guarded([&] { *out = new Tensor(generator->get_state()); });
}

DDIL_EXPORT int ddil_generator_set_state(Generator* generator, const Tensor* state) noexcept {
  return ddil::guarded([&] { set_state(*generator, *state); });
}

DDIL_EXPORT int ddil_generator_normal(Generator* generator, const int64_t* shape, size_t rank, int kind, Tensor** out) noexcept {
  return ddil::guarded([&] {
    at::NoGradGuard no_grad;
    const Tensor numbers = empty_for(*generator, shape, rank, kind);
    ddil::fill_normal(numbers, *generator);
    *out = new Tensor(numbers);
  });
}

DDIL_EXPORT int ddil_generator_fill_normal(Generator* generator, const Tensor* tensor) noexcept {
  return ddil::guarded([&] {
    TORCH_CHECK(tensor->defined(), "`tensor` is an undefined tensor");
    ddil::fill_normal(*tensor, *generator);
  });
}

DDIL_EXPORT int ddil_fills_normal_itself(bool* out) noexcept {
  return ddil::guarded([&] { *out = ddil::fills_normal_itself(); });
}

DDIL_EXPORT int ddil_generator_uniform(Generator* generator, const int64_t* shape, size_t rank, int kind, Tensor** out) noexcept {
  return ddil::guarded([&] {
    at::NoGradGuard no_grad;
    *out = new Tensor(empty_for(*generator, shape, rank, kind).uniform_(0.0, 1.0, *generator));
  });
}

DDIL_EXPORT int ddil_generator_randint(Generator* generator, int64_t low, int64_t high, const int64_t* shape, size_t rank, Tensor** out) noexcept {
  return ddil::guarded([&] {
    at::NoGradGuard no_grad;
    const Tensor whole = empty_for(*generator, shape, rank, static_cast<int>(at::kLong));
    *out = new Tensor(whole.random_(low, high, *generator));
  });
}

DDIL_EXPORT int ddil_generator_randperm(Generator* generator, int64_t n, Tensor** out) noexcept {
  return ddil::guarded([&] {
    const auto options = at::TensorOptions().dtype(at::kLong).device(generator->device());
    *out = new Tensor(at::randperm(n, *generator, options));
  });
}

DDIL_EXPORT int ddil_default_generator_state(int device, Tensor** out) noexcept {
  return ddil::guarded([&] {
    Generator generator = at::globalContext().defaultGenerator(device_of(device));
    std::lock_guard<std::mutex> lock(generator.mutex());
    *out = new Tensor(generator.get_state());
  });
}

DDIL_EXPORT int ddil_default_generator_set_state(int device, const Tensor* state) noexcept {
  return ddil::guarded([&] {
    Generator generator = at::globalContext().defaultGenerator(device_of(device));
    std::lock_guard<std::mutex> lock(generator.mutex());
    set_state(generator, *state);
  });
}
