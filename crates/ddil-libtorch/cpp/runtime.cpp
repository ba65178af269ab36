// Memory formats, tensors over foreign memory, and the settings of the process.
#include "shim.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/from_blob.h>

#include <cstdint>
#include <memory>
#include <string>

#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <unistd.h>
#endif

using at::Tensor;

// `format` is c10's index of a memory format.
DDIL_EXPORT int ddil_to_memory_format(const Tensor* tensor, int format, Tensor** out) noexcept {
  return ddil::guarded([&] { *out = new Tensor(tensor->contiguous(static_cast<at::MemoryFormat>(format))); });
}

DDIL_EXPORT int ddil_has_memory_format(const Tensor* tensor, int format, bool* out) noexcept {
  return ddil::guarded([&] { *out = tensor->is_contiguous(static_cast<at::MemoryFormat>(format)); });
}

// A tensor over `data`; `release(owner)` is called once, when the last tensor over it is dropped or if creating it fails.
DDIL_EXPORT int ddil_from_blob(
    void* data, const int64_t* shape, size_t rank, int kind, void* owner, void (*release)(void*), Tensor** out) noexcept {
  return ddil::guarded([&] {
    std::shared_ptr<void> keeper(owner, release);
    const auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(kind));
    *out = new Tensor(at::from_blob(data, at::IntArrayRef(shape, rank), [keeper](void*) {}, options));
  });
}

DDIL_EXPORT bool ddil_keep_freed_pages() noexcept {
#if defined(__GLIBC__)
  const bool threshold = mallopt(M_MMAP_THRESHOLD, 1 << 30) == 1;
  const bool trim = mallopt(M_TRIM_THRESHOLD, -1) == 1;  // -1: never
  const bool pad = mallopt(M_TOP_PAD, 64 << 20) == 1;
  return threshold && trim && pad;
#else
  return false;
#endif
}

DDIL_EXPORT int ddil_num_threads(int* out) noexcept {
  return ddil::guarded([&] { *out = at::get_num_threads(); });
}

DDIL_EXPORT int ddil_set_num_threads(int n) noexcept {
  return ddil::guarded([&] { at::set_num_threads(n); });
}

DDIL_EXPORT int ddil_num_interop_threads(int* out) noexcept {
  return ddil::guarded([&] { *out = static_cast<int>(at::get_num_interop_threads()); });
}

DDIL_EXPORT int ddil_set_num_interop_threads(int n) noexcept {
  return ddil::guarded([&] { at::set_num_interop_threads(n); });
}

DDIL_EXPORT int ddil_set_deterministic(bool on) noexcept {
  return ddil::guarded([&] {
    auto& context = at::globalContext();
    context.setDeterministicAlgorithms(on, /*warn_only=*/false);
    // It would fill every new tensor, which is useless where nothing reads uninitialized memory.
    context.setDeterministicFillUninitializedMemory(false);
    if (on) context.setBenchmarkCuDNN(false);
  });
}

DDIL_EXPORT const char* ddil_version() noexcept { return TORCH_VERSION; }

// Whether libtorch_cuda is loaded: it registers itself here. at::hasCUDA also requires a device.
DDIL_EXPORT bool ddil_has_cuda() noexcept {
  bool has = false;
  ddil::guarded([&] { has = at::CUDAHooksRegistry()->Has("CUDAHooks"); });
  return has;
}

DDIL_EXPORT int ddil_cuda_device_count(int64_t* out) noexcept {
  return ddil::guarded([&] { *out = at::hasCUDA() ? static_cast<int64_t>(at::getNumGPUs()) : 0; });
}

#if defined(__linux__)
namespace {
int find_libtorch(dl_phdr_info* info, size_t, void* folder) {
  const std::string path = info->dlpi_name == nullptr ? "" : info->dlpi_name;
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos || path.compare(slash + 1, 14, "libtorch_cpu.s") != 0) return 0;
  *static_cast<std::string*>(folder) = path.substr(0, slash);
  return 1;
}
}  // namespace
#endif

// Whether libtorch_cuda is in the folder that libtorch_cpu was loaded from.
DDIL_EXPORT bool ddil_cuda_library_installed() noexcept {
  bool installed = false;
#if defined(__linux__)
  ddil::guarded([&] {
    std::string folder;
    dl_iterate_phdr(find_libtorch, &folder);
    installed = !folder.empty() && access((folder + "/libtorch_cuda.so").c_str(), F_OK) == 0;
  });
#endif
  return installed;
}

// Whether the driver's own library can be loaded.
DDIL_EXPORT bool ddil_cuda_driver_installed() noexcept {
#if defined(__linux__)
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (driver == nullptr) return false;
  dlclose(driver);
  return true;
#else
  return false;
#endif
}
