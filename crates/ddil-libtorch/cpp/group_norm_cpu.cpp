// Two passes over memory in each direction; the second reads what the first left in the cache.
#include "group_norm_cpu.h"
#include "group_norm_kernels.h"
#include "parallel.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <memory>

using at::Tensor;
using ddil::GroupNorm;

namespace {

// Rows summed in float before the sum is added in double.
constexpr int64_t kBlockRows = 64;
// Rows per thread. Results do not depend on the number of threads, because this does not.
constexpr int64_t kChunkRows = 1024;
// Enough columns to fill vector registers.
constexpr int64_t kColumns = 64;
// Number of elements that justifies another thread.
constexpr int64_t kGrain = 32768;

// Scratch memory, on the stack for narrow planes.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : far_(size > kNear ? new T[size] : nullptr) {}
  T* at(int64_t i) { return (far_ ? far_.get() : near_) + i; }

 private:
  static constexpr int64_t kNear = 512;
  T near_[kNear];
  std::unique_ptr<T[]> far_;
};

// The elements of a sample as rows of columns, and the remainder. A row has whole pixels, so a column is one channel.
struct Plane {
  Plane(int64_t length, int64_t channels, int64_t groups)
      : channels(channels), pixels(length / channels), channels_of_group(channels / groups),
        columns(std::min(length, channels * std::max<int64_t>(1, kColumns / channels))), rows(length / columns), rest(length % columns) {}

  int64_t num_chunks() const { return (rows + kChunkRows - 1) / kChunkRows; }
  int64_t rows_of_chunk(int64_t chunk) const { return std::min(kChunkRows, rows - chunk * kChunkRows); }
  int64_t length() const { return channels * pixels; }
  int64_t length_of_group() const { return channels_of_group * pixels; }

  int64_t channels, pixels, channels_of_group, columns, rows, rest;
};

// Arrays of one float per column; columns of a channel have the same value.
template <size_t N>
class PerColumn {
 public:
  explicit PerColumn(const Plane& plane) : plane_(plane), memory_(static_cast<int64_t>(N) * plane.columns) {}

  float* operator[](size_t i) { return memory_.at(static_cast<int64_t>(i) * plane_.columns); }

  void set(int64_t channel, const std::array<float, N>& values) {
    for (size_t i = 0; i < N; ++i) {
      float* array = (*this)[i];
      for (int64_t column = channel; column < plane_.columns; column += plane_.channels) array[column] = values[i];
    }
  }

 private:
  const Plane& plane_;
  Scratch<float> memory_;
};

// Mean and 1 / sqrt(variance + eps) of a group.
struct GroupMoments {
  double mean, rstd;
};

// The tensors as raw memory.
template <typename Kind>
struct Job {
  using Stored = typename Kind::Stored;

  Plane plane;
  int64_t num_groups;
  const Stored* x;
  // One value per channel, or null; `offset` has one per sample and channel.
  const float *weight, *bias, *offset;
  double eps;
  bool silu;

  const float* offset_of(int64_t sample) const { return offset == nullptr ? nullptr : offset + sample * plane.channels; }
  double weight_of(int64_t channel) const { return weight == nullptr ? 1.0 : weight[channel]; }
  double bias_of(int64_t channel) const { return bias == nullptr ? 0.0 : bias[channel]; }
};

template <typename Kind>
struct Forward {
  using Stored = typename Kind::Stored;

  Job<Kind> job;
  Stored* out;
  // One pair per sample and group, or null.
  GroupMoments* moments;
};

// Sums of a gradient over the pixels of a sample.
struct ChannelGradients {
  double weight, bias, offset;
};

template <typename Kind>
struct Backward {
  using Stored = typename Kind::Stored;

  Job<Kind> job;
  const GroupMoments* moments;
  const Stored* gradient;
  // As `x`, or null.
  Stored* of_x;
  // One value of each per sample and channel.
  ChannelGradients* of_channels;
};

// For columns whose sums exceed the range of float.
template <typename Kind>
void moments_in_double(const typename Kind::Stored* x, int64_t rows, int64_t columns, const ddil::ColumnSums& sums, const ddil::ColumnMoments& moments) {
  for (int64_t c = 0; c < columns; ++c) {
    if (std::isfinite(sums.squares[c])) continue;
    const auto value = [&](int64_t r) { return static_cast<double>(ddil::widened(Kind{}, x[r * columns + c])); };
    double sum = 0.0, squares = 0.0;
    for (int64_t r = 0; r < rows; ++r) sum += value(r);
    const double mean = sum / static_cast<double>(rows);
    for (int64_t r = 0; r < rows; ++r) squares += (value(r) - mean) * (value(r) - mean);
    moments.mean[c] = mean;
    moments.squares[c] = squares;
  }
}

