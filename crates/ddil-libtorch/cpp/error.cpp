#include "shim.h"

#include <string>

namespace {
thread_local std::string last_error;
}

void ddil::set_last_error(const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
}

DDIL_EXPORT const char* ddil_last_error() noexcept { return last_error.c_str(); }
