// Products of quantised keys and queries, in whole numbers: 16 keys at a time, two elements a step.
//
// A sum of 512 products of 32767 and 127 at most fits into 32 bits, so sums are exact and the same
// on every CPU.

#pragma once

#include <cstdint>
#include <cstring>

#include "vector.h"

namespace lminf {

constexpr int64_t kMaxCodedSize = 512;  // elements of a key

#if defined(__AVX512BW__)
constexpr int kSumLanes = 16;
#elif defined(__AVX2__)
constexpr int kSumLanes = 8;
#else
constexpr int kSumLanes = 4;
#endif
constexpr int kSumParts = kLanes / kSumLanes;
typedef int32_t NativeSums __attribute__((vector_size(4 * kSumLanes)));

// The arithmetic of one part of 16 lanes: `Codes` are two codes a lane as 16 bits, `widen` reads
// them, and `add` adds their products with a pair of a query's elements, the lower one first.
#if defined(__AVX512BW__)
using SumPart = __m512i;
using Codes = __m512i;
inline Codes widen_codes(const int8_t* from) { return _mm512_cvtepi8_epi16(read<__m256i>(from)); }
inline SumPart add_codes(SumPart sum, Codes codes, int32_t pair) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, codes, _mm512_set1_epi32(pair));
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(codes, _mm512_set1_epi32(pair)));
#endif
}
#elif defined(__AVX2__)
using SumPart = __m256i;
using Codes = __m256i;
inline Codes widen_codes(const int8_t* from) { return _mm256_cvtepi8_epi16(read<__m128i>(from)); }
inline SumPart add_codes(SumPart sum, Codes codes, int32_t pair) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(codes, _mm256_set1_epi32(pair)));
}
#elif defined(__x86_64__)
using SumPart = __m128i;
using Codes = __m128i;
inline Codes widen_codes(const int8_t* from) {
  const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm_srai_epi16(_mm_unpacklo_epi8(codes, codes), 8);
}
inline SumPart add_codes(SumPart sum, Codes codes, int32_t pair) {
  return _mm_add_epi32(sum, _mm_madd_epi16(codes, _mm_set1_epi32(pair)));
}
#elif defined(__aarch64__)
using SumPart = int32x4_t;
using Codes = int16x8_t;
inline Codes widen_codes(const int8_t* from) { return vmovl_s8(vld1_s8(from)); }
inline SumPart add_codes(SumPart sum, Codes codes, int32_t pair) {
  const int16x8_t pairs = vreinterpretq_s16_s32(vdupq_n_s32(pair));
  const int32x4_t low = vmull_s16(vget_low_s16(codes), vget_low_s16(pairs));
  const int32x4_t high = vmull_high_s16(codes, pairs);
  return vaddq_s32(sum, vpaddq_s32(low, high));
}
#else
typedef int32_t SumPart __attribute__((vector_size(16)));
struct Codes {
  SumPart element[2];
};
inline Codes widen_codes(const int8_t* from) {
  return {{SumPart{from[0], from[2], from[4], from[6]},
           SumPart{from[1], from[3], from[5], from[7]}}};
}
inline SumPart add_codes(SumPart sum, Codes codes, int32_t pair) {
  return sum + codes.element[0] * static_cast<int16_t>(pair) + codes.element[1] * (pair >> 16);
}
#endif

// products[row][g] for `rows` queries and `groups` groups of 16 keys. Meanwhile as much is fetched
// from `next` on as the codes take.
template <int rows, int groups>
inline void multiply_codes(const int32_t* pairs, int64_t pairs_stride, const int8_t* codes,
                           int64_t num_pairs, const int8_t* next,
                           Floats (&products)[rows][groups]) {
  constexpr int64_t line = 64;  // bytes that are fetched at once: two steps of a group
  NativeSums sums[rows][groups * kSumParts] = {};
  for (int64_t step = 0; step < num_pairs; step += 2) {
    for (int g = 0; g < groups; ++g) {
      __builtin_prefetch(next + (step / 2 * groups + g) * line);
      for (int s = 0; s < 2; ++s) {
        for (int p = 0; p < kSumParts; ++p) {
          const Codes part = widen_codes(
              codes + 2 * (kLanes * (g * num_pairs + step + s) + p * kSumLanes));
          for (int row = 0; row < rows; ++row) {
            NativeSums& sum = sums[row][g * kSumParts + p];
            sum = reinterpret_cast<NativeSums>(add_codes(
                reinterpret_cast<SumPart>(sum), part, pairs[row * pairs_stride + step + s]));
          }
        }
      }
    }
  }
  for (int row = 0; row < rows; ++row) {
    for (int g = 0; g < groups; ++g) {
      NativeSums whole[kSumParts];
      for (int p = 0; p < kSumParts; ++p) whole[p] = sums[row][g * kSumParts + p];
      products[row][g] = each([&](int p) {
        const char* from = reinterpret_cast<const char*>(whole) + p * sizeof(NativeInts);
        return __builtin_convertvector(read<NativeInts>(from), NativeFloats);
      });
    }
  }
}

// Which lanes are not below others: as bits, the first lane the lowest. NaN is below nothing.
inline uint32_t not_below(Floats a, Floats b) {
  uint32_t bits = 0;
  for (int p = 0; p < kParts; ++p) {
#if defined(__AVX512F__)
    bits |= static_cast<uint32_t>(_mm512_cmp_ps_mask(reinterpret_cast<__m512>(a.part[p]),
                                                     reinterpret_cast<__m512>(b.part[p]),
                                                     _CMP_NLT_UQ));
#elif defined(__AVX2__)
    const __m256 mask = _mm256_cmp_ps(reinterpret_cast<__m256>(a.part[p]),
                                      reinterpret_cast<__m256>(b.part[p]), _CMP_NLT_UQ);
    bits |= static_cast<uint32_t>(_mm256_movemask_ps(mask)) << (p * kNative);
#else
    for (int lane = 0; lane < kNative; ++lane) {
      bits |= static_cast<uint32_t>(!(a.part[p][lane] < b.part[p][lane])) << (p * kNative + lane);
    }
#endif
  }
  return bits;
}

}  // namespace lminf