// Adds rows to the moments of the `before` rows above them, in blocks.
template <typename Kind>
void add_rows(const typename Kind::Stored* x, int64_t before, int64_t rows, int64_t columns, const ddil::ColumnMoments& moments) {
  Scratch<float> floats(3 * columns);
  Scratch<double> doubles(2 * columns);
  const ddil::ColumnSums sums{floats.at(0), floats.at(columns), floats.at(2 * columns)};
  const ddil::ColumnMoments block{doubles.at(0), doubles.at(columns)};
  for (int64_t first = 0; first < rows; first += kBlockRows) {
    const int64_t n = std::min(kBlockRows, rows - first);
    const auto* from = x + first * columns;
    ddil::sum_rows(Kind{}, from, n, columns, sums);
    if (!ddil::moments_of_sums(n, columns, sums, block)) moments_in_double<Kind>(from, n, columns, sums, block);
    ddil::merge_moments(before + first, n, columns, block, moments);
  }
}

template <typename Body>
void for_each_chunk(const Plane& plane, const Body& body) {
  ddil::parallel_for(plane.num_chunks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) body(chunk);
  });
}

// `body` receives the first row, the number of rows and their columns.
template <typename Body>
void for_parts_of(const Plane& plane, const Body& body) {
  ddil::parallel_for(plane.rows, kGrain / plane.columns, [&](int64_t begin, int64_t end) { body(begin, end - begin, plane.columns); });
  if (plane.rest > 0) body(plane.rows, 1, plane.rest);
}

// Moments of each column of a plane, in memory with room for every chunk.
template <typename Kind>
ddil::ColumnMoments column_moments(const typename Kind::Stored* x, const Plane& plane, Scratch<double>& memory) {
  const int64_t columns = plane.columns, num_chunks = plane.num_chunks();
  const auto moments_of = [&](int64_t chunk) {
    return ddil::ColumnMoments{memory.at(2 * chunk * columns), memory.at((2 * chunk + 1) * columns)};
  };
  std::fill_n(memory.at(0), 2 * num_chunks * columns, 0.0);
  for_each_chunk(plane, [&](int64_t chunk) { add_rows<Kind>(x + chunk * kChunkRows * columns, 0, plane.rows_of_chunk(chunk), columns, moments_of(chunk)); });
  const ddil::ColumnMoments all = moments_of(0);
  for (int64_t chunk = 1; chunk < num_chunks; ++chunk) {
    ddil::merge_moments(chunk * kChunkRows, plane.rows_of_chunk(chunk), columns, moments_of(chunk), all);
  }
  if (plane.rest > 0) add_rows<Kind>(x + plane.rows * columns, plane.rows, 1, plane.rest, all);
  return all;
}

// `offset` has one value per channel, or is null.
GroupMoments group_moments(const Plane& plane, const ddil::ColumnMoments& columns, int64_t group, const float* offset, double eps) {
  const double share = 1.0 / static_cast<double>(plane.length_of_group());
  const auto for_each_column = [&](const auto& look) {
    const int64_t first = group * plane.channels_of_group;
    for (int64_t turn = 0; turn < plane.columns; turn += plane.channels) {
      for (int64_t c = first; c < first + plane.channels_of_group; ++c) {
        const int64_t i = turn + c;
        const auto size = static_cast<double>(plane.rows + (i < plane.rest ? 1 : 0));
        look(i, size, columns.mean[i] + (offset == nullptr ? 0.0 : offset[c]));
      }
    }
  };
  double sum = 0.0, squares = 0.0;
  for_each_column([&](int64_t, double size, double of_column) { sum += size * of_column; });
  const double mean = sum * share;
  for_each_column([&](int64_t i, double size, double of_column) { squares += columns.squares[i] + size * (of_column - mean) * (of_column - mean); });
  return {mean, 1.0 / std::sqrt(squares * share + eps)};
}

// The coefficients of `y = (x - center) * scale + shift` of a channel.
struct ChannelFactors {
  float center, scale, shift;
  // Distance of the center from the mean, in normalized units.
  double nudge;

