// Products of matrices of bfloat16 by AMX, where the compiler knows it, the CPU has it and the system
// lets a process use it: 32 rows by 32 columns at a time, each the sum of 32 products an instruction.
//
// A sum depends on its own row and column alone, and zeros on either side add nothing to it.

#pragma once

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "vector.h"

#if defined(__x86_64__) && defined(__AVX512BF16__) && \
    (defined(__AMX_BF16__) || defined(__AMXBF16__))
#define LMINF_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lminf {

constexpr int64_t kHalf = 16;           // rows of a tile
constexpr int64_t kBlock = 2 * kHalf;   // rows that share the loads of keys and values
constexpr int64_t kDepth = 32;          // products that an instruction sums up

#if defined(LMINF_AMX)
constexpr bool kHasAmx = true;

// 1 if this process may use tiles, 0 if the CPU has none, and the system's error number, negated,
// if it refuses them. The system is asked once.
inline int ask_for_amx() {
  static const int answer = [] {
    unsigned a, b, c, d;
    constexpr unsigned wanted = 1u << 22 | 1u << 24;  // AMX-BF16 and AMX-TILE
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & wanted) != wanted) return 0;
    constexpr int ask_for_permission = 0x1023, tile_data = 18;  // of Linux, and of the CPU's state
    if (syscall(SYS_arch_prctl, ask_for_permission, tile_data) == 0) return 1;
    return -errno;
  }();
  return answer;
}

// Tiles of 16 rows of 64 bytes in this thread, as long as it lives.
class AmxSession {
 public:
  explicit AmxSession(bool needed) : needed_(needed) {
    if (!needed) return;
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof config == 64, "as the CPU reads it");
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  ~AmxSession() {
    if (needed_) asm volatile("tilerelease" ::: "memory");
  }
  AmxSession(const AmxSession&) = delete;
  AmxSession& operator=(const AmxSession&) = delete;

 private:
  const bool needed_;
};

// As macros, since a tile's number is part of the instruction's name. Strides are in bytes.
#define LMINF_TILE_LOAD(tile, from, stride)                                             \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(int64_t{stride}) \
               : "memory")
#define LMINF_TILE_STORE(tile, to, stride)                                               \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(int64_t{stride}) \
               : "memory")
#define LMINF_TILE_CLEAR(tile) asm volatile("tilezero %%tmm" #tile ::)
#define LMINF_TILE_MULTIPLY(sum, left, right) \
  asm volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sum ::)

// scores[row][key] for `halves` times 16 rows and pairs of groups of 16 keys. Strides count elements.
template <int halves>
void multiply_keys_by_amx(const uint16_t* query, int64_t head_size, const uint16_t* const* keys,
                            int64_t pairs, float* scores, int64_t scores_stride) {
  const int64_t query_bytes = 2 * head_size, score_bytes = 4 * scores_stride;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    LMINF_TILE_CLEAR(0);
    LMINF_TILE_CLEAR(1);
    if (halves == 2) {
      LMINF_TILE_CLEAR(2);
      LMINF_TILE_CLEAR(3);
    }
    const uint16_t *first = keys[2 * pair], *second = keys[2 * pair + 1];
    for (int64_t d = 0; d < head_size; d += kDepth) {
      LMINF_TILE_LOAD(4, query + d, query_bytes);
      LMINF_TILE_LOAD(6, first + d * kLanes, 64);
      LMINF_TILE_MULTIPLY(0, 4, 6);
      LMINF_TILE_LOAD(7, second + d * kLanes, 64);
      LMINF_TILE_MULTIPLY(1, 4, 7);
      if (halves == 2) {
        LMINF_TILE_LOAD(5, query + kHalf * head_size + d, query_bytes);
        LMINF_TILE_MULTIPLY(2, 5, 6);
        LMINF_TILE_MULTIPLY(3, 5, 7);
      }
    }
    float* to = scores + pair * kDepth;
    LMINF_TILE_STORE(0, to, score_bytes);
    LMINF_TILE_STORE(1, to + kLanes, score_bytes);
    if (halves == 2) {
      to += kHalf * scores_stride;
      LMINF_TILE_STORE(2, to, score_bytes);
      LMINF_TILE_STORE(3, to + kLanes, score_bytes);
    }
  }
}

// output[row][dimension] += weights[row] @ values, for `halves` times 16 rows and pairs of groups of
// 16 values.
template <int halves>
void multiply_values_by_amx(const uint16_t* weights, int64_t weights_stride,
                              const uint16_t* const* values, int64_t pairs, int64_t head_size,
                              float* output) {
  const int64_t weight_bytes = 2 * weights_stride, value_bytes = 4 * head_size;
  for (int64_t d = 0; d < head_size; d += kDepth) {
    float *upper = output + d, *lower = upper + kHalf * head_size;
    LMINF_TILE_LOAD(0, upper, value_bytes);
    LMINF_TILE_LOAD(1, upper + kLanes, value_bytes);
    if (halves == 2) {
      LMINF_TILE_LOAD(2, lower, value_bytes);
      LMINF_TILE_LOAD(3, lower + kLanes, value_bytes);
    }
    for (int64_t pair = 0; pair < pairs; ++pair) {
      LMINF_TILE_LOAD(4, weights + pair * kDepth, weight_bytes);
      LMINF_TILE_LOAD(6, values[pair] + 2 * d, value_bytes);
      LMINF_TILE_MULTIPLY(0, 4, 6);
      LMINF_TILE_LOAD(7, values[pair] + 2 * (d + kLanes), value_bytes);
      LMINF_TILE_MULTIPLY(1, 4, 7);
      if (halves == 2) {
        LMINF_TILE_LOAD(5, weights + kHalf * weights_stride + pair * kDepth, weight_bytes);
        LMINF_TILE_MULTIPLY(2, 5, 6);
        LMINF_TILE_MULTIPLY(3, 5, 7);
      }
    }
    LMINF_TILE_STORE(0, upper, value_bytes);
    LMINF_TILE_STORE(1, upper + kLanes, value_bytes);
    if (halves == 2) {
      LMINF_TILE_STORE(2, lower, value_bytes);
      LMINF_TILE_STORE(3, lower + kLanes, value_bytes);
    }
  }
}

