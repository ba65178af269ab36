#include "kernels.h"

#include "clones.h"

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

#define DDIL_RUN_FOUR(F, T)                                                                                 \
  DDIL_CLONES void run(const F<T>& f, T* out, const T* x, const T* y, const T* z, const T* w, int64_t n) {  \
    const F<T> g = f;                                                                                       \
    DDIL_INDEPENDENT                                                                                        \
    for (int64_t i = 0; i < n; ++i) out[i] = g(x[i], y[i], z[i], w[i]);                                     \
  }

namespace ddil {
DDIL_RUN_TWO(Affine, float)
DDIL_RUN_TWO(Affine, double)
DDIL_RUN_TWO(AffineClamped, float)
DDIL_RUN_TWO(AffineClamped, double)
DDIL_RUN_THREE(AffineNoise, float)
DDIL_RUN_THREE(AffineNoise, double)
DDIL_RUN_FOUR(AffineFour, float)
DDIL_RUN_FOUR(AffineFour, double)
}  // namespace ddil
