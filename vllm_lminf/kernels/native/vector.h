// Vectors of 16 lanes, and what the kernels need of them, for every CPU from one source.
//
// Vectors are GCC's and Clang's own vector types: one register with AVX-512, two with AVX2, four
// with NEON. Instructions without a portable spelling have a plain form beside them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "pairs of 16 bits are taken from words of 32: the kernels are for little-endian CPUs"
#endif

namespace lminf {

constexpr int kLanes = 16;

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline void store(float* to, Floats x) { *reinterpret_cast<Floats*>(to) = x; }
inline Floats broadcast(float x) { return x - Floats{}; }
inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// What products are summed up in: a vector or, where a register holds a quarter of one, four, which
// GCC would otherwise keep in memory.
#if defined(__aarch64__)
struct Sums {
  float32x4_t a, b, c, d;
};
inline Sums load_sums(const float* from) {
  return {vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)};
}
inline void store(float* to, Sums x) {
  vst1q_f32(to, x.a);
  vst1q_f32(to + 4, x.b);
  vst1q_f32(to + 8, x.c);
  vst1q_f32(to + 12, x.d);
}
inline Sums operator+(Sums x, Sums y) { return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }
inline Sums operator*(Sums x, float y) { return {x.a * y, x.b * y, x.c * y, x.d * y}; }
#else
using Sums = Floats;
inline Sums load_sums(const float* from) { return load(from); }
#endif

inline float reduce_max(Floats x) {
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

inline float reduce_add(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x));
#else
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
#endif
}

// 2**x for x <= 0, to a relative 2e-7; 0 below -126, NaN for NaN. A polynomial on [-1/2, 1/2], and
// the whole part put into the exponent.
inline Floats exp2_nonpositive(Floats x) {
  const Floats shifter = broadcast(12582912.0f);  // 1.5 * 2**23: adding it rounds to an integer
  Floats bounded = x < broadcast(-126.0f) ? broadcast(-126.0f) : x;
  Floats shifted = bounded + shifter;
  Floats fraction = bounded - (shifted - shifter);
  Floats power = broadcast(1.5403530e-4f);
  power = power * fraction + broadcast(1.3333558e-3f);
  power = power * fraction + broadcast(9.6181291e-3f);
  power = power * fraction + broadcast(5.5504109e-2f);
  power = power * fraction + broadcast(2.4022651e-1f);
  power = power * fraction + broadcast(6.9314718e-1f);
  power = power * fraction + broadcast(1.0f);
  Ints exponent = (reinterpret_cast<Ints>(shifted) << 23) + (127 << 23);
  Floats result = power * reinterpret_cast<Floats>(exponent);
  return x < broadcast(-126.0f) ? Floats{} : result;
}

// What the storage types differ in. A cached key or value is stored in packs of kPack elements that
// belong into one lane; `Operand` is what a lane is multiplied with. `unpack` turns 16 packs into
// kPack vectors, `pack` does the reverse.

struct Float32 {
  using Stored = float;
  using Operand = float;
  static constexpr int kPack = 1;

  static float to_float(Stored x) { return x; }
  static Stored from_float(float x) { return x; }
  static Floats widen(const Stored* from) { return load(from); }
  static void narrow(Stored* to, Floats x) { store(to, x); }
  static void operands(Operand* to, Floats x) { store(to, x); }
  static void unpack(Floats* to, const Stored* packs) { to[0] = load(packs); }
  static void pack(Stored* packs, const Floats* from) { store(packs, from[0]); }
  static Sums multiply_add(Sums sum, Operand a, const Stored* packs) {
#if defined(__aarch64__)
    return {vfmaq_n_f32(sum.a, vld1q_f32(packs), a), vfmaq_n_f32(sum.b, vld1q_f32(packs + 4), a),
            vfmaq_n_f32(sum.c, vld1q_f32(packs + 8), a),
            vfmaq_n_f32(sum.d, vld1q_f32(packs + 12), a)};
#else
    return sum + broadcast(a) * load(packs);
#endif
  }
};

// float16 in bits, where the CPU or the compiler has no conversion: for one element, or for a vector
// of them. Words and Floats are uint32_t and float, or 16 of each.

template <typename To, typename From>
To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "only the type changes");
  To same;
  std::memcpy(&same, &x, sizeof same);
  return same;
}

template <typename F, typename W>
F half_to_float(W half) {
  const W magnitude = half & 0x7fffu;
  const W rebiased = (magnitude << 13) + (112u << 23);
  // What follows the point of 0.5 counts multiples of 2**-24, as a subnormal half does.
  const W subnormal = bits_as<W>(bits_as<F>(magnitude | (126u << 23)) - 0.5f);
  const W bits = magnitude < 0x400u    ? subnormal
                 : magnitude > 0x7bffu ? rebiased + (112u << 23)  // infinite, or NaN
                                       : rebiased;
  return bits_as<F>(bits | ((half & 0x8000u) << 16));
}

// To the nearest, ties to even.
template <typename W, typename F>
W half_from_float(F x) {
  const W word = bits_as<W>(x), magnitude = word & 0x7fffffffu;
  const W nearest = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const W subnormal = bits_as<W>(bits_as<F>(magnitude) + 0.5f) - (126u << 23);
  const W nan = (magnitude >> 13 & 0x3ffu) | 0x7e00u, infinity = nan - nan + 0x7c00u;
  const W half = magnitude < 113u << 23     ? subnormal
                 : magnitude > 0x7f800000u  ? nan
                 : magnitude >= 0x477ff000u ? infinity  // 65520, halfway past the largest half
                                            : nearest;
  return half | (word >> 16 & 0x8000u);
}

