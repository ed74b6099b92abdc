// What Python hands over: one structure a step, one a layer. `kernel.py` mirrors them.

#pragma once

#include <cstdint>

extern "C" {

// A batch under one Λ; the same for every layer that shares the Λ and the rotation.
struct LminfBatch {
  const int32_t* query_start_loc;  // [num_requests + 1]
  const int32_t* seq_lens;         // [num_requests], this step's tokens included
  const int32_t* block_table;      // [num_requests, block_table_stride]
  int64_t block_table_stride;
  int64_t num_requests;
  int64_t n_global;
  int64_t n_local;
  int64_t distance_limit;
  // Rotations of far pairs, null where the model rotates nothing. They turn a query back by
  // max(0, position - distance_limit), a global key by its position.
  const float* query_cos;  // [num_tokens, rotary_half]
  const float* query_sin;
  const float* key_cos;  // [rotary_half, key_stride], one column a global key
  const float* key_sin;
  int64_t key_stride;  // the global keys behind any window, rounded up to 16
  int64_t rotary_half;
  int32_t is_neox_style;
};

// A layer, and this step's tensors of it, in the library's storage type. Strides count elements.
struct LminfLayer {
  const void* query;  // [num_tokens, num_heads, head_size], heads next to each other
  int64_t query_stride;
  void* output;  // likewise
  int64_t output_stride;
  void* kv_cache;  // [num_blocks, num_kv_heads, block_size, 2 * head_size]
  int64_t block_stride;
  int64_t head_stride;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_size;   // a multiple of 16
  int64_t block_size;  // a multiple of 16
  const float* alibi_slopes;  // [num_heads] or null
  const float* sinks;         // [num_heads] or null
  float scale;
  float softcap;  // 0 for none
  int32_t use_amx;  // where it can be; otherwise it is never used
};

// Asks the system, once a process, to let it use AMX. Returns 1 if it may, 0 if the library or the
// CPU has none for the storage type, and the system's error number, negated, if it refuses.
int32_t lminf_ask_for_amx(void);

void lminf_attention(const LminfBatch* batch, const LminfLayer* layer);

// key and value: [num_tokens, num_kv_heads, head_size], heads next to each other; a token whose
// slot is negative is left out.
void lminf_write_cache(const LminfLayer* layer, const void* key, int64_t key_stride,
                       const void* value, int64_t value_stride, const int64_t* slots,
                       int64_t num_tokens);

// What a step recalls of the middle; the same for every layer that shares the Λ, the rotation and
// what is recalled.
struct LminfRecall {
  const int32_t* block_table;  // [num_requests, block_table_stride], of the archive
  int64_t block_table_stride;
  const int64_t* slots;  // [num_tokens] in the archive
  int64_t num_tokens;
  const int32_t* first_rows;  // [num_requests]: the position from which on queries look
  // Rotations, of no dimensions where the model rotates nothing. They turn a token's key back by its
  // position, its query to the distance at which the middle is scored.
  const float* key_cos;  // [num_tokens, rotary_half]
  const float* key_sin;
  const float* query_cos;
  const float* query_sin;
  int64_t rotary_half;
  int64_t top_k;      // units
  int64_t unit_size;  // 1, or a multiple of 16
  int32_t is_neox_style;
};

// The archive of a layer, see `archive.h`.
struct LminfArchive {
  void* pages;
  int64_t page_bytes;
  int64_t block_size;  // positions of a page; a multiple of 16
};

// As `lminf_attention`; the queries that look also attend to the best units of their middle.
void lminf_attend_and_recall(const LminfBatch* batch, const LminfLayer* layer,
                             const LminfRecall* recall, const LminfArchive* archive);

// key and value: as in `lminf_write_cache`; they go to the recall's slots.
void lminf_write_archive(const LminfLayer* layer, const LminfRecall* recall,
                         const LminfArchive* archive, const void* key, int64_t key_stride,
                         const void* value, int64_t value_stride);

// The rotation of a step's queries and keys; the same for every layer that shares it.
struct LminfRotation {
  const float* cos_sin;  // [num_tokens, 2 * rotary_half], cosines then sines
  int64_t num_tokens;
  int64_t rotary_half;
  int64_t head_size;
  int64_t query_stride;
  int64_t num_heads;
  int64_t key_stride;
  int64_t num_kv_heads;
  int32_t is_neox_style;
};

// Turns the leading 2 * rotary_half dimensions of every head in place; key may be null.
void lminf_rotate(void* query, void* key, const LminfRotation* rotation);
}
