// Loops of group normalization over rows of adjacent columns, each column independent.
#pragma once

#include <cstdint>

namespace ddil {

// Storage type of a value. Arithmetic is always in float.
struct Float32 {
  using Stored = float;
};
struct BFloat16 {
  using Stored = uint16_t;
};
struct Float16 {
  using Stored = uint16_t;
};

// Sum, and sum of squares, of the distances of a column's values from its pivot. The pivot is the mean of the first few
// rows, close enough to the mean of all to avoid cancellation.
struct ColumnSums {
  float* pivot;
  float* sum;
  float* squares;
};

// Mean of each column, and sum of the squared distances from it.
struct ColumnMoments {
  double* mean;
  double* squares;
};

// The coefficients of each column's `y = (x - center) * scale + shift`.
struct ColumnFactors {
  const float* center;
  const float* scale;
  const float* shift;
};

// Further coefficients of the gradient: z = (x - center) * rstd is the normalized value, and the gradient of `x` is scale
// times that of `y`, less z * slope + intercept.
struct GradientFactors {
  ColumnFactors of_y;
  const float* rstd;
  const float* slope;
  const float* intercept;
};

// Sums of each column: of the gradients of `y`, of these times z, and of z.
template <typename T>
struct GradientSums {
  T* gradient;
  T* product;
  T* normalised;
};

void sum_rows(Float32 kind, const float* x, int64_t rows, int64_t columns, const ColumnSums& sums);
void sum_rows(BFloat16 kind, const uint16_t* x, int64_t rows, int64_t columns, const ColumnSums& sums);
void sum_rows(Float16 kind, const uint16_t* x, int64_t rows, int64_t columns, const ColumnSums& sums);

// Turns the sums over `rows` rows into moments; false if a sum exceeds the range of float.
bool moments_of_sums(int64_t rows, int64_t columns, const ColumnSums& sums, const ColumnMoments& moments);

// Adds the moments of `rows` more rows to those of `before`: Chan, Golub and LeVeque 1983, equation 2.1.
void merge_moments(int64_t before, int64_t rows, int64_t columns, const ColumnMoments& more, const ColumnMoments& moments);

// Rows of `y`, or of `silu(y)`. `out` does not overlap `x`.
void normalise_rows(Float32 kind, const float* x, float* out, int64_t rows, int64_t columns, const ColumnFactors& factors, bool silu);
void normalise_rows(BFloat16 kind, const uint16_t* x, uint16_t* out, int64_t rows, int64_t columns, const ColumnFactors& factors, bool silu);
void normalise_rows(Float16 kind, const uint16_t* x, uint16_t* out, int64_t rows, int64_t columns, const ColumnFactors& factors, bool silu);

// Sums over rows. `gradient` is that of `y` or of `silu(y)`.
void sum_gradients(Float32 kind, const float* x, const float* gradient, int64_t rows, int64_t columns, const GradientFactors& factors, bool silu,
                   const GradientSums<float>& sums);
void sum_gradients(BFloat16 kind, const uint16_t* x, const uint16_t* gradient, int64_t rows, int64_t columns, const GradientFactors& factors, bool silu,
                   const GradientSums<float>& sums);
void sum_gradients(Float16 kind, const uint16_t* x, const uint16_t* gradient, int64_t rows, int64_t columns, const GradientFactors& factors, bool silu,
                   const GradientSums<float>& sums);

void add_sums(int64_t columns, const GradientSums<float>& more, const GradientSums<double>& sums);
void add_sums(int64_t columns, const GradientSums<double>& more, const GradientSums<double>& sums);

// Rows of the gradient of `x`. `out` overlaps neither `x` nor `gradient`.
void differentiate_rows(Float32 kind, const float* x, const float* gradient, float* out, int64_t rows, int64_t columns, const GradientFactors& factors,
                        bool silu);
void differentiate_rows(BFloat16 kind, const uint16_t* x, const uint16_t* gradient, uint16_t* out, int64_t rows, int64_t columns,
                        const GradientFactors& factors, bool silu);
void differentiate_rows(Float16 kind, const uint16_t* x, const uint16_t* gradient, uint16_t* out, int64_t rows, int64_t columns,
                        const GradientFactors& factors, bool silu);

float widened(Float32 kind, float x);
float widened(BFloat16 kind, uint16_t x);
float widened(Float16 kind, uint16_t x);

}  // namespace ddil
