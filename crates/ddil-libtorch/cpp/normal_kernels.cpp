#include "normal_kernels.h"

#include "clones.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)

namespace ddil {
namespace {

DDIL_INLINE uint32_t twisted(uint32_t upper, uint32_t lower) {
  const uint32_t mixed = (upper & 0x80000000U) | (lower & 0x7fffffffU);
  return (mixed >> 1) ^ ((0U - (lower & 1U)) & 0x9908b0dfU);
}

DDIL_INLINE void next_words(uint32_t* words) {
  constexpr int64_t n = kTwisterWords, m = 397;
  for (int64_t i = 0; i < n - m; ++i) words[i] = words[i + m] ^ twisted(words[i], words[i + 1]);
  for (int64_t i = n - m; i < n - 1; ++i) words[i] = words[i + m - n] ^ twisted(words[i], words[i + 1]);
  words[n - 1] = words[m - 1] ^ twisted(words[n - 1], words[0]);
}

// Masks instead of branches, which would prevent vectorization.
DDIL_INLINE uint32_t all_ones_if(bool condition) { return 0U - static_cast<uint32_t>(condition); }

DDIL_INLINE uint32_t chosen(uint32_t mask, float yes, float no) {
  return (same_bits<uint32_t>(yes) & mask) | (same_bits<uint32_t>(no) & ~mask);
}

// The low 24 bits of a word of the twister after tempering, as a fraction of 2^24.
DDIL_INLINE float uniform(uint32_t word) {
  word ^= word >> 11;
  word ^= (word << 7) & 0x9d2c5680U;
  word ^= (word << 15) & 0xefc60000U;
  word ^= word >> 18;
  return static_cast<float>(static_cast<int32_t>(word & 0xffffffU)) * 0x1p-24F;
}

// The functions below are Cephes' single-precision ones (Moshier). Which products are rounded before the addition follows
// libtorch as compiled: every bit depends on it.

DDIL_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// For a normal number above 0.
DDIL_INLINE float logarithm(float v) {
  const uint32_t bits = same_bits<uint32_t>(v);
  // v = x 2^e with x from 1/2 to 1, then from sqrt(1/2) to sqrt(2), less 1.
  float x = same_bits<float>((bits & 0x007fffffU) | 0x3f000000U);
  const uint32_t low = all_ones_if(x < 0.707106781186547524F);
  const float e = static_cast<float>(static_cast<int32_t>((bits >> 23) - 126U + low));
  x = (x - 1.0F) + same_bits<float>(same_bits<uint32_t>(x) & low);
  const float z = x * x;
  float y = 7.0376836292e-2F;
  y = fma(y, x, -1.1514610310e-1F);
  y = fma(y, x, 1.1676998740e-1F);
  y = fma(y, x, -1.2420140846e-1F);
  y = fma(y, x, 1.4249322787e-1F);
  y = fma(y, x, -1.6668057665e-1F);
  y = fma(y, x, 2.0000714765e-1F);
  y = fma(y, x, -2.4999993993e-1F);
  y = fma(y, x, 3.3333331174e-1F);
  y = fma(y * x, z, e * -2.12194440e-4F);
  y = fma(z, -0.5F, y);
  return fma(e, 0.693359375F, x + y);
}

struct Direction {
  float cosine, sine;
};

// For an angle from 0 to 2 pi.
DDIL_INLINE Direction direction(float angle) {
  // The octant, odd ones rounded up to the next, and the angle from there, for which sine and cosine may be swapped.
  const int32_t octant = (static_cast<int32_t>(angle * 1.27323954473516F) + 1) & ~1;
  const float quarter = static_cast<float>(octant);
  float x = fma(quarter, -0.78515625F, angle);
  x = fma(quarter, -2.4187564849853515625e-4F, x);
  x = fma(quarter, -3.77489497744594108e-8F, x);
  const float z = x * x;
  float c = 2.443315711809948e-5F;
  c = fma(c, z, -1.388731625493765e-3F);
  c = fma(c, z, 4.166664568298827e-2F);
  c = fma(c * z, z, z * -0.5F) + 1.0F;
  float s = -1.9515295891e-4F;
  s = fma(s, z, 8.3321608736e-3F);
  s = fma(s, z, -1.6666654611e-1F);
  s = fma(s * z, x, x);
  const uint32_t turned = all_ones_if((octant & 2) != 0);
  const uint32_t cosine_sign = static_cast<uint32_t>((octant + 2) & 4) << 29;
  const uint32_t sine_sign = static_cast<uint32_t>(octant & 4) << 29;
  return {same_bits<float>(chosen(turned, s, c) ^ cosine_sign), same_bits<float>(chosen(turned, c, s) ^ sine_sign)};
}

DDIL_INLINE void normal_pair(uint32_t word, uint32_t other, float& first, float& second) {
  const float radius = __builtin_sqrtf(-2.0F * logarithm(1.0F - uniform(word)));
  const Direction at = direction(6.28318530717958647692F * uniform(other));
  // Adding the mean turns -0 into 0.
  first = fma(radius, at.cosine, 0.0F);
  second = fma(radius, at.sine, 0.0F);
}

// Groups are split so that one loop fills registers of any width.
DDIL_INLINE void transform(float* words, int64_t num_groups) {
  constexpr int64_t most = 32, half = kNormalGroup / 2;
  constexpr size_t bytes = half * sizeof(float);
  alignas(64) uint32_t word[most * half], other[most * half];
  alignas(64) float first[most * half], second[most * half];
  for (int64_t begin = 0; begin < num_groups; begin += most) {
    const int64_t count = std::min(most, num_groups - begin);
    float* at = words + begin * kNormalGroup;
    for (int64_t g = 0; g < count; ++g) {
      std::memcpy(word + g * half, at + g * kNormalGroup, bytes);
      std::memcpy(other + g * half, at + g * kNormalGroup + half, bytes);
    }
    for (int64_t i = 0; i < count * half; ++i) normal_pair(word[i], other[i], first[i], second[i]);
    for (int64_t g = 0; g < count; ++g) {
      std::memcpy(at + g * kNormalGroup, first + g * half, bytes);
      std::memcpy(at + g * kNormalGroup + half, second + g * half, bytes);
    }
  }
}

#define DDIL_NORMAL_KERNELS(NAME, TARGET)                                                                     \
  __attribute__((target(TARGET))) void NAME##_next_words(uint32_t* words) { next_words(words); }             \
  __attribute__((target(TARGET))) void NAME##_transform(float* words, int64_t n) { transform(words, n); }    \
  constexpr NormalKernels NAME{NAME##_next_words, NAME##_transform};

DDIL_NORMAL_KERNELS(avx2, "avx2,fma")
DDIL_NORMAL_KERNELS(avx512, "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")

}  // namespace

const NormalKernels* normal_kernels() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return nullptr;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return wide ? &avx512 : &avx2;
}

}  // namespace ddil

#else

namespace ddil {
const NormalKernels* normal_kernels() { return nullptr; }
}  // namespace ddil

#endif
