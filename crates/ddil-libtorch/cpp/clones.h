// Vectorization attributes for the files that contain only loops.
#pragma once

#include <cstring>

// One build for every x86-64 machine; the loader selects the wider loop if the processor supports it.
#if !defined(DDIL_ONE_CLONE) && defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && (!defined(__clang__) || __clang_major__ >= 14)
#define DDIL_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DDIL_CLONES
#endif

// Iterations do not read what other iterations write, which the compiler cannot prove.
#if defined(__clang__)
#define DDIL_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define DDIL_INDEPENDENT _Pragma("GCC ivdep")
#endif

// Functions are compiled with the instruction set of the function they are inlined into.
#define DDIL_ALWAYS_INLINE __attribute__((always_inline))
#define DDIL_INLINE DDIL_ALWAYS_INLINE inline

namespace ddil {

template <typename To, typename From>
DDIL_INLINE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace ddil