struct Float16 {
  using Stored = uint16_t;
  using Operand = float;
  static constexpr int kPack = 1;

  static float to_float(Stored x) {
#if defined(__F16C__)
    return _cvtsh_ss(x);
#elif defined(__aarch64__)
    return bits_as<__fp16>(x);
#else
    return half_to_float<float>(uint32_t{x});
#endif
  }
  static Stored from_float(float x) {
#if defined(__F16C__)
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
    return bits_as<Stored>(static_cast<__fp16>(x));
#else
    return static_cast<Stored>(half_from_float<uint32_t>(x));
#endif
  }
  static Floats widen(const Stored* from) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
    Floats x;
    for (int i = 0; i < kLanes; i += 8) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_ps(reinterpret_cast<float*>(&x) + i, _mm256_cvtph_ps(halves));
    }
    return x;
#elif defined(__aarch64__)
    Floats x;
    float* to = reinterpret_cast<float*>(&x);
    for (int i = 0; i < kLanes; i += 4) vst1q_f32(to + i, four(from + i));
    return x;
#else
    return half_to_float<Floats>(
        __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words));
#endif
  }
  static void narrow(Stored* to, Floats x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    for (int i = 0; i < kLanes; i += 8) {
      const __m256 eight = _mm256_loadu_ps(reinterpret_cast<const float*>(&x) + i);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(eight, _MM_FROUND_TO_NEAREST_INT));
    }
#elif defined(__aarch64__)
    const float* from = reinterpret_cast<const float*>(&x);
    for (int i = 0; i < kLanes; i += 4) {
      vst1_u16(to + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i))));
    }
#else
    const Halves packed = __builtin_convertvector(half_from_float<Words>(x), Halves);
    std::memcpy(to, &packed, sizeof packed);
#endif
  }
  static void operands(Operand* to, Floats x) { store(to, x); }
  static void unpack(Floats* to, const Stored* packs) { to[0] = widen(packs); }
  static void pack(Stored* packs, const Floats* from) { narrow(packs, from[0]); }
  static Sums multiply_add(Sums sum, Operand a, const Stored* packs) {
#if defined(__aarch64__)
    return {vfmaq_n_f32(sum.a, four(packs), a), vfmaq_n_f32(sum.b, four(packs + 4), a),
            vfmaq_n_f32(sum.c, four(packs + 8), a), vfmaq_n_f32(sum.d, four(packs + 12), a)};
#else
    return sum + broadcast(a) * widen(packs);
#endif
  }
#if defined(__aarch64__)
  static float32x4_t four(const Stored* from) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
  }
#endif
};

struct BFloat16 {
  using Stored = uint16_t;
  using Operand = uint32_t;  // two elements
  static constexpr int kPack = 2;

  static float to_float(Stored x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  static Stored from_float(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (std::isnan(x)) return static_cast<Stored>((bits >> 16) | 0x40);
    return static_cast<Stored>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  static Floats widen(const Stored* from) {
    Words words = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words);
    return reinterpret_cast<Floats>(words << 16);
  }
  static void narrow(Stored* to, Floats x) {
#if defined(__AVX512BF16__)
    __m256bh packed = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
    std::memcpy(to, &packed, sizeof packed);
#else
    Halves packed = __builtin_convertvector(rounded(x), Halves);
    std::memcpy(to, &packed, sizeof packed);
#endif
  }
  static Words rounded(Floats x) {
    Words bits = reinterpret_cast<Words>(x);
    Words nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Words quiet = (bits >> 16) | 0x40;
    return x != x ? quiet : nearest;
  }
  static void unpack(Floats* to, const Stored* packs) {
    Words pairs = *reinterpret_cast<const Words*>(packs);
    to[0] = reinterpret_cast<Floats>(pairs << 16);
    to[1] = reinterpret_cast<Floats>(pairs & 0xffff0000u);
  }
  static void pack(Stored* packs, const Floats* from) {
    Words pairs = rounded(from[0]) | (rounded(from[1]) << 16);
    std::memcpy(packs, &pairs, sizeof pairs);
  }
  // Consecutive elements form the pairs of an operand.
  static void operands(Operand* to, Floats x) { narrow(reinterpret_cast<Stored*>(to), x); }
  static Sums multiply_add(Sums sum, Operand a, const Stored* packs) {
#if defined(__AVX512BF16__)
    __m512i pairs = _mm512_loadu_si512(packs);
    return reinterpret_cast<Floats>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                         reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))),
                         reinterpret_cast<__m512bh>(pairs)));
#elif defined(__aarch64__)
    return {four(sum.a, a, packs), four(sum.b, a, packs + 8), four(sum.c, a, packs + 16),
            four(sum.d, a, packs + 24)};
#else
    Floats elements[2];
    unpack(elements, packs);
    sum += broadcast(to_float(static_cast<Stored>(a))) * elements[0];
    return sum + broadcast(to_float(static_cast<Stored>(a >> 16))) * elements[1];
#endif
  }
#if defined(__aarch64__)
  static float32x4_t four(float32x4_t sum, Operand a, const Stored* packs) {
    const uint32x4_t pairs = vreinterpretq_u32_u16(vld1q_u16(packs));
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return vbfdotq_f32(sum, vreinterpretq_bf16_u32(pairs), vreinterpretq_bf16_u32(vdupq_n_u32(a)));
#else
    const float32x4_t first = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
    const float32x4_t second = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
    sum = vfmaq_n_f32(sum, first, to_float(static_cast<Stored>(a)));
    return vfmaq_n_f32(sum, second, to_float(static_cast<Stored>(a >> 16)));
#endif
  }
#endif
};

}  // namespace lminf
