#include "group_norm_kernels.h"

#include "clones.h"

#include <algorithm>
#include <type_traits>

namespace ddil {

// Between these 1 + exp(t) is finite and more than 1. Not constant: GCC would split off the values beyond them and mask every
// operation on the others.
extern float least_power, most_power;
float least_power = -86.0F, most_power = 88.0F;

namespace {

// Number of rows whose mean is the pivot.
constexpr int64_t kPivotRows = 8;

// 16-bit values are widened this many at a time into a buffer that stays in the first-level cache: loops over two widths
// use the shorter vectors.
constexpr int64_t kStrip = 128;

DDIL_INLINE float load(Float32, float x) { return x; }
DDIL_INLINE float load(BFloat16, uint16_t x) { return same_bits<float>(static_cast<uint32_t>(x) << 16); }
DDIL_INLINE float load(Float16, uint16_t x) {
  // The product moves the exponent's bias from 15 to 127, for subnormal numbers too.
  const float magnitude = same_bits<float>((x & 0x7fffU) << 13) * 0x1p112F;
  const uint32_t beyond = (x & 0x7c00U) == 0x7c00U ? 0x7f800000U : 0U;
  return same_bits<float>(same_bits<uint32_t>(magnitude) | beyond | ((x & 0x8000U) << 16));
}

// To the nearest, ties to even, as libtorch rounds.
DDIL_INLINE uint16_t rounded(BFloat16, float y) {
  const uint32_t bits = same_bits<uint32_t>(y);
  const uint32_t nearest = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const bool is_nan = (bits & 0x7fffffffU) > 0x7f800000U;
  return static_cast<uint16_t>(is_nan ? 0x7fc0U : nearest);
}
DDIL_INLINE uint16_t rounded(Float16, float y) {
  const uint32_t bits = same_bits<uint32_t>(y);
  const uint32_t magnitude = bits & 0x7fffffffU;
  const uint32_t normal = (magnitude - 0x38000000U + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
  // The last bit of a float next to a half is worth the last bit of a subnormal number.
  const uint32_t subnormal = same_bits<uint32_t>(same_bits<float>(magnitude) + 0.5F) - 0x3f000000U;
  uint32_t nearest = magnitude < 0x38800000U ? subnormal : normal;
  nearest = magnitude >= 0x47800000U ? 0x7c00U : nearest;
  nearest = magnitude > 0x7f800000U ? 0x7e00U : nearest;
  return static_cast<uint16_t>(nearest | ((bits >> 16) & 0x8000U));
}

// For t from -86 to 88: 2^n e^r with r at most half of ln 2, and Cephes' polynomial for e^r.
DDIL_INLINE float exp_within(float t) {
  // Adding it rounds to integers, which are then in the last bits.
  constexpr float kRounder = 12582912.0F;
  float n = t * 1.44269504F + kRounder;
  const uint32_t exponent = same_bits<uint32_t>(n) << 23;
  n -= kRounder;
  // ln 2 in two parts; the first has spare bits.
  float r = t - n * 0.693359375F;
  r -= n * -2.12194440e-4F;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  const float power = p * (r * r) + r + 1.0F;
  return same_bits<float>(same_bits<uint32_t>(power) + exponent);
}

// exp(-y), with y clamped to the range.
DDIL_INLINE float exp_of_minus(float y) {
  float t = -y;
  t = t < most_power ? t : most_power;
  t = t > least_power ? t : least_power;
  return exp_within(t);
}

DDIL_INLINE float zero_below_range(float y) { return same_bits<float>(same_bits<uint32_t>(y) & (y < -88.0F ? 0U : ~0U)); }

// Below -88 it is 0, where it should be between -6e-37 and 0. A NaN stays one.
DDIL_INLINE float silu_of(float y) { return zero_below_range(y) / (1.0F + exp_of_minus(y)); }

// Below -88 it is 6e-39, where it should be between -6e-37 and 0.
DDIL_INLINE float silu_slope_of(float y) {
  const float power = exp_of_minus(y);
  const float sigmoid = 1.0F / (1.0F + power);
  // 1 - sigmoid, without cancellation.
  const float rest = power * sigmoid;
  return sigmoid + sigmoid * rest * zero_below_range(y);
}

template <typename Kind>
DDIL_INLINE void find_pivots(Kind kind, const typename Kind::Stored* x, int64_t rows, int64_t columns, float* pivot) {
  const int64_t first = std::min(rows, kPivotRows);
  std::fill_n(pivot, columns, 0.0F);
  for (int64_t r = 0; r < first; ++r) {
    const auto* row = x + r * columns;
    DDIL_INDEPENDENT
    for (int64_t c = 0; c < columns; ++c) pivot[c] += load(kind, row[c]);
  }
  const float share = 1.0F / static_cast<float>(first);
  DDIL_INDEPENDENT
  for (int64_t c = 0; c < columns; ++c) pivot[c] *= share;
}

template <typename Kind>
DDIL_INLINE void sum(Kind kind, const typename Kind::Stored* x, int64_t rows, int64_t columns, const ColumnSums& sums) {
  float *pivot = sums.pivot, *sum = sums.sum, *squares = sums.squares;
  find_pivots(kind, x, rows, columns, pivot);
  std::fill_n(sum, columns, 0.0F);
  std::fill_n(squares, columns, 0.0F);
  int64_t r = 0;
  // Sums are read and written once for four rows.
  for (; r + 4 <= rows; r += 4) {
    const auto *row0 = x + r * columns, *row1 = row0 + columns, *row2 = row1 + columns, *row3 = row2 + columns;
    DDIL_INDEPENDENT
    for (int64_t c = 0; c < columns; ++c) {
      const float d0 = load(kind, row0[c]) - pivot[c], d1 = load(kind, row1[c]) - pivot[c];
      const float d2 = load(kind, row2[c]) - pivot[c], d3 = load(kind, row3[c]) - pivot[c];
      sum[c] += (d0 + d1) + (d2 + d3);
      squares[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    }
  }
  for (; r < rows; ++r) {
    const auto* row = x + r * columns;
    DDIL_INDEPENDENT
    for (int64_t c = 0; c < columns; ++c) {
      const float d = load(kind, row[c]) - pivot[c];
      sum[c] += d;
      squares[c] += d * d;
    }
  }
}

template <bool kSilu>
DDIL_INLINE void normalise_row(const float* x, float* out, int64_t columns, const float* center, const float* scale, const float* shift) {
  DDIL_INDEPENDENT
  for (int64_t c = 0; c < columns; ++c) {
    const float y = (x[c] - center[c]) * scale[c] + shift[c];
    out[c] = kSilu ? silu_of(y) : y;
  }
}

template <bool kSilu>
DDIL_INLINE void normalise(Float32, const float* x, float* out, int64_t rows, int64_t columns, const ColumnFactors& factors) {
  for (int64_t r = 0; r < rows; ++r, x += columns, out += columns) {
    normalise_row<kSilu>(x, out, columns, factors.center, factors.scale, factors.shift);
  }
}

template <bool kSilu, typename Kind>
DDIL_INLINE void normalise(Kind kind, const uint16_t* x, uint16_t* out, int64_t rows, int64_t columns, const ColumnFactors& factors) {
  float strip[kStrip];
  for (int64_t r = 0; r < rows; ++r, x += columns, out += columns) {
    for (int64_t first = 0; first < columns; first += kStrip) {
      const int64_t n = std::min(kStrip, columns - first);
      const uint16_t* from = x + first;
      uint16_t* to = out + first;
      for (int64_t c = 0; c < n; ++c) strip[c] = load(kind, from[c]);
      normalise_row<kSilu>(strip, strip, n, factors.center + first, factors.scale + first, factors.shift + first);
      for (int64_t c = 0; c < n; ++c) to[c] = rounded(kind, strip[c]);
    }
  }
}

// The gradient of `y` from the gradient of the output.
template <bool kSilu>
DDIL_INLINE float gradient_of_y(float from_center, float gradient, float scale, float shift) {
  return kSilu ? gradient * silu_slope_of(from_center * scale + shift) : gradient;
}

template <bool kSilu>
DDIL_INLINE void sum_gradients_row(const float* x, const float* gradient, int64_t columns, const GradientFactors& factors, const GradientSums<float>& sums) {
  const auto [center, scale, shift] = factors.of_y;
  const float* rstd = factors.rstd;
  float *of_gradient = sums.gradient, *of_product = sums.product, *of_normalised = sums.normalised;
  DDIL_INDEPENDENT
  for (int64_t c = 0; c < columns; ++c) {
    const float from_center = x[c] - center[c];
    const float g = gradient_of_y<kSilu>(from_center, gradient[c], scale[c], shift[c]);
    const float z = from_center * rstd[c];
    of_gradient[c] += g;
    of_product[c] += g * z;
    of_normalised[c] += z;
  }
}

template <bool kSilu>
DDIL_INLINE void differentiate_row(const float* x, const float* gradient, float* out, int64_t columns, const GradientFactors& factors) {
  const auto [center, scale, shift] = factors.of_y;
  const float *rstd = factors.rstd, *slope = factors.slope, *intercept = factors.intercept;
  DDIL_INDEPENDENT
  for (int64_t c = 0; c < columns; ++c) {
    const float from_center = x[c] - center[c];
    const float g = gradient_of_y<kSilu>(from_center, gradient[c], scale[c], shift[c]);
    out[c] = scale[c] * g - (from_center * rstd[c] * slope[c] + intercept[c]);
  }
}

// The same from column `first` on.
DDIL_INLINE ColumnFactors from_column(const ColumnFactors& of, int64_t first) { return {of.center + first, of.scale + first, of.shift + first}; }
DDIL_INLINE GradientFactors from_column(const GradientFactors& of, int64_t first) {
  return {from_column(of.of_y, first), of.rstd + first, of.slope + first, of.intercept + first};
}
DDIL_INLINE GradientSums<float> from_column(const GradientSums<float>& of, int64_t first) {
  return {of.gradient + first, of.product + first, of.normalised + first};
}

// Calls `body` for each row, or strip of it: its first column, `x` and gradient from there on, and their number.
template <typename Body>
DDIL_INLINE void for_each_strip(Float32, const float* x, const float* gradient, int64_t rows, int64_t columns, const Body& body) {
  for (int64_t r = 0; r < rows; ++r) body(r * columns, int64_t{0}, x + r * columns, gradient + r * columns, columns);
}

template <typename Kind, typename Body>
DDIL_INLINE void for_each_strip(Kind kind, const uint16_t* x, const uint16_t* gradient, int64_t rows, int64_t columns, const Body& body) {
  float strip_of_x[kStrip], strip_of_gradient[kStrip];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t first = 0; first < columns; first += kStrip) {
      const int64_t n = std::min(kStrip, columns - first), place = r * columns + first;
      for (int64_t c = 0; c < n; ++c) strip_of_x[c] = load(kind, x[place + c]);
      for (int64_t c = 0; c < n; ++c) strip_of_gradient[c] = load(kind, gradient[place + c]);
      body(place, first, strip_of_x, strip_of_gradient, n);
    }
  }
}

template <bool kSilu, typename Kind>
DDIL_INLINE void sum_gradients_of(Kind kind, const typename Kind::Stored* x, const typename Kind::Stored* gradient, int64_t rows, int64_t columns,
                                  const GradientFactors& factors, const GradientSums<float>& sums) {
  for (float* sum : {sums.gradient, sums.product, sums.normalised}) std::fill_n(sum, columns, 0.0F);
  for_each_strip(kind, x, gradient, rows, columns, [&](int64_t, int64_t first, const float* x, const float* gradient, int64_t n) DDIL_ALWAYS_INLINE {
    sum_gradients_row<kSilu>(x, gradient, n, from_column(factors, first), from_column(sums, first));
  });
}

template <bool kSilu, typename Kind>
DDIL_INLINE void differentiate(Kind kind, const typename Kind::Stored* x, const typename Kind::Stored* gradient, typename Kind::Stored* out, int64_t rows,
                               int64_t columns, const GradientFactors& factors) {
  for_each_strip(kind, x, gradient, rows, columns, [&](int64_t place, int64_t first, const float* x, const float* gradient, int64_t n) DDIL_ALWAYS_INLINE {
    if constexpr (std::is_same_v<Kind, Float32>) {
      differentiate_row<kSilu>(x, gradient, out + place, n, factors);
    } else {
      float strip[kStrip];
      differentiate_row<kSilu>(x, gradient, strip, n, from_column(factors, first));
      for (int64_t c = 0; c < n; ++c) out[place + c] = rounded(kind, strip[c]);
    }
  });
}

template <typename From>
DDIL_INLINE void add(int64_t columns, const From* more, double* sums) {
  DDIL_INDEPENDENT
  for (int64_t c = 0; c < columns; ++c) sums[c] += more[c];
}

template <typename From>
DDIL_INLINE void add_all(int64_t columns, const GradientSums<From>& more, const GradientSums<double>& sums) {
  add(columns, more.gradient, sums.gradient);
  add(columns, more.product, sums.product);
  add(columns, more.normalised, sums.normalised);
}

}  // namespace

#define DDIL_GROUP_NORM(Kind, Stored)                                                                                                                 \
  DDIL_CLONES void sum_rows(Kind kind, const Stored* x, int64_t rows, int64_t columns, const ColumnSums& sums) { sum(kind, x, rows, columns, sums); } \
  DDIL_CLONES void normalise_rows(Kind kind, const Stored* x, Stored* out, int64_t rows, int64_t columns, const ColumnFactors& factors, bool silu) {  \
    if (silu) return normalise<true>(kind, x, out, rows, columns, factors);                                                                           \
    normalise<false>(kind, x, out, rows, columns, factors);                                                                                           \
  }                                                                                                                                                   \
  DDIL_CLONES void sum_gradients(Kind kind, const Stored* x, const Stored* gradient, int64_t rows, int64_t columns, const GradientFactors& factors,   \
                                 bool silu, const GradientSums<float>& sums) {                                                                        \
    if (silu) return sum_gradients_of<true>(kind, x, gradient, rows, columns, factors, sums);                                                         \
    sum_gradients_of<false>(kind, x, gradient, rows, columns, factors, sums);                                                                         \
  }                                                                                                                                                   \
  DDIL_CLONES void differentiate_rows(Kind kind, const Stored* x, const Stored* gradient, Stored* out, int64_t rows, int64_t columns,                 \
                                      const GradientFactors& factors, bool silu) {                                                                    \
    if (silu) return differentiate<true>(kind, x, gradient, out, rows, columns, factors);                                                             \
    differentiate<false>(kind, x, gradient, out, rows, columns, factors);                                                                             \
  }                                                                                                                                                   \
  float widened(Kind kind, Stored x) { return load(kind, x); }

DDIL_GROUP_NORM(Float32, float)
DDIL_GROUP_NORM(BFloat16, uint16_t)
DDIL_GROUP_NORM(Float16, uint16_t)

DDIL_CLONES bool moments_of_sums(int64_t rows, int64_t columns, const ColumnSums& sums, const ColumnMoments& moments) {
  const double share = 1.0 / static_cast<double>(rows);
  const float *pivot = sums.pivot, *sum = sums.sum, *squares = sums.squares;
  double *mean = moments.mean, *around_mean = moments.squares;
  DDIL_INDEPENDENT
  for (int64_t c = 0; c < columns; ++c) {
    const double s = sum[c];
    const double square = squares[c] - s * s * share;
    mean[c] = pivot[c] + s * share;
    around_mean[c] = square < 0.0 ? 0.0 : square;
  }
  uint32_t beyond = 0;
  for (int64_t c = 0; c < columns; ++c) beyond |= (same_bits<uint32_t>(squares[c]) & 0x7fffffffU) >= 0x7f800000U ? 1U : 0U;
  return beyond == 0;
}

DDIL_CLONES void merge_moments(int64_t before, int64_t rows, int64_t columns, const ColumnMoments& more, const ColumnMoments& moments) {
  const double share = static_cast<double>(rows) / static_cast<double>(before + rows);
  const double weight = static_cast<double>(before) * share;
  const double *more_mean = more.mean, *more_squares = more.squares;
  double *mean = moments.mean, *squares = moments.squares;
  DDIL_INDEPENDENT
  for (int64_t c = 0; c < columns; ++c) {
    const double apart = more_mean[c] - mean[c];
    mean[c] += apart * share;
    squares[c] += more_squares[c] + apart * apart * weight;
  }
}

DDIL_CLONES void add_sums(int64_t columns, const GradientSums<float>& more, const GradientSums<double>& sums) { add_all(columns, more, sums); }
DDIL_CLONES void add_sums(int64_t columns, const GradientSums<double>& more, const GradientSums<double>& sums) { add_all(columns, more, sums); }

}  // namespace ddil
