// Vectors of 16 lanes, and what the kernels need of them, for every CPU from one source.
//
// A vector is as many of the machine's registers as 16 floats take: one with AVX-512, two with AVX,
// four with NEON or SSE. It is a structure of them, since compilers keep a vector type that is wider
// than a register in memory. The registers are GCC's and Clang's own vector types; instructions
// without a portable spelling have a plain form beside them.

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
#if defined(__AVX512F__)
constexpr int kNative = 16;
#elif defined(__AVX2__)
constexpr int kNative = 8;
#else
constexpr int kNative = 4;
#endif
constexpr int kParts = kLanes / kNative;

typedef float NativeFloats __attribute__((vector_size(4 * kNative)));
typedef int32_t NativeInts __attribute__((vector_size(4 * kNative)));
typedef uint32_t NativeWords __attribute__((vector_size(4 * kNative)));
typedef uint16_t NativeHalves __attribute__((vector_size(2 * kNative)));

struct Floats {
  NativeFloats part[kParts];
};

struct Words {
  NativeWords part[kParts];
};

// Calls function(p) for every part; the result's parts are what it returns.
template <typename Vector = Floats, typename Function>
inline __attribute__((always_inline)) Vector each(Function function) {
  Vector result;
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) result.part[p] = function(p);
  return result;
}

template <typename Native>
inline __attribute__((always_inline)) Native read(const void* from) {
  Native x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline __attribute__((always_inline)) NativeFloats all(float x) { return x - NativeFloats{}; }

inline Floats load(const float* from) {
  return each([=](int p) { return read<NativeFloats>(from + p * kNative); });
}
inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }
inline Floats broadcast(float x) {
  return each([=](int) { return all(x); });
}
inline Floats operator+(Floats a, Floats b) {
  return each([&](int p) { return a.part[p] + b.part[p]; });
}
inline Floats operator-(Floats a, Floats b) {
  return each([&](int p) { return a.part[p] - b.part[p]; });
}
inline Floats operator*(Floats a, Floats b) {
  return each([&](int p) { return a.part[p] * b.part[p]; });
}
inline Floats& operator+=(Floats& a, Floats b) { return a = a + b; }
// sum + a * b, in one expression so that compilers make one instruction of it.
inline Floats multiply_add(Floats sum, Floats a, Floats b) {
  return each([&](int p) { return sum.part[p] + a.part[p] * b.part[p]; });
}
inline Floats maximum(Floats a, Floats b) {
  return each([&](int p) { return a.part[p] > b.part[p] ? a.part[p] : b.part[p]; });
}

inline float reduce_max(Floats x) {
  NativeFloats best = x.part[0];
  for (int p = 1; p < kParts; ++p) best = best > x.part[p] ? best : x.part[p];
  float highest = best[0];
  for (int i = 1; i < kNative; ++i) highest = best[i] > highest ? best[i] : highest;
  return highest;
}

inline float reduce_add(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x.part[0]));
#else
  NativeFloats sums = x.part[0];
  for (int p = 1; p < kParts; ++p) sums += x.part[p];
  float sum = 0.0f;
  for (int i = 0; i < kNative; ++i) sum += sums[i];
  return sum;
#endif
}

// 2**x for x <= 0, to a relative 2e-7; 0 below -126, NaN for NaN. A polynomial on [-1/2, 1/2], and
// the whole part put into the exponent.
inline __attribute__((always_inline)) NativeFloats exp2_nonpositive(NativeFloats x) {
  const NativeFloats shifter = all(12582912.0f);  // 1.5 * 2**23: adding it rounds to an integer
  NativeFloats bounded = x < all(-126.0f) ? all(-126.0f) : x;
  NativeFloats shifted = bounded + shifter;
  NativeFloats fraction = bounded - (shifted - shifter);
  NativeFloats power = all(1.5403530e-4f);
  power = power * fraction + all(1.3333558e-3f);
  power = power * fraction + all(9.6181291e-3f);
  power = power * fraction + all(5.5504109e-2f);
  power = power * fraction + all(2.4022651e-1f);
  power = power * fraction + all(6.9314718e-1f);
  power = power * fraction + all(1.0f);
  NativeInts exponent = (reinterpret_cast<NativeInts>(shifted) << 23) + (127 << 23);
  NativeFloats result = power * reinterpret_cast<NativeFloats>(exponent);
  return x < all(-126.0f) ? NativeFloats{} : result;
}

