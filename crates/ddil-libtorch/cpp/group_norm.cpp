// Group normalisation, what is added before it and SiLU after it, of maps whose channels lie side by side: two passes over
// memory on the CPU, of which the second finds what the first left in the cache. ATen's own operations for everything else,
// which for channels one after the other are as fast.
#include "group_norm_kernels.h"
#include "shim.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/silu.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

using at::Tensor;

namespace {

// Rows that are summed in floats before they go to doubles.
constexpr int64_t kBlockRows = 64;
// Rows that a thread sums. Results do not depend on the number of threads, as this does not.
constexpr int64_t kChunkRows = 1024;
// As many columns as keep vectors busy.
constexpr int64_t kColumns = 64;
// Numbers for which another thread is worth waking.
constexpr int64_t kGrain = 32768;

// Scratch memory, which for narrow planes is on the stack.
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

struct Arguments {
  const Tensor* x;
  int64_t num_groups;
  // Null if there is none.
  const Tensor* weight;
  const Tensor* bias;
  const Tensor* offset;
  double eps;
  bool silu;

  std::array<const Tensor*, 4> tensors() const { return {x, weight, bias, offset}; }
};

// The numbers of a sample, seen as rows of columns, and what is left over. A row has whole pixels, so a column one channel.
struct Plane {
  Plane(int64_t length, int64_t channels, int64_t groups)
      : channels(channels), channels_of_group(channels / groups), length_of_group(length / groups),
        columns(std::min(length, channels * std::max<int64_t>(1, kColumns / channels))), rows(length / columns), rest(length % columns) {}

  int64_t num_chunks() const { return (rows + kChunkRows - 1) / kChunkRows; }

  int64_t channels, channels_of_group, length_of_group, columns, rows, rest;
};

// The tensors as plain memory.
template <typename Kind>
struct Job {
  using Stored = typename Kind::Stored;

  const Stored* x;
  Stored* out;
  int64_t num_channels, num_pixels, num_groups;
  // A number a channel, or null; of `offset` a number a sample and channel.
  const float *weight, *bias, *offset;
  double eps;
  bool silu;
};

// Of the columns whose sums have left the range of floats.
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

// Moments of each column of a plane, in memory for as many as there are chunks.
template <typename Kind>
ddil::ColumnMoments column_moments(const typename Kind::Stored* x, const Plane& plane, Scratch<double>& memory) {
  const int64_t columns = plane.columns, num_chunks = plane.num_chunks();
  const auto moments_of = [&](int64_t chunk) {
    return ddil::ColumnMoments{memory.at(2 * chunk * columns), memory.at((2 * chunk + 1) * columns)};
  };
  const auto rows_of = [&](int64_t chunk) { return std::min(kChunkRows, plane.rows - chunk * kChunkRows); };
  std::fill_n(memory.at(0), 2 * num_chunks * columns, 0.0);
  at::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      add_rows<Kind>(x + chunk * kChunkRows * columns, 0, rows_of(chunk), columns, moments_of(chunk));
    }
  });
  const ddil::ColumnMoments all = moments_of(0);
  for (int64_t chunk = 1; chunk < num_chunks; ++chunk) ddil::merge_moments(chunk * kChunkRows, rows_of(chunk), columns, moments_of(chunk), all);
  if (plane.rest > 0) add_rows<Kind>(x + plane.rows * columns, plane.rows, 1, plane.rest, all);
  return all;
}

// Mean and 1 / sqrt(variance + eps) of a group. `offset` has a number for each channel, or is null.
struct GroupMoments {
  double mean, rstd;

  GroupMoments(const Plane& plane, const ddil::ColumnMoments& columns, int64_t group, const float* offset, double eps) {
    const double share = 1.0 / static_cast<double>(plane.length_of_group);
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
    mean = sum * share;
    for_each_column([&](int64_t i, double size, double of_column) { squares += columns.squares[i] + size * (of_column - mean) * (of_column - mean); });
    rstd = 1.0 / std::sqrt(squares * share + eps);
  }
};

