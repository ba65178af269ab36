#include "kernels.h"

// The build stays one for every x86-64 machine; the loader picks the wider loop where the processor has it.
#if !defined(DDIL_ONE_CLONE) && defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && (!defined(__clang__) || __clang_major__ >= 14)
#define DDIL_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DDIL_CLONES
#endif

// `out` being an input is no dependence between turns of a loop, which the compiler cannot know.
#if defined(__clang__)
#define DDIL_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define DDIL_INDEPENDENT _Pragma("GCC ivdep")
#endif

#define DDIL_RUN_TWO(F, T)                                                             \
  DDIL_CLONES void run(const F<T>& f, T* out, const T* x, const T* y, int64_t n) {     \
    const F<T> g = f;                                                                  \
    DDIL_INDEPENDENT                                                                   \
    for (int64_t i = 0; i < n; ++i) out[i] = g(x[i], y[i]);                            \
  }

#define DDIL_RUN_THREE(F, T)                                                                             \
  DDIL_CLONES void run(const F<T>& f, T* out, const T* x, const T* y, const T* noise, int64_t n) {       \
    const F<T> g = f;                                                                                    \
    DDIL_INDEPENDENT                                                                                     \
    for (int64_t i = 0; i < n; ++i) out[i] = g(x[i], y[i], noise[i]);                                    \
  }

namespace ddil {
DDIL_RUN_TWO(Affine, float)
DDIL_RUN_TWO(Affine, double)
DDIL_RUN_TWO(AffineClamped, float)
DDIL_RUN_TWO(AffineClamped, double)
DDIL_RUN_THREE(AffineNoise, float)
DDIL_RUN_THREE(AffineNoise, double)
}  // namespace ddil