inline Floats exp2_nonpositive(Floats x) {
  return each([&](int p) { return exp2_nonpositive(x.part[p]); });
}

// What the storage types differ in. A cached key or value is stored in packs of kPack elements that
// belong into one lane. `unpack` turns 16 packs into kPack vectors, `pack` does the reverse.
//
// A product with 16 packs has kTerms terms, each of a `Term`, made of the packs, and a `Factor`,
// the same for all lanes; an `Operand` holds the factors of all terms.

struct Float32 {
  using Stored = float;
  using Operand = float;
  using Term = Floats;
  using Factor = Floats;
  static constexpr int kPack = 1;
  static constexpr int kTerms = 1;

  static float to_float(Stored x) { return x; }
  static Stored from_float(float x) { return x; }
  static Floats widen(const Stored* from) { return load(from); }
  static void narrow(Stored* to, Floats x) { store(to, x); }
  static void operands(Operand* to, Floats x) { store(to, x); }
  static void unpack(Floats* to, const Stored* packs) { to[0] = load(packs); }
  static void pack(Stored* packs, const Floats* from) { store(packs, from[0]); }
  static Term term(const Stored* packs, int) { return load(packs); }
  static Factor factor(const Operand& operand, int) { return broadcast(operand); }
  static Floats multiply_add(Floats sum, Factor factor, Term term) {
    return lminf::multiply_add(sum, factor, term);
  }
};

// float16 in bits, where the CPU or the compiler has no conversion: for one element, or for a part of
// a vector. W and F are uint32_t and float, or NativeWords and NativeFloats.

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
  using Term = Floats;
  using Factor = Floats;
  static constexpr int kPack = 1;
  static constexpr int kTerms = 1;

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
    return each([=](int p) { return widen_part(from + p * kNative); });
  }
  static void narrow(Stored* to, Floats x) {
    for (int p = 0; p < kParts; ++p) narrow_part(to + p * kNative, x.part[p]);
  }
  static void operands(Operand* to, Floats x) { store(to, x); }
  static void unpack(Floats* to, const Stored* packs) { to[0] = widen(packs); }
  static void pack(Stored* packs, const Floats* from) { narrow(packs, from[0]); }
  static Term term(const Stored* packs, int) { return widen(packs); }
  static Factor factor(const Operand& operand, int) { return broadcast(operand); }
  static Floats multiply_add(Floats sum, Factor factor, Term term) {
    return lminf::multiply_add(sum, factor, term);
  }

 private:
  static inline NativeFloats widen_part(const Stored* from) {
#if defined(__AVX512F__)
    return reinterpret_cast<NativeFloats>(_mm512_cvtph_ps(read<__m256i>(from)));
#elif defined(__AVX2__) && defined(__F16C__)
    return reinterpret_cast<NativeFloats>(_mm256_cvtph_ps(read<__m128i>(from)));
#elif defined(__aarch64__)
    return reinterpret_cast<NativeFloats>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))));
#else
    const NativeHalves halves = read<NativeHalves>(from);
    return half_to_float<NativeFloats>(__builtin_convertvector(halves, NativeWords));
#endif
  }
  static inline void narrow_part(Stored* to, NativeFloats x) {
#if defined(__AVX512F__)
    const __m256i halves =
        _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to, &halves, sizeof halves);
#elif defined(__AVX2__) && defined(__F16C__)
    const __m128i halves =
        _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to, &halves, sizeof halves);
#elif defined(__aarch64__)
    vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(reinterpret_cast<float32x4_t>(x))));
#else
    const NativeHalves packed =
        __builtin_convertvector(half_from_float<NativeWords>(x), NativeHalves);
    std::memcpy(to, &packed, sizeof packed);
#endif
  }
};

// Two elements to a lane. With dot products of bfloat16 one instruction multiplies both; elsewhere
// they are widened, and operands stay in float32.
struct BFloat16 {
  using Stored = uint16_t;
  static constexpr int kPack = 2;
#if defined(__AVX512BF16__)
  using Operand = uint32_t;
  using Term = __m512i;
  using Factor = __m512i;
  static constexpr int kTerms = 1;

