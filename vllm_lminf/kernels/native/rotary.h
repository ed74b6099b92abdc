// Rotation of queries and keys in place, in float32 whatever they are stored in.

#pragma once

#include "interface.h"
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
void rotate(void* heads, int64_t stride, int64_t num_tokens, int64_t num_heads, int64_t head_size,
            const float* cos_sin, int64_t half, bool is_neox_style) {
#pragma omp parallel for if (num_tokens * num_heads * half > 16384)
  for (int64_t token = 0; token < num_tokens; ++token) {
    const float* cos = cos_sin + token * 2 * half;
    typename T::Stored* row = static_cast<typename T::Stored*>(heads) + token * stride;
    for (int64_t h = 0; h < num_heads; ++h) {
      rotate_head<T>(row + h * head_size, cos, cos + half, half, is_neox_style);
    }
  }
}

}  // namespace lminf