// What `y = (x - center) * scale + shift` of a channel is made of.
struct ChannelFactors {
  float center, scale, shift;

  template <typename Kind>
  ChannelFactors(const Job<Kind>& job, const GroupMoments& moments, int64_t channel, double offset) {
    const double factor = job.weight == nullptr ? moments.rstd : job.weight[channel] * moments.rstd;
    const double exact = moments.mean - offset;
    center = static_cast<float>(exact);
    scale = static_cast<float>(factor);
    shift = static_cast<float>((job.bias == nullptr ? 0.0 : job.bias[channel]) + (center - exact) * factor);
  }
};

template <typename Kind>
void normalise_sample(const Job<Kind>& job, const Plane& plane, int64_t sample) {
  const int64_t columns = plane.columns, start = sample * job.num_channels * job.num_pixels;
  const float* offset = job.offset == nullptr ? nullptr : job.offset + sample * job.num_channels;
  Scratch<double> memory(2 * plane.num_chunks() * columns);
  const ddil::ColumnMoments moments = column_moments<Kind>(job.x + start, plane, memory);
  Scratch<float> floats(3 * columns);
  float *center = floats.at(0), *scale = floats.at(columns), *shift = floats.at(2 * columns);
  for (int64_t group = 0; group < job.num_groups; ++group) {
    const GroupMoments of_group(plane, moments, group, offset, job.eps);
    for (int64_t c = group * plane.channels_of_group; c < (group + 1) * plane.channels_of_group; ++c) {
      const ChannelFactors factors(job, of_group, c, offset == nullptr ? 0.0 : offset[c]);
      for (int64_t i = c; i < columns; i += plane.channels) {
        center[i] = factors.center;
        scale[i] = factors.scale;
        shift[i] = factors.shift;
      }
    }
  }
  const auto normalise = [&](int64_t row, int64_t rows, int64_t width) {
    const int64_t first = start + row * columns;
    ddil::normalise_rows(Kind{}, job.x + first, job.out + first, rows, width, {center, scale, shift}, job.silu);
  };
  at::parallel_for(0, plane.rows, std::max<int64_t>(1, kGrain / columns), [&](int64_t begin, int64_t end) { normalise(begin, end - begin, columns); });
  if (plane.rest > 0) normalise(plane.rows, 1, plane.rest);
}

// Over samples where they are enough for all threads, else over parts of each.
template <typename Body>
void for_each_sample(int64_t num_samples, int64_t length, const Body& body) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  };
  if (num_samples < at::get_num_threads()) return run(0, num_samples);
  at::parallel_for(0, num_samples, std::max<int64_t>(1, kGrain / length), run);
}

// A tensor as floats in order, or undefined.
Tensor floats_of(const Tensor* t) { return t == nullptr ? Tensor() : t->to(at::kFloat).contiguous(); }

template <typename Kind>
void normalise(const Arguments& of, const Tensor& x, const Tensor& out) {
  using Stored = typename Kind::Stored;
  const Tensor weight = floats_of(of.weight), bias = floats_of(of.bias), offset = floats_of(of.offset);
  const auto data = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; };
  const int64_t n = x.size(0), channels = x.size(1), length = x.numel() / n;
  const Job<Kind> job{static_cast<const Stored*>(x.const_data_ptr()), static_cast<Stored*>(out.mutable_data_ptr()), channels, length / channels,
                      of.num_groups, data(weight), data(bias), data(offset), of.eps, of.silu};
  const Plane plane(length, channels, of.num_groups);
  for_each_sample(n, length, [&](int64_t i) { normalise_sample(job, plane, i); });
}

Tensor with_offset(const Tensor& x, const Tensor& offset) {
  std::vector<int64_t> shape(x.dim(), 1);
  std::copy_n(offset.sizes().begin(), 2, shape.begin());
  return at::add(x, offset.view(shape));
}

