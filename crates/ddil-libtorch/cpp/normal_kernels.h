// The two loops behind normal numbers, for the widest instructions that the processor has. Nothing of libtorch is here.
#pragma once

#include <cstdint>

namespace ddil {

constexpr int64_t kTwisterWords = 624;
// Numbers that are made together: the first half from the logarithms of 8 words and the angles of 8, the second with them.
constexpr int64_t kNormalGroup = 16;

struct NormalKernels {
  // Replaces the words of a Mersenne Twister (MT19937, Matsumoto and Nishimura 1998) by the next ones.
  void (*next_words)(uint32_t* words);
  // Makes normal numbers of untempered words in place, by Box and Muller's transform, a group at a time.
  void (*transform)(float* words, int64_t num_groups);
};

// Null where there are none for this processor.
const NormalKernels* normal_kernels();

}  // namespace ddil