  static Term term(const Stored* packs, int) { return _mm512_loadu_si512(packs); }
  static Factor factor(const Operand& operand, int) {
    return _mm512_set1_epi32(static_cast<int>(operand));
  }
  static Floats multiply_add(Floats sum, Factor factor, Term term) {
    return {reinterpret_cast<NativeFloats>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum.part[0]),
                         reinterpret_cast<__m512bh>(factor), reinterpret_cast<__m512bh>(term)))};
  }
  // Consecutive elements form the pairs of an operand.
  static void operands(Operand* to, Floats x) { narrow(reinterpret_cast<Stored*>(to), x); }
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  using Operand = uint32_t;
  using Term = Words;
  using Factor = NativeWords;
  static constexpr int kTerms = 1;

  static Term term(const Stored* packs, int) {
    return each<Words>([=](int p) { return read<NativeWords>(packs + 2 * p * kNative); });
  }
  static Factor factor(const Operand& operand, int) { return operand - NativeWords{}; }
  static Floats multiply_add(Floats sum, Factor factor, Term term) {
    return each([&](int p) {
      return reinterpret_cast<NativeFloats>(
          vbfdotq_f32(reinterpret_cast<float32x4_t>(sum.part[p]),
                      vreinterpretq_bf16_u32(reinterpret_cast<uint32x4_t>(term.part[p])),
                      vreinterpretq_bf16_u32(reinterpret_cast<uint32x4_t>(factor))));
    });
  }
  static void operands(Operand* to, Floats x) { narrow(reinterpret_cast<Stored*>(to), x); }
#else
  struct Operand {
    float element[2];
  };
  using Term = Floats;
  using Factor = Floats;
  static constexpr int kTerms = 2;

  static Term term(const Stored* packs, int element) {
    return each([=](int p) {
      const NativeWords pairs = read<NativeWords>(packs + 2 * p * kNative);
      return reinterpret_cast<NativeFloats>(element == 0 ? pairs << 16 : pairs & 0xffff0000u);
    });
  }
  static Factor factor(const Operand& operand, int element) {
    return broadcast(operand.element[element]);
  }
  static Floats multiply_add(Floats sum, Factor factor, Term term) {
    return lminf::multiply_add(sum, factor, term);
  }
  static void operands(Operand* to, Floats x) { std::memcpy(to, &x, sizeof x); }
#endif

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
    return each([=](int p) {
      const NativeHalves halves = read<NativeHalves>(from + p * kNative);
      return reinterpret_cast<NativeFloats>(__builtin_convertvector(halves, NativeWords) << 16);
    });
  }
  static void narrow(Stored* to, Floats x) {
#if defined(__AVX512BF16__)
    __m256bh packed = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x.part[0]));
    std::memcpy(to, &packed, sizeof packed);
#else
    for (int p = 0; p < kParts; ++p) {
      const NativeHalves packed = __builtin_convertvector(rounded(x.part[p]), NativeHalves);
      std::memcpy(to + p * kNative, &packed, sizeof packed);
    }
#endif
  }
  static void unpack(Floats* to, const Stored* packs) {
    for (int p = 0; p < kParts; ++p) {
      const NativeWords pairs = read<NativeWords>(packs + 2 * p * kNative);
      to[0].part[p] = reinterpret_cast<NativeFloats>(pairs << 16);
      to[1].part[p] = reinterpret_cast<NativeFloats>(pairs & 0xffff0000u);
    }
  }
  static void pack(Stored* packs, const Floats* from) {
    const Words pairs = each<Words>(
        [&](int p) { return rounded(from[0].part[p]) | (rounded(from[1].part[p]) << 16); });
    std::memcpy(packs, &pairs, sizeof pairs);
  }

 private:
  static inline NativeWords rounded(NativeFloats x) {
    const NativeWords bits = reinterpret_cast<NativeWords>(x);
    const NativeWords nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const NativeWords quiet = (bits >> 16) | 0x40;
    return x != x ? quiet : nearest;
  }
};

}  // namespace lminf