  template <typename Kind>
  ChannelFactors(const Job<Kind>& job, const GroupMoments& moments, int64_t channel, double offset) {
    const double factor = job.weight_of(channel) * moments.rstd;
    const double exact = moments.mean - offset;
    center = static_cast<float>(exact);
    scale = static_cast<float>(factor);
    shift = static_cast<float>(job.bias_of(channel) + (center - exact) * factor);
    nudge = (center - exact) * moments.rstd;
  }
};

template <typename Kind>
void normalise_sample(const Forward<Kind>& of, int64_t sample) {
  const Job<Kind>& job = of.job;
  const Plane& plane = job.plane;
  const int64_t start = sample * plane.length();
  const float* offset = job.offset_of(sample);
  Scratch<double> memory(2 * plane.num_chunks() * plane.columns);
  const ddil::ColumnMoments columns = column_moments<Kind>(job.x + start, plane, memory);
  PerColumn<3> factors(plane);
  for (int64_t group = 0; group < job.num_groups; ++group) {
    const GroupMoments moments = group_moments(plane, columns, group, offset, job.eps);
    if (of.moments != nullptr) of.moments[sample * job.num_groups + group] = moments;
    for (int64_t c = group * plane.channels_of_group; c < (group + 1) * plane.channels_of_group; ++c) {
      const ChannelFactors channel(job, moments, c, offset == nullptr ? 0.0 : offset[c]);
      factors.set(c, {channel.center, channel.scale, channel.shift});
    }
  }
  for_parts_of(plane, [&](int64_t row, int64_t rows, int64_t width) {
    const int64_t first = start + row * plane.columns;
    ddil::normalise_rows(Kind{}, job.x + first, of.out + first, rows, width, {factors[0], factors[1], factors[2]}, job.silu);
  });
}

// Sums of each column of a plane, in memory with room for every chunk.
template <typename Kind>
ddil::GradientSums<double> gradient_sums(const Backward<Kind>& of, int64_t start, const ddil::GradientFactors& factors, Scratch<double>& memory) {
  const Plane& plane = of.job.plane;
  const int64_t columns = plane.columns, num_chunks = plane.num_chunks();
  const auto sums_of = [&](int64_t chunk) {
    double* first = memory.at(3 * chunk * columns);
    return ddil::GradientSums<double>{first, first + columns, first + 2 * columns};
  };
  const auto add = [&](int64_t row, int64_t rows, int64_t width, const ddil::GradientSums<double>& sums) {
    Scratch<float> floats(3 * width);
    const ddil::GradientSums<float> block{floats.at(0), floats.at(width), floats.at(2 * width)};
    for (int64_t done = 0; done < rows; done += kBlockRows) {
      const int64_t n = std::min(kBlockRows, rows - done), first = start + (row + done) * columns;
      ddil::sum_gradients(Kind{}, of.job.x + first, of.gradient + first, n, width, factors, of.job.silu, block);
      ddil::add_sums(width, block, sums);
    }
  };
  std::fill_n(memory.at(0), 3 * num_chunks * columns, 0.0);
  for_each_chunk(plane, [&](int64_t chunk) { add(chunk * kChunkRows, plane.rows_of_chunk(chunk), columns, sums_of(chunk)); });
  const ddil::GradientSums<double> all = sums_of(0);
  for (int64_t chunk = 1; chunk < num_chunks; ++chunk) ddil::add_sums(columns, sums_of(chunk), all);
  if (plane.rest > 0) add(plane.rows, 1, plane.rest, all);
  return all;
}

// Sums of a channel over its pixels: of gradients, of gradients times normalized values, and of normalized values.
struct ChannelSums {
  double gradient = 0.0, product = 0.0, normalised = 0.0;

  ChannelSums(const Plane& plane, const ddil::GradientSums<double>& columns, int64_t channel, double nudge) {
    for (int64_t i = channel; i < plane.columns; i += plane.channels) {
      gradient += columns.gradient[i];
      product += columns.product[i];
      normalised += columns.normalised[i];
    }
    product += nudge * gradient;
    normalised += nudge * static_cast<double>(plane.pixels);
  }
};

