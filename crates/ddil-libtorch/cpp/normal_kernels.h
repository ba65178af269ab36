// The two loops behind normal numbers, for the widest instructions of the processor. Independent of libtorch.
#pragma once

#include <cstdint>

namespace ddil {

constexpr int64_t kTwisterWords = 624;
// Numbers computed together: the first half from the logarithms of 8 words and the angles of 8, the second from the same.
constexpr int64_t kNormalGroup = 16;

struct NormalKernels {
  // Replaces the words of a Mersenne Twister (MT19937, Matsumoto and Nishimura 1998) by the next ones.
  void (*next_words)(uint32_t* words);
  // Turns untempered words into normal numbers in place, by Box and Muller's transform, one group at a time.
  void (*transform)(float* words, int64_t num_groups);
};

// Null if this processor is not supported.
const NormalKernels* normal_kernels();

}  // namespace ddil
