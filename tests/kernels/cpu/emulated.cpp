// Runs calls of the kernels that another process makes: `emulated.py` sends the memory that a call
// refers to, and gets back what it wrote. Both are little-endian with pointers of 64 bits.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "interface.h"

namespace {

void read(void* to, size_t size) {
  if (size > 0 && std::fread(to, size, 1, stdin) != 1) std::exit(std::feof(stdin) ? 0 : 1);
}

template <typename T>
T read() {
  T x;
  read(&x, sizeof x);
  return x;
}

// A stretch of the caller's memory, at an address that is as well aligned.
struct Region {
  uint64_t address, size, is_written;
  std::unique_ptr<char[]> memory;
  char* data;
};

std::vector<Region> regions;

template <typename T>
void translate(T*& pointer) {
  if (pointer == nullptr) return;
  const uint64_t address = reinterpret_cast<uint64_t>(pointer);
  for (const Region& region : regions) {
    if (address < region.address || address > region.address + region.size) continue;
    pointer = reinterpret_cast<T*>(region.data + (address - region.address));
    return;
  }
  std::exit(2);
}

LminfLayer read_layer() {
  LminfLayer layer = read<LminfLayer>();
  translate(layer.query);
  translate(layer.output);
  translate(layer.kv_cache);
  translate(layer.alibi_slopes);
  translate(layer.sinks);
  return layer;
}

LminfBatch read_batch() {
  LminfBatch batch = read<LminfBatch>();
  translate(batch.query_start_loc);
  translate(batch.seq_lens);
  translate(batch.block_table);
  translate(batch.query_cos);
  translate(batch.query_sin);
  translate(batch.key_cos);
  translate(batch.key_sin);
  return batch;
}

LminfRecall read_recall() {
  LminfRecall recall = read<LminfRecall>();
  translate(recall.block_table);
  translate(recall.slots);
  translate(recall.first_rows);
  translate(recall.key_cos);
  translate(recall.key_sin);
  translate(recall.query_cos);
  translate(recall.query_sin);
  return recall;
}

LminfArchive read_archive() {
  LminfArchive archive = read<LminfArchive>();
  translate(archive.pages);
  return archive;
}

void attention() {
  const LminfBatch batch = read_batch();
  const LminfLayer layer = read_layer();
  lminf_attention(&batch, &layer);
}

void attend_and_recall() {
  const LminfBatch batch = read_batch();
  const LminfLayer layer = read_layer();
  const LminfRecall recall = read_recall();
  const LminfArchive archive = read_archive();
  lminf_attend_and_recall(&batch, &layer, &recall, &archive);
}

void write_archive() {
  struct {
    const void* key;
    int64_t key_stride;
    const void* value;
    int64_t value_stride;
  } given;
  const LminfLayer layer = read_layer();
  const LminfRecall recall = read_recall();
  const LminfArchive archive = read_archive();
  read(&given, sizeof given);
  translate(given.key);
  translate(given.value);
  lminf_write_archive(&layer, &recall, &archive, given.key, given.key_stride, given.value,
                      given.value_stride);
}

void write_cache() {
  struct {
    const void* key;
    int64_t key_stride;
    const void* value;
    int64_t value_stride;
    const int64_t* slots;
    int64_t num_tokens;
  } given;
  const LminfLayer layer = read_layer();
  read(&given, sizeof given);
  translate(given.key);
  translate(given.value);
  translate(given.slots);
  lminf_write_cache(&layer, given.key, given.key_stride, given.value, given.value_stride,
                    given.slots, given.num_tokens);
}

void rotate() {
  void* query = read<void*>();
  void* key = read<void*>();
  LminfRotation rotation = read<LminfRotation>();
  translate(query);
  translate(key);
  translate(rotation.cos_sin);
  lminf_rotate(query, key, &rotation);
}

}  // namespace

int main() {
  for (;;) {
    const int64_t function = read<int64_t>();
    regions.resize(read<int64_t>());
    for (Region& region : regions) {
      region.address = read<uint64_t>();
      region.size = read<uint64_t>();
      region.is_written = read<uint64_t>();
      region.memory.reset(new char[region.size + 128]);
      const uint64_t begin = reinterpret_cast<uint64_t>(region.memory.get()) + 63 & ~uint64_t{63};
      region.data = reinterpret_cast<char*>(begin + region.address % 64);
      read(region.data, region.size);
    }
    if (function == 0) attention();
    if (function == 1) write_cache();
    if (function == 2) rotate();
    if (function == 3) attend_and_recall();
    if (function == 4) write_archive();
    for (const Region& region : regions) {
      if (region.is_written) std::fwrite(region.data, 1, region.size, stdout);
    }
    std::fflush(stdout);
  }
}