// With z for the normalized value and g for the gradient of y, the gradient of x is rstd (w g - mean(w g) - z mean(w g z)), with
// means over the group.
template <typename Kind>
void differentiate_group(const Backward<Kind>& of, int64_t sample, int64_t group, const ddil::GradientSums<double>& columns, PerColumn<2>& lines) {
  const Job<Kind>& job = of.job;
  const Plane& plane = job.plane;
  const GroupMoments moments = of.moments[sample * job.num_groups + group];
  const float* offset = job.offset_of(sample);
  const auto for_each_channel = [&](const auto& look) {
    for (int64_t c = group * plane.channels_of_group; c < (group + 1) * plane.channels_of_group; ++c) {
      const double nudge = ChannelFactors(job, moments, c, offset == nullptr ? 0.0 : offset[c]).nudge;
      look(c, nudge, ChannelSums(plane, columns, c, nudge));
    }
  };
  double mean = 0.0, mean_product = 0.0;
  const double share = 1.0 / static_cast<double>(plane.length_of_group());
  for_each_channel([&](int64_t c, double, const ChannelSums& sums) {
    mean += job.weight_of(c) * sums.gradient * share;
    mean_product += job.weight_of(c) * sums.product * share;
  });
  const double slope = moments.rstd * mean_product, intercept = moments.rstd * mean;
  for_each_channel([&](int64_t c, double nudge, const ChannelSums& sums) {
    const double of_offset = moments.rstd * job.weight_of(c) * sums.gradient - slope * sums.normalised - intercept * static_cast<double>(plane.pixels);
    of.of_channels[sample * plane.channels + c] = {sums.product, sums.gradient, of_offset};
    lines.set(c, {static_cast<float>(slope), static_cast<float>(intercept + nudge * slope)});
  });
}

template <typename Kind>
void differentiate_sample(const Backward<Kind>& of, int64_t sample) {
  const Job<Kind>& job = of.job;
  const Plane& plane = job.plane;
  const int64_t start = sample * plane.length();
  const float* offset = job.offset_of(sample);
  PerColumn<4> arrays(plane);
  PerColumn<2> lines(plane);
  for (int64_t c = 0; c < plane.channels; ++c) {
    const GroupMoments moments = of.moments[sample * job.num_groups + c / plane.channels_of_group];
    const ChannelFactors channel(job, moments, c, offset == nullptr ? 0.0 : offset[c]);
    arrays.set(c, {channel.center, channel.scale, channel.shift, static_cast<float>(moments.rstd)});
  }
  // The coefficients follow once the sums are complete.
  const ddil::GradientFactors factors{{arrays[0], arrays[1], arrays[2]}, arrays[3], lines[0], lines[1]};
  Scratch<double> memory(3 * plane.num_chunks() * plane.columns);
  const ddil::GradientSums<double> columns = gradient_sums(of, start, factors, memory);
  for (int64_t group = 0; group < job.num_groups; ++group) differentiate_group(of, sample, group, columns, lines);
  if (of.of_x == nullptr) return;
  for_parts_of(plane, [&](int64_t row, int64_t rows, int64_t width) {
    const int64_t first = start + row * plane.columns;
    ddil::differentiate_rows(Kind{}, job.x + first, of.gradient + first, of.of_x + first, rows, width, factors, job.silu);
  });
}

// Parallel over samples if there are enough for all threads, otherwise over parts of each.
template <typename Body>
void for_each_sample(int64_t num_samples, int64_t length, const Body& body) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  };
  if (num_samples < at::get_num_threads()) return run(0, num_samples);
  ddil::parallel_for(num_samples, kGrain / length, run);
}

// A tensor as floats in order, or undefined.
Tensor floats_of(const Tensor* t) { return t == nullptr ? Tensor() : t->to(at::kFloat).contiguous(); }

// Memory in a form that the loops accept, and its owner.
struct Settled {
  explicit Settled(const GroupNorm& of)
      : num_samples(of.x->size(0)), format(of.x->suggest_memory_format()), x(of.x->contiguous(format)), weight(floats_of(of.weight)),
        bias(floats_of(of.bias)), offset(floats_of(of.offset)) {}

  template <typename Kind>
  Job<Kind> job(const GroupNorm& of) const {
    const auto data = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; };
    const Plane plane(x.numel() / num_samples, x.size(1), of.num_groups);
    return {plane, of.num_groups, numbers<Kind>(x), data(weight), data(bias), data(offset), of.eps, of.silu};
  }

  template <typename Kind>
  static const typename Kind::Stored* numbers(const Tensor& t) {
    return static_cast<const typename Kind::Stored*>(t.const_data_ptr());
  }

  template <typename Kind>
  static typename Kind::Stored* numbers_of_new(const Tensor& t) {
    return t.defined() ? static_cast<typename Kind::Stored*>(t.mutable_data_ptr()) : nullptr;
  }

  Tensor like_x() const { return at::empty(x.sizes(), x.options(), format); }

  int64_t num_samples;
  at::MemoryFormat format;
  Tensor x, weight, bias, offset;
};

