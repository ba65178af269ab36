// Shared by every file of the shim: the required version, and the barrier that no C++ exception passes.
#pragma once

#include <c10/util/Exception.h>
#include <torch/version.h>

#include <exception>
#include <utility>

#if TORCH_VERSION_MAJOR != 2 || TORCH_VERSION_MINOR != 13
#error "ddil-libtorch requires libtorch 2.13, the version of tch 0.26; LIBTORCH points to another one"
#endif

#define DDIL_EXPORT extern "C"

namespace ddil {

// Stores `message` for this thread until the next failure.
void set_last_error(const char* message) noexcept;

// Runs `body`; 0 if it returned, 1 if it threw, with the reason kept for `ddil_last_error`. `noexcept` makes
// an exception thrown past the handlers an abort instead of undefined behaviour in Rust.
template <typename Body>
int guarded(Body&& body) noexcept {
  try {
    std::forward<Body>(body)();
    return 0;
  } catch (const c10::Error& error) {
    set_last_error(error.what_without_backtrace());
  } catch (const std::exception& error) {
    set_last_error(error.what());
  } catch (...) {
    set_last_error("a C++ exception of unknown type");
  }
  return 1;
}

}  // namespace ddil
