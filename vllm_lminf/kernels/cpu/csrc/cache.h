// How the paged cache is laid out inside the two halves of a head's block.
//
// Keys and values come in groups of 16 consecutive tokens. A group of keys is stored with its
// tokens side by side in the lanes, so that a product with one query element (or pair) yields 16
// scores; a group of values with its dimensions side by side, so that a product with one weight
// (or pair of weights) adds to 16 dimensions. With P = kPack elements to a lane:
//
//     keys    [block_size / 16][head_size / P][16][P]
//     values  [block_size / 16][16 / P][head_size][P]

#pragma once

#include "interface.h"
#include "threads.h"
#include "vector.h"

namespace lminf {

constexpr int64_t kGroup = kLanes;

template <typename T>
int64_t key_index(int64_t token, int64_t dimension) {
  constexpr int64_t pack = T::kPack;
  return (dimension / pack * kGroup + token) * pack + dimension % pack;
}

template <typename T>
int64_t value_index(int64_t token, int64_t dimension, int64_t head_size) {
  constexpr int64_t pack = T::kPack;
  return (token / pack * head_size + dimension) * pack + token % pack;
}

// Where the group of keys, or of values, is that begins at a slot of a block.
template <typename T>
struct Cache {
  const LminfLayer& layer;

  typename T::Stored* keys(int64_t block, int64_t offset, int64_t kv_head) const {
    return static_cast<typename T::Stored*>(layer.kv_cache) + block * layer.block_stride +
           kv_head * layer.head_stride + offset * layer.head_size;
  }
  typename T::Stored* values(int64_t block, int64_t offset, int64_t kv_head) const {
    return keys(block, offset, kv_head) + layer.block_size * layer.head_size;
  }
};

// One token's keys and values of one head, into their group. By itself: in the middle of all else the
// loop has too few registers for its addresses.
template <typename T>
__attribute__((noinline)) void write_head(typename T::Stored* keys, typename T::Stored* values,
                                          const typename T::Stored* key,
                                          const typename T::Stored* value, int64_t lane,
                                          int64_t head_size) {
  for (int64_t d = 0; d < head_size; ++d) {
    keys[key_index<T>(lane, d)] = key[d];
    values[value_index<T>(lane, d, head_size)] = value[d];
  }
}

template <typename T>
void write_cache(const LminfLayer& layer, const void* key, int64_t key_stride, const void* value,
                 int64_t value_stride, const int64_t* slots, int64_t num_tokens) {
  using Stored = typename T::Stored;
  const Cache<T> cache{layer};
  const int64_t head_size = layer.head_size;
  const int64_t work = num_tokens * layer.num_kv_heads * head_size;
  for_each(num_tokens, work > 16384, [=](int64_t token) {
    if (slots[token] < 0) return;
    const int64_t block = slots[token] / layer.block_size, slot = slots[token] % layer.block_size;
    const int64_t offset = slot / kGroup * kGroup, lane = slot % kGroup;
    for (int64_t h = 0; h < layer.num_kv_heads; ++h) {
      const Stored* k = static_cast<const Stored*>(key) + token * key_stride + h * head_size;
      const Stored* v = static_cast<const Stored*>(value) + token * value_stride + h * head_size;
      write_head<T>(cache.keys(block, offset, h), cache.values(block, offset, h), k, v, lane,
                    head_size);
    }
  });
}

}  // namespace lminf