// `body` receives the kind of `x`.
template <typename Body>
void with_kind_of(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case at::kFloat: return body(ddil::Float32{});
    case at::kBFloat16: return body(ddil::BFloat16{});
    default: return body(ddil::Float16{});
  }
}

bool is_plain(const Tensor& t) { return t.is_cpu() && t.layout() == at::kStrided && !t.is_neg() && !t._is_zerotensor(); }

// Whether the channels of a pixel are adjacent, or would be after a copy to the order that libtorch suggests.
bool is_side_by_side(const Tensor& x) {
  return x.suggest_memory_format() != at::MemoryFormat::Contiguous || x.numel() == x.size(0) * x.size(1);
}

}  // namespace

bool ddil::suits_group_norm_cpu(const GroupNorm& of) {
  const Tensor& x = *of.x;
  const auto kind = x.scalar_type();
  if (kind != at::kFloat && kind != at::kBFloat16 && kind != at::kHalf) return false;
  if (x.numel() == 0 || of.num_groups <= 0 || x.size(1) % of.num_groups != 0) return false;
  for (const Tensor* t : {of.weight, of.bias}) {
    if (t == nullptr) continue;
    if (t->scalar_type() != at::kFloat && t->scalar_type() != kind) return false;
    if (t->dim() != 1 || t->size(0) != x.size(1)) return false;
  }
  // Another kind could change the kind of the sum.
  if (of.offset != nullptr && of.offset->scalar_type() != kind) return false;
  for (const Tensor* t : of.tensors()) {
    if (t != nullptr && !is_plain(*t)) return false;
  }
  return is_side_by_side(x);
}

Tensor ddil::group_norm_cpu(const GroupNorm& of, Tensor* moments) {
  at::NoGradGuard no_grad;
  const Settled settled(of);
  const Tensor y = settled.like_x();
  if (moments != nullptr) *moments = at::empty({settled.num_samples, of.num_groups, 2}, at::kDouble);
  with_kind_of(settled.x, [&](auto kind) {
    using Kind = decltype(kind);
    auto* pairs = moments == nullptr ? nullptr : reinterpret_cast<GroupMoments*>(moments->mutable_data_ptr<double>());
    const Forward<Kind> forward{settled.job<Kind>(of), Settled::numbers_of_new<Kind>(y), pairs};
    for_each_sample(settled.num_samples, forward.job.plane.length(), [&](int64_t i) { normalise_sample(forward, i); });
  });
  return y;
}

std::array<Tensor, 4> ddil::group_norm_cpu_backward(const GroupNorm& of, const Tensor& moments, const Tensor& gradient) {
  at::NoGradGuard no_grad;
  const Settled settled(of);
  const Tensor settled_gradient = gradient.contiguous(settled.format);
  const Tensor of_x = of.x->requires_grad() ? settled.like_x() : Tensor();
  const Tensor of_channels = at::empty({settled.num_samples, settled.x.size(1), 3}, at::kDouble);
  with_kind_of(settled.x, [&](auto kind) {
    using Kind = decltype(kind);
    const Backward<Kind> backward{settled.job<Kind>(of), reinterpret_cast<const GroupMoments*>(moments.const_data_ptr<double>()),
                                  Settled::numbers<Kind>(settled_gradient), Settled::numbers_of_new<Kind>(of_x),
                                  reinterpret_cast<ChannelGradients*>(of_channels.mutable_data_ptr<double>())};
    for_each_sample(settled.num_samples, backward.job.plane.length(), [&](int64_t i) { differentiate_sample(backward, i); });
  });
  const auto wanted = [](const Tensor* t) { return t != nullptr && t->requires_grad(); };
  const auto over_samples = [&](const Tensor* t, int64_t i) { return wanted(t) ? of_channels.select(2, i).sum(0).to(t->scalar_type()) : Tensor(); };
  return {of_x, over_samples(of.weight, 0), over_samples(of.bias, 1),
          wanted(of.offset) ? of_channels.select(2, 2).to(of.offset->scalar_type()) : Tensor()};
}
