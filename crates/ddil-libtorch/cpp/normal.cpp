#include "normal.h"

#include "normal_kernels.h"
#include "parallel.h"
#include "shim.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>

using at::Generator;
using at::Tensor;

namespace {

static_assert(at::MERSENNE_STATE_N == ddil::kTwisterWords);

// What a thread draws before it transforms it: whole blocks of the twister, whole groups, well within a core's cache.
constexpr int64_t kChunk = 16 * ddil::kTwisterWords;
static_assert(kChunk % ddil::kNormalGroup == 0);

// The words of a generator in their order, not tempered.
class Words {
 public:
  explicit Words(const at::mt19937_data_pod& state) : state_(state) {}

  const at::mt19937_data_pod& state() const { return state_; }

  void draw(const ddil::NormalKernels& kernels, float* out, int64_t n) {
    while (n > 0) {
      // A generator makes new words when it is asked for one and `left_`, which counts that one, falls to 0.
      if (state_.left_ == 1) {
        kernels.next_words(state_.state_.data());
        state_.left_ = at::MERSENNE_STATE_N + 1;
        state_.next_ = 0;
      }
      const int64_t count = std::min<int64_t>(n, state_.left_ - 1);
      std::memcpy(out, state_.state_.data() + state_.next_, count * sizeof *out);
      state_.left_ -= static_cast<int>(count);
      state_.next_ += static_cast<uint32_t>(count);
      out += count;
      n -= count;
    }
  }

 private:
  at::mt19937_data_pod state_;
};

// Held for a few microseconds at a time, in which a thread is not worth putting to sleep.
class Turn {
 public:
  void lock() {
    while (taken_.exchange(true, std::memory_order_acquire)) {
      for (int tries = 0; taken_.load(std::memory_order_relaxed); ++tries) {
        // The one that has it may be waiting for a processor.
        if (tries >= kTries) std::this_thread::yield();
      }
    }
  }
  void unlock() { taken_.store(false, std::memory_order_release); }

 private:
  static constexpr int kTries = 4096;
  std::atomic<bool> taken_{false};
};

// Threads take turns at drawing words, which only goes one after another, and transform them side by side.
void fill_groups(const ddil::NormalKernels& kernels, Words& words, const Tensor& tensor) {
  float* const out = tensor.data_ptr<float>();
  const int64_t n = tensor.numel();
  Turn turn;
  int64_t drawn = 0;
  const auto fill_chunks = [&](int64_t, int64_t) {
    while (true) {
      std::unique_lock<Turn> lock(turn);
      const int64_t begin = drawn, count = std::min(kChunk, n - drawn);
      if (count <= 0) return;
      drawn += count;
      words.draw(kernels, out + begin, count);
      lock.unlock();
      kernels.transform(out + begin, count / ddil::kNormalGroup);
    }
  };
  // On as many threads as there are and can be fed; what parts it gives them does not matter.
  ddil::parallel_for((n + kChunk - 1) / kChunk, 1, fill_chunks);
}

// libtorch draws a word for each number, then 16 more for the last 16 numbers where groups of 16 leave a rest.
void fill(const ddil::NormalKernels& kernels, Words& words, const Tensor& tensor) {
  constexpr int64_t group = ddil::kNormalGroup;
  fill_groups(kernels, words, tensor);
  if (tensor.numel() % group == 0) return;
  float* const last = tensor.data_ptr<float>() + tensor.numel() - group;
  words.draw(kernels, last, group);
  kernels.transform(last, 1);
}

bool suits(const Tensor& tensor, const Generator& generator) {
  const bool plain = tensor.is_cpu() && tensor.layout() == at::kStrided && tensor.scalar_type() == at::kFloat && !tensor.is_neg() && !tensor._is_zerotensor() && !tensor.is_inference();
  // libtorch draws fewer numbers, and those of other strides, one by one from another stream of uniform numbers.
  const bool in_groups = plain && tensor.is_contiguous() && tensor.numel() >= ddil::kNormalGroup;
  const bool records_gradient = at::GradMode::is_enabled() && tensor.requires_grad();
  return in_groups && !records_gradient && generator.device().is_cpu();
}

void fill_itself(const ddil::NormalKernels& kernels, const Tensor& tensor, const Generator& generator) {
  auto* impl = at::check_generator<at::CPUGeneratorImpl>(generator);
  std::lock_guard<std::mutex> lock(impl->mutex_);
  at::mt19937 engine = impl->engine();
  Words words(engine.data());
  fill(kernels, words, tensor);
  engine.set_data(words.state());
  impl->set_engine(engine);
  // As ATen's in-place operations do: autograd must see that a tensor it saved has changed.
  tensor.unsafeGetTensorImpl()->bump_version();
}

// libtorch chooses its own loop by processor and by the environment, and not every one rounds alike. Where a product is
// rounded or not, 2 numbers in 10 000 differ: these are enough to see it.
bool agrees_with_libtorch(const ddil::NormalKernels& kernels) {
  constexpr int64_t n = (1 << 17) + 3;
  at::NoGradGuard no_grad;
  const Generator ours = at::detail::createCPUGenerator(0), theirs = at::detail::createCPUGenerator(0);
  const Tensor numbers = at::empty({n}, at::kFloat), expected = at::empty({n}, at::kFloat);
  expected.normal_(0.0, 1.0, theirs);
  fill_itself(kernels, numbers, ours);
  return at::equal(numbers.view(at::kInt), expected.view(at::kInt)) && at::equal(ours.get_state(), theirs.get_state());
}

// The loops, if they are to be used here.
const ddil::NormalKernels* trusted_kernels() {
  static const ddil::NormalKernels* const trusted = [] {
    const ddil::NormalKernels* kernels = ddil::normal_kernels();
    return kernels != nullptr && agrees_with_libtorch(*kernels) ? kernels : nullptr;
  }();
  return trusted;
}

}  // namespace

bool ddil::fills_normal_itself() { return trusted_kernels() != nullptr; }

void ddil::fill_normal(const Tensor& tensor, const Generator& generator) {
  const NormalKernels* kernels = suits(tensor, generator) ? trusted_kernels() : nullptr;
  if (kernels != nullptr) {
    fill_itself(*kernels, tensor, generator);
  } else {
    tensor.normal_(0.0, 1.0, generator);
  }
}