// The sum, or the highest, of each of 16 vectors' lanes; in the same order for every vector.
template <typename Combine>
__m512 across(const __m512* vectors, Combine combine) {
  __m512 quads[4];
  for (int q = 0; q < 4; ++q) {
    const __m512 *v = vectors + 4 * q, a = v[0], b = v[1], c = v[2], d = v[3];
    const __m512 ab = combine(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = combine(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    quads[q] = combine(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  }
  const auto halve = [&](__m512 a, __m512 b) {
    return combine(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return halve(halve(quads[0], quads[1]), halve(quads[2], quads[3]));
}

// 2**x for x <= 0, to a relative 3e-6; 0 where that is less than the smallest number, NaN for NaN.
inline __m512 exp2_for_bfloat16(__m512 x) {
  const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 power = _mm512_set1_ps(1.3426686e-2f);
  power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(5.2242473e-2f));
  power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(2.4128021e-1f));
  power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(6.9304484e-1f));
  power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(power, x);
}

// Turns the scores of 16 rows into weights, which take the scores' place, relative to the rows'
// highest scores so far. Leaves by how much what was summed up before has to shrink.
inline void soften_by_amx(float* scores, int64_t stride, int64_t pairs, float factor, float* highest,
                          float* sums, float* decay) {
  __m512 vectors[kHalf];
  for (int64_t r = 0; r < kHalf; ++r) {
    const float* from = scores + r * stride;
    __m512 even = _mm512_loadu_ps(from), odd = _mm512_loadu_ps(from + kLanes);
    for (int64_t pair = 1; pair < pairs; ++pair) {
      even = _mm512_max_ps(even, _mm512_loadu_ps(from + pair * kDepth));
      odd = _mm512_max_ps(odd, _mm512_loadu_ps(from + pair * kDepth + kLanes));
    }
    vectors[r] = _mm512_max_ps(even, odd);
  }
  const __m512 scale = _mm512_set1_ps(factor), before = _mm512_loadu_ps(highest);
  const __m512 found = across(vectors, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
  const __m512 top = _mm512_max_ps(before, _mm512_mul_ps(found, scale));
  const __mmask16 seen = _mm512_cmp_ps_mask(top, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
  const __m512 reference = _mm512_maskz_mov_ps(seen, top);
  const __m512 shrink = exp2_for_bfloat16(_mm512_sub_ps(before, reference));
  alignas(64) float references[kHalf];
  _mm512_store_ps(references, reference);
  for (int64_t r = 0; r < kHalf; ++r) {
    float* row = scores + r * stride;
    const __m512 shift = _mm512_set1_ps(references[r]);
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const __m512 a = _mm512_loadu_ps(row + pair * kDepth);
      const __m512 b = _mm512_loadu_ps(row + pair * kDepth + kLanes);
      const __m512 first = exp2_for_bfloat16(_mm512_fmsub_ps(a, scale, shift));
      const __m512 second = exp2_for_bfloat16(_mm512_fmsub_ps(b, scale, shift));
      even = _mm512_add_ps(even, first);
      odd = _mm512_add_ps(odd, second);
      const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
      std::memcpy(row + pair * kLanes, &both, sizeof both);
    }
    vectors[r] = _mm512_add_ps(even, odd);
  }
  const __m512 added = across(vectors, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
  _mm512_storeu_ps(sums, _mm512_fmadd_ps(_mm512_loadu_ps(sums), shrink, added));
  _mm512_storeu_ps(highest, top);
  _mm512_store_ps(decay, shrink);
}

#undef LMINF_TILE_LOAD
#undef LMINF_TILE_STORE
#undef LMINF_TILE_CLEAR
#undef LMINF_TILE_MULTIPLY
#else
constexpr bool kHasAmx = false;
inline int ask_for_amx() { return 0; }
struct AmxSession {
  explicit AmxSession(bool) {}
};
// Declared for code that is never made.
template <int halves>
void multiply_keys_by_amx(const uint16_t*, int64_t, const uint16_t* const*, int64_t, float*, int64_t);
template <int halves>
void multiply_values_by_amx(const uint16_t*, int64_t, const uint16_t* const*, int64_t, int64_t,
                            float*);
void soften_by_amx(float*, int64_t, int64_t, float, float*, float*, float*);
#endif

// Which storage types it takes.
template <typename T>
constexpr bool kByAmx = kHasAmx && std::is_same_v<T, BFloat16>;

}  // namespace lminf
