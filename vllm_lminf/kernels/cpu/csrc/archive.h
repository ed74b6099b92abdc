// The archive: how a page is laid out, and how keys, values and the index of the keys get into it.
//
// A page has one part after the other, see `vllm_lminf.kernels.archive.ArchiveFormat`, for H key
// heads of size D and B positions:
//
//     keys     [H][B][D]               without rotation, in the storage type
//     values   [H][B][D]
//     codes    [H][B / 16][D / 2][16][2]  int8
//     scales   [H][B]                  float32
//     radii    [H][B]
//     centres  [H][D]
//
// 16 keys stand side by side in the lanes, with two of their codes each, so that a product with two
// elements of a query adds to 16 sums.
//
// What the numbers of the index promise. With the centre m, the codes c and the scale s of a key,
//
//     k = m + s c + r,            r is what is left,
//
// and with the integers a and the scale t of a query (`quantise`)
//
//     q = t a + e,                |e| <= sqrt(D) / 65000 |q|,
//     q . k = q . m + s t (a . c) + s e . c + q . r.
//
// The estimate E is the first two terms in float32; a . c is a sum of integers, and exact. By Cauchy
// and Schwarz the last two are |q| (|r| + sqrt(D) / 65000 s |c|) at most, with |r| measured in
// double, with m, s and c as they are stored. A sum of n products in float32, in any order, is off
// by n u / (1 - n u) of the sum of their sizes at most, with u = 2**-24 (Higham, Accuracy and
// Stability of Numerical Algorithms, section 3.1). For q . m in E, and for the score q . k of a key
// (`product`), these add up to |q| (|m| + s |c| + |r|) =: |q| z at most. E takes four operations
// more, and E plus or minus the bound takes three; each is off by u of a number that is no more
// than 1.001 |q| z, or than the bound. So all rounding is within (2 D + 32) u |q| z, and
//
//     |product(q, k) - E| <= |q| radius + 2**-100,
//     radius = |r| + sqrt(D) / 65000 s |c| + (2 D + 32) u z + 2**-100.
//
// The two small numbers are more than what is lost below float32's smallest ones, even where such
// are flushed to zero: z is 2**60 at most, |q| is between 2**-80 and 2**60, or 0, and t and s are
// 2**-100 at least, or 0, so nothing overflows and no underflow is multiplied by more than that.
// Where a key is larger, or isn't finite, its radius is infinite; where a query is out of this
// range, its estimates are NaN. Either way the key is scored.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "interface.h"
#include "rotary.h"
#include "threads.h"
#include "vector.h"

namespace lminf {

constexpr float kUnderflow = 0x1p-100f;
constexpr int64_t kCodeLimit = 127;
constexpr int64_t kQueryLimit = 32767;

// Where the parts of a page are.
template <typename T>
class Pages {
  using Stored = typename T::Stored;

 public:
  Pages(const LminfArchive& archive, int64_t num_kv_heads, int64_t head_size)
      : block_size(archive.block_size),
        head_size(head_size),
        base_(static_cast<char*>(archive.pages)),
        page_bytes_(archive.page_bytes),
        kept_(block_size * head_size * sizeof(Stored)),
        values_(num_kv_heads * kept_),
        codes_(2 * values_),
        scales_(codes_ + num_kv_heads * block_size * head_size),
        radii_(scales_ + num_kv_heads * block_size * sizeof(float)),
        centres_(radii_ + num_kv_heads * block_size * sizeof(float)) {}

  Stored* keys(int64_t page, int64_t head) const { return at<Stored>(page, head * kept_); }
  Stored* values(int64_t page, int64_t head) const {
    return at<Stored>(page, values_ + head * kept_);
  }
  int8_t* codes(int64_t page, int64_t head) const {
    return at<int8_t>(page, codes_ + head * block_size * head_size);
  }
  float* scales(int64_t page, int64_t head) const {
    return at<float>(page, scales_ + head * block_size * sizeof(float));
  }
  float* radii(int64_t page, int64_t head) const {
    return at<float>(page, radii_ + head * block_size * sizeof(float));
  }
  float* centre(int64_t page, int64_t head) const {
    return at<float>(page, centres_ + head * head_size * sizeof(float));
  }

  const int64_t block_size;
  const int64_t head_size;

 private:
  template <typename Part>
  Part* at(int64_t page, int64_t offset) const {
    return reinterpret_cast<Part*>(base_ + page * page_bytes_ + offset);
  }

  char* const base_;
  const int64_t page_bytes_, kept_, values_, codes_, scales_, radii_, centres_;
};

inline int64_t code_index(int64_t token, int64_t dimension, int64_t head_size) {
  return (token / kLanes * (head_size / 2) + dimension / 2) * 2 * kLanes + token % kLanes * 2 +
         dimension % 2;
}

// The smallest float32 that is no less than x.
inline float rounded_up(double x) {
  const float nearest = static_cast<float>(x);
  return nearest < x ? std::nextafter(nearest, std::numeric_limits<float>::infinity()) : nearest;
}

// To the nearest whole number, of a size up to 2**50.
inline double rounded(double x) { return (x + 0x1.8p52) - 0x1.8p52; }

// The length of a vector, in double. Sums of their own for each lane, so that compilers use vectors.
inline double length(const double* x, int64_t size) {
  double sums[kLanes] = {}, sum = 0.0;
  for (int64_t d = 0; d < size; d += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += x[d + lane] * x[d + lane];
  }
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return std::sqrt(sum);
}

// The largest element of a vector, by its size; anything where one is NaN.
inline double largest_size(const double* x, int64_t size) {
  double largest[kLanes] = {};
  for (int64_t d = 0; d < size; d += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const double here = std::abs(x[d + lane]);
      largest[lane] = here > largest[lane] ? here : largest[lane];
    }
  }
  return *std::max_element(largest, largest + kLanes);
}

