// Vectors of 16 lanes, and what the kernels need of them, for every CPU from one source.
//
// Vectors are GCC's and Clang's own vector types: one register with AVX-512, two with AVX2, four
// with NEON. Instructions without a portable spelling have a plain form beside them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
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
  static Floats multiply_add(Floats sum, Operand a, const Stored* packs) {
    return sum + broadcast(a) * load(packs);
  }
};

struct Float16 {
  using Stored = uint16_t;
  using Operand = float;
  static constexpr int kPack = 1;

  static float to_float(Stored x) {
    _Float16 half;
    std::memcpy(&half, &x, sizeof half);
    return static_cast<float>(half);
  }
  static Stored from_float(float x) {
    _Float16 half = static_cast<_Float16>(x);
    Stored bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
  }
  static Floats widen(const Stored* from) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#else
    Floats x;
    for (int i = 0; i < kLanes; ++i) x[i] = to_float(from[i]);
    return x;
#endif
  }
  static void narrow(Stored* to, Floats x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes; ++i) to[i] = from_float(x[i]);
#endif
  }
  static void operands(Operand* to, Floats x) { store(to, x); }
  static void unpack(Floats* to, const Stored* packs) { to[0] = widen(packs); }
  static void pack(Stored* packs, const Floats* from) { narrow(packs, from[0]); }
  static Floats multiply_add(Floats sum, Operand a, const Stored* packs) {
    return sum + broadcast(a) * widen(packs);
  }
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
  static Floats multiply_add(Floats sum, Operand a, const Stored* packs) {
#if defined(__AVX512BF16__)
    __m512i pairs = _mm512_loadu_si512(packs);
    return reinterpret_cast<Floats>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                         reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))),
                         reinterpret_cast<__m512bh>(pairs)));
#else
    Floats elements[2];
    unpack(elements, packs);
    sum += broadcast(to_float(static_cast<Stored>(a))) * elements[0];
    return sum + broadcast(to_float(static_cast<Stored>(a >> 16))) * elements[1];
#endif
  }
};

}  // namespace lminf
