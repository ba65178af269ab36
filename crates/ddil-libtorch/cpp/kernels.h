// One-pass loops over contiguous memory. `out` may be one of the inputs, but not overlap one partially.
#pragma once

#include <cstdint>

namespace ddil {

template <typename T>
struct Affine {
  T a, b;
  T operator()(T x, T y) const { return a * x + b * y; }
};

template <typename T>
struct AffineNoise {
  T a, b, c;
  T operator()(T x, T y, T noise) const { return a * x + b * y + c * noise; }
};

template <typename T>
struct AffineFour {
  T a, b, c, d;
  T operator()(T x, T y, T z, T w) const { return a * x + b * y + c * z + d * w; }
};

template <typename T>
struct AffineClamped {
  T a, b, lo, hi, c, d;
  T operator()(T x, T y) const {
    T inner = a * x + b * y;
    // Written so that a NaN stays one, as it does in libtorch's clamp.
    inner = inner < lo ? lo : inner;
    inner = hi < inner ? hi : inner;
    return c * x + d * inner;
  }
};

void run(const Affine<float>& f, float* out, const float* x, const float* y, int64_t n);
void run(const Affine<double>& f, double* out, const double* x, const double* y, int64_t n);
void run(const AffineClamped<float>& f, float* out, const float* x, const float* y, int64_t n);
void run(const AffineClamped<double>& f, double* out, const double* x, const double* y, int64_t n);
void run(const AffineNoise<float>& f, float* out, const float* x, const float* y, const float* noise, int64_t n);
void run(const AffineNoise<double>& f, double* out, const double* x, const double* y, const double* noise, int64_t n);
void run(const AffineFour<float>& f, float* out, const float* x, const float* y, const float* z, const float* w, int64_t n);
void run(const AffineFour<double>& f, double* out, const double* x, const double* y, const double* z, const double* w, int64_t n);

}  // namespace ddil
