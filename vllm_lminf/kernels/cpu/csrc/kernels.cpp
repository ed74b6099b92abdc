// The kernels' entry points, for one storage type. Compiled by `build.py`.

#include "amx.h"
#include "archive.h"
#include "attention.h"
#include "cache.h"
#include "interface.h"
#include "recall.h"
#include "rotary.h"
#include "vector.h"

using Storage = lminf::LMINF_STORAGE;

int32_t lminf_ask_for_amx(void) { return lminf::kByAmx<Storage> ? lminf::ask_for_amx() : 0; }

void lminf_attention(const LminfBatch* batch, const LminfLayer* layer) {
  lminf::attention<Storage>(*batch, *layer);
}

void lminf_write_cache(const LminfLayer* layer, const void* key, int64_t key_stride,
                       const void* value, int64_t value_stride, const int64_t* slots,
                       int64_t num_tokens) {
  lminf::write_cache<Storage>(*layer, key, key_stride, value, value_stride, slots, num_tokens);
}

void lminf_attend_and_recall(const LminfBatch* batch, const LminfLayer* layer,
                             const LminfRecall* recall, const LminfArchive* archive) {
  const lminf::Recalled<Storage> recalled(*batch, *layer, *recall, *archive);
  lminf::attention<Storage>(*batch, *layer, &recalled);
}

void lminf_write_archive(const LminfLayer* layer, const LminfRecall* recall,
                         const LminfArchive* archive, const void* key, int64_t key_stride,
                         const void* value, int64_t value_stride) {
  lminf::write_archive<Storage>(*layer, *recall, *archive, key, key_stride, value, value_stride);
}

void lminf_rotate(void* query, void* key, const LminfRotation* rotation) {
  lminf::rotate<Storage>(query, key, *rotation);
}