Tensor one_operation(const Arguments& of) {
  at::NoGradGuard no_grad;
  const auto format = of.x->suggest_memory_format();
  const Tensor x = of.x->contiguous(format);
  const Tensor out = at::empty(x.sizes(), x.options(), format);
  switch (x.scalar_type()) {
    case at::kFloat: normalise<ddil::Float32>(of, x, out); break;
    case at::kBFloat16: normalise<ddil::BFloat16>(of, x, out); break;
    default: normalise<ddil::Float16>(of, x, out);
  }
  return out;
}

// libtorch's own, which also says what is wrong with weights and groups.
Tensor several_operations(const Arguments& of) {
  const Tensor x = of.offset == nullptr ? *of.x : with_offset(*of.x, *of.offset);
  const auto optional = [](const Tensor* t) { return t == nullptr ? std::nullopt : std::optional<Tensor>(*t); };
  const Tensor normed = at::group_norm(x, of.num_groups, optional(of.weight), optional(of.bias), of.eps, /*cudnn_enabled=*/true);
  return of.silu ? at::silu(normed) : normed;
}

void check_arguments(const Arguments& of) {
  constexpr std::array<const char*, 4> names{"x", "weight", "bias", "offset"};
  const auto tensors = of.tensors();
  for (size_t i = 0; i < names.size(); ++i) {
    TORCH_CHECK(tensors[i] == nullptr || tensors[i]->defined(), "`", names[i], "` is an undefined tensor");
  }
  const Tensor& x = *of.x;
  TORCH_CHECK(x.dim() >= 2, "`x` has shape ", x.sizes(), ", but must have a batch and channels");
  if (of.offset == nullptr) return;
  const Tensor& offset = *of.offset;
  TORCH_CHECK(offset.sizes() == x.sizes().slice(0, 2), "`offset` has shape ", offset.sizes(), ", but `x` of shape ", x.sizes(), " asks for ", x.sizes().slice(0, 2));
  TORCH_CHECK(offset.device() == x.device(), "`x` is on ", x.device(), ", but `offset` is on ", offset.device());
}

// Whether the channels of a pixel lie side by side, or would after a copy to the order that libtorch suggests.
bool is_side_by_side(const Tensor& x) {
  return x.suggest_memory_format() != at::MemoryFormat::Contiguous || x.numel() == x.size(0) * x.size(1);
}

bool is_plain(const Tensor& t) { return t.is_cpu() && t.layout() == at::kStrided && !t.is_neg() && !t._is_zerotensor(); }

// Whether an operation of ours means the same as ATen's.
bool suits_one_operation(const Arguments& of) {
  const Tensor& x = *of.x;
  const auto kind = x.scalar_type();
  if (kind != at::kFloat && kind != at::kBFloat16 && kind != at::kHalf) return false;
  if (x.numel() == 0 || of.num_groups <= 0 || x.size(1) % of.num_groups != 0) return false;
  for (const Tensor* t : {of.weight, of.bias}) {
    if (t == nullptr) continue;
    if (t->scalar_type() != at::kFloat && t->scalar_type() != kind) return false;
    if (t->dim() != 1 || t->size(0) != x.size(1)) return false;
  }
  // Of another kind it could change that of the sum.
  if (of.offset != nullptr && of.offset->scalar_type() != kind) return false;
  for (const Tensor* t : of.tensors()) {
    if (t == nullptr) continue;
    if (!is_plain(*t) || (at::GradMode::is_enabled() && t->requires_grad())) return false;
  }
  return is_side_by_side(x);
}

}  // namespace

DDIL_EXPORT int ddil_group_norm(const Tensor* x, int64_t num_groups, const Tensor* weight, const Tensor* bias, const Tensor* offset, double eps, bool silu,
                                Tensor** out) noexcept {
  return ddil::guarded([&] {
    const Arguments of{x, num_groups, weight, bias, offset, eps, silu};
    check_arguments(of);
    *out = new Tensor(suits_one_operation(of) ? one_operation(of) : several_operations(of));
  });
}
