// The kernels' entry points, for one storage type. Compiled by `build.py`.

#include "attention.h"
#include "cache.h"
#include "interface.h"
#include "rotary.h"
#include "vector.h"

using Storage = lminf::LMINF_STORAGE;

void lminf_attention(const LminfBatch* batch, const LminfLayer* layer) {
  lminf::attention<Storage>(*batch, *layer);
}

void lminf_write_cache(const LminfLayer* layer, const void* key, int64_t key_stride,
                       const void* value, int64_t value_stride, const int64_t* slots,
                       int64_t num_tokens) {
  lminf::write_cache<Storage>(*layer, key, key_stride, value, value_stride, slots, num_tokens);
}

void lminf_rotate(void* query, void* key, const LminfRotation* rotation) {
  lminf::rotate<Storage>(query, key, *rotation);
}
