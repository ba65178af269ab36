// Autocast of one kind of device on this thread.
#include "shim.h"

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>

namespace {
at::DeviceType device_type(bool cuda) { return cuda ? at::kCUDA : at::kCPU; }
}  // namespace

DDIL_EXPORT int ddil_autocast_push(bool cuda, bool enable, int kind, bool* was_enabled, int* previous_kind) noexcept {
  return ddil::guarded([&] {
    const auto device = device_type(cuda);
    TORCH_CHECK(!cuda || at::hasCUDA(), "this libtorch was built without CUDA");
    *was_enabled = at::autocast::is_autocast_enabled(device);
    *previous_kind = static_cast<int>(at::autocast::get_autocast_dtype(device));
    if (enable) at::autocast::set_autocast_dtype(device, static_cast<at::ScalarType>(kind));
    at::autocast::set_autocast_enabled(device, enable);
    at::autocast::increment_nesting();
  });
}

DDIL_EXPORT int ddil_autocast_pop(bool cuda, bool was_enabled, int previous_kind) noexcept {
  return ddil::guarded([&] {
    const auto device = device_type(cuda);
    // The cache holds low-precision copies of weights, which the next optimizer step makes stale.
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_dtype(device, static_cast<at::ScalarType>(previous_kind));
    at::autocast::set_autocast_enabled(device, was_enabled);
  });
}