// Makes the index of a page's head from the keys as they are stored.
template <typename T>
void write_index(const Pages<T>& pages, int64_t page, int64_t head) {
  const int64_t head_size = pages.head_size, block_size = pages.block_size;
  const typename T::Stored* keys = pages.keys(page, head);
  float* centre = pages.centre(page, head);
  float* scales = pages.scales(page, head);
  float* radii = pages.radii(page, head);
  int8_t* codes = pages.codes(page, head);

  const Floats share = broadcast(1.0f / static_cast<float>(block_size));
  for (int64_t d = 0; d < head_size; d += kLanes) {
    Floats sum = {};
    for (int64_t key = 0; key < block_size; ++key) sum += T::widen(keys + key * head_size + d);
    store(centre + d, sum * share);
  }
  const double root = std::sqrt(static_cast<double>(head_size));
  const double rounding = static_cast<double>(2 * head_size + 32) * 0x1p-24;
  std::vector<double> row(3 * head_size);
  double *shift = row.data(), *rest = shift + head_size, *whole = rest + head_size;
  for (int64_t d = 0; d < head_size; ++d) shift[d] = centre[d];
  const double centre_length = length(shift, head_size);
  std::vector<float> widened(head_size);
  std::vector<int8_t> coded_row(head_size);
  for (int64_t key = 0; key < block_size; ++key) {
    for (int64_t d = 0; d < head_size; d += kLanes) {
      store(&widened[d], T::widen(keys + key * head_size + d));
    }
    for (int64_t d = 0; d < head_size; ++d) {
      rest[d] = static_cast<double>(widened[d]) - shift[d];
    }
    const double largest = largest_size(rest, head_size);
    const double plain = length(rest, head_size);
    // With a scale of 0 the rest is all of it.
    float scale = static_cast<float>(largest / kCodeLimit);
    const bool known = centre_length + 4.0 * plain <= 0x1p60;  // not so for NaN
    if (!known || scale < kUnderflow) scale = 0.0f;
    const double inverse = scale == 0.0f ? 0.0 : 1.0 / scale;
    for (int64_t d = 0; d < head_size; ++d) {
      const double bounded = std::min<double>(
          kCodeLimit, std::max<double>(-kCodeLimit, known ? rest[d] * inverse : 0.0));
      const double code = rounded(bounded);
      whole[d] = code * scale;
      rest[d] -= whole[d];
      coded_row[d] = static_cast<int8_t>(static_cast<int32_t>(code));
    }
    int8_t* to = codes + code_index(key, 0, head_size);
    for (int64_t pair = 0; pair < head_size / 2; ++pair) {
      std::memcpy(to + pair * 2 * kLanes, &coded_row[2 * pair], 2);
    }
    const double left = length(rest, head_size), coded = length(whole, head_size);
    const double sizes = centre_length + coded + left;
    scales[key] = scale;
    radii[key] = known ? rounded_up(left + root / 65000.0 * coded + rounding * sizes + kUnderflow)
                       : std::numeric_limits<float>::infinity();
  }
}

// Keeps a step's keys, turned back to position 0, and its values, and indexes the pages that are
// full with them.
template <typename T>
void write_archive(const LminfLayer& layer, const LminfRecall& recall, const LminfArchive& archive,
                   const void* key, int64_t key_stride, const void* value, int64_t value_stride) {
  using Stored = typename T::Stored;
  const int64_t head_size = layer.head_size, num_kv_heads = layer.num_kv_heads;
  const int64_t half = recall.rotary_half, block_size = archive.block_size;
  const Pages<T> pages(archive, num_kv_heads, head_size);
  const int64_t work = recall.num_tokens * num_kv_heads * head_size;
  for_each(recall.num_tokens, work > 16384, [&](int64_t token) {
    const int64_t slot = recall.slots[token];
    if (slot < 0) return;
    const int64_t page = slot / block_size, row = slot % block_size * head_size;
    std::vector<float> turned(head_size);
    for (int64_t h = 0; h < num_kv_heads; ++h) {
      const Stored* k = static_cast<const Stored*>(key) + token * key_stride + h * head_size;
      const Stored* v = static_cast<const Stored*>(value) + token * value_stride + h * head_size;
      std::copy_n(v, head_size, pages.values(page, h) + row);
      Stored* to = pages.keys(page, h) + row;
      if (half == 0) {
        std::copy_n(k, head_size, to);
        continue;
      }
      for (int64_t d = 0; d < head_size; d += kLanes) store(&turned[d], T::widen(k + d));
      rotate_head<Float32>(turned.data(), recall.key_cos + token * half,
                           recall.key_sin + token * half, half, recall.is_neox_style);
      for (int64_t d = 0; d < head_size; d += kLanes) T::narrow(to + d, load(&turned[d]));
    }
  });
  std::vector<int64_t> full;
  for (int64_t token = 0; token < recall.num_tokens; ++token) {
    const int64_t slot = recall.slots[token];
    if (slot >= 0 && slot % block_size == block_size - 1) full.push_back(slot / block_size);
  }
  const int64_t count = static_cast<int64_t>(full.size()) * num_kv_heads;
  if (count == 0) return;
  for_each(count, count > 1, [&](int64_t i) {
    write_index(pages, full[i / num_kv_heads], i % num_kv_heads);
  });
}

}  // namespace lminf
