// Rotation of queries and keys in place, in float32 whatever they are stored in.

#pragma once

#include "interface.h"
#include "threads.h"
#include "vector.h"

namespace lminf {

template <typename T>
void rotate_head(typename T::Stored* head, const float* cos, const float* sin, int64_t half,
                 bool is_neox_style) {
  int64_t k = 0;
  if (is_neox_style) {
    for (; k + kLanes <= half; k += kLanes) {
      const Floats a = T::widen(head + k), b = T::widen(head + k + half);
      const Floats c = load(cos + k), s = load(sin + k);
      T::narrow(head + k, a * c - b * s);
      T::narrow(head + k + half, b * c + a * s);
    }
  }
  for (; k < half; ++k) {
    typename T::Stored* first = head + (is_neox_style ? k : 2 * k);
    typename T::Stored* second = head + (is_neox_style ? k + half : 2 * k + 1);
    const float a = T::to_float(*first), b = T::to_float(*second);
    *first = T::from_float(a * cos[k] - b * sin[k]);
    *second = T::from_float(b * cos[k] + a * sin[k]);
  }
}

template <typename T>
void rotate(void* query, void* key, const LminfRotation& rotation) {
  const int64_t half = rotation.rotary_half, head_size = rotation.head_size;
  const int64_t num_kv_heads = key == nullptr ? 0 : rotation.num_kv_heads;
  const int64_t work = rotation.num_tokens * (rotation.num_heads + num_kv_heads) * half;
  for_each(rotation.num_tokens, work > 16384, [&](int64_t token) {
    const float* cos = rotation.cos_sin + token * 2 * half;
    typename T::Stored* row =
        static_cast<typename T::Stored*>(query) + token * rotation.query_stride;
    for (int64_t h = 0; h < rotation.num_heads; ++h) {
      rotate_head<T>(row + h * head_size, cos, cos + half, half, rotation.is_neox_style);
    }
    if (key == nullptr) return;
    row = static_cast<typename T::Stored*>(key) + token * rotation.key_stride;
    for (int64_t h = 0; h < num_kv_heads; ++h) {
      rotate_head<T>(row + h * head_size, cos, cos + half, half, rotation.is_neox_style);
    }
  });
}

}  // namespace lminf
