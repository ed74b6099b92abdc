// The kernels' entry points: picks the storage type. Compiled by `build.py`.

#include "attention.h"
#include "cache.h"
#include "interface.h"
#include "rotary.h"
#include "vector.h"

namespace {

template <typename Function>
void with_type(int32_t dtype, Function&& function) {
  if (dtype == kFloat32) return function(lminf::Float32());
  if (dtype == kFloat16) return function(lminf::Float16());
  function(lminf::BFloat16());
}

}  // namespace

void lminf_attention(const LminfBatch* batch, const LminfLayer* layer) {
  with_type(layer->dtype, [&](auto type) { lminf::attention<decltype(type)>(*batch, *layer); });
}

void lminf_write_cache(const LminfLayer* layer, const void* key, int64_t key_stride,
                       const void* value, int64_t value_stride, const int64_t* slots,
                       int64_t num_tokens) {
  with_type(layer->dtype, [&](auto type) {
    lminf::write_cache<decltype(type)>(*layer, key, key_stride, value, value_stride, slots,
                                       num_tokens);
  });
}

void lminf_rotate(void* query, void* key, const LminfRotation* rotation) {
  with_type(rotation->dtype,
            [&](auto type) { lminf::rotate<decltype(type)>(query, key, *rotation); });
}
