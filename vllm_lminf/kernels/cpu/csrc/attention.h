// Λ-attention of one layer over the paged cache.
//
// The work is cut into units: some queries of one request, the query heads of one key head, and a
// stretch of their keys. A unit keeps an online softmax over its keys (arXiv 2205.14135) and takes
// 256 of them at a time, against six rows at a time: scores, weights and products of one such step
// stay in registers and the first cache level. A row is one head of one query. The keys of few
// queries, as in decoding, are split among units; the thread that finishes last joins the parts.
// In bfloat16, where there is AMX, keys that aren't split are taken 128 at a time, against 32 rows
// (`amx.h`).
//
// A query's result is the same to the bit whatever else is in the batch: steps and parts begin at
// fixed positions, parts are joined in order, and no row's arithmetic depends on another row.
//
// Keys come in up to three ranges, each with an interval of visible positions for every query:
// the window; global keys behind it but within the distance limit; and global keys beyond the
// limit, which meet the query turned back to the limit and are turned back to position 0.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "amx.h"
#include "cache.h"
#include "interface.h"
#include "ranges.h"
#include "recall.h"
#include "rotary.h"
#include "threads.h"
#include "vector.h"

namespace lminf {

constexpr int kRows = 6;                       // rows that share the loads of a key
constexpr int kStepGroups = 16;                // groups of 16 keys in a step
constexpr int kStep = kStepGroups * kLanes;
constexpr int64_t kPart = 2 * kStep;           // keys in a part of a split
constexpr int64_t kAmxStep = 128;              // keys in a step by AMX
constexpr int64_t kSplitQueries = 8;           // requests with more queries aren't split

// Vectors that share a broadcast. Sums fill most of the registers, 24 of 32 with AVX-512 and 12 of
// 16 with AVX2, so that as many additions are under way as a core can take.
template <int rows>
constexpr int width_for() {
#if defined(__AVX512F__)
  return 4;
#elif defined(__AVX2__)
  return rows > 3 ? 1 : rows == 3 ? 2 : rows == 2 ? 3 : 4;
#else
  return rows > 3 ? 1 : 2;
#endif
}

// scores[row][16 * v + lane] for `rows` rows and `width` groups of keys. Sums of many products are
// formed in slabs, which keeps their rounding down.
template <typename T, int rows, int width>
void multiply_keys(const typename T::Operand* query, int64_t query_stride,
                   const typename T::Stored* const* keys, int64_t steps, float* scores) {
  constexpr int64_t slab = 64;
  for (int64_t begin = 0; begin < steps; begin += slab) {
    Floats sums[rows][width] = {};
    for (int64_t step = begin; step < std::min(steps, begin + slab); ++step) {
      for (int t = 0; t < T::kTerms; ++t) {
        typename T::Term terms[width];
        for (int v = 0; v < width; ++v) {
          terms[v] = T::term(keys[v] + step * kLanes * T::kPack, t);
        }
        for (int row = 0; row < rows; ++row) {
          const typename T::Factor factor = T::factor(query[row * query_stride + step], t);
          for (int v = 0; v < width; ++v) {
            sums[row][v] = T::multiply_add(sums[row][v], factor, terms[v]);
          }
        }
      }
    }
    for (int row = 0; row < rows; ++row) {
      for (int v = 0; v < width; ++v) {
        float* to = scores + row * kStep + v * kLanes;
        store(to, begin == 0 ? sums[row][v] : load(to) + sums[row][v]);
      }
    }
  }
}

// output[row][16 * v + lane] = decay[row] * output + weights[row] @ values, over `groups` groups.
template <typename T, int rows, int width>
void multiply_values(const typename T::Operand* weights, const typename T::Stored* const* values,
                     int64_t groups, int64_t head_size, int64_t dimension, const float* decay,
                     float* output) {
  constexpr int64_t packs = kLanes / T::kPack;
  constexpr int64_t weights_stride = kStep / T::kPack;
  Floats sums[rows][width];
  for (int row = 0; row < rows; ++row) {
    for (int v = 0; v < width; ++v) {
      sums[row][v] = load(output + row * head_size + v * kLanes) * broadcast(decay[row]);
    }
  }
  for (int64_t group = 0; group < groups; ++group) {
    const typename T::Stored* value = values[group] + dimension * T::kPack;
    for (int64_t pack = 0; pack < packs; ++pack) {
      for (int t = 0; t < T::kTerms; ++t) {
        typename T::Term terms[width];
        for (int v = 0; v < width; ++v) {
          terms[v] = T::term(value + (pack * head_size + v * kLanes) * T::kPack, t);
        }
        for (int row = 0; row < rows; ++row) {
          const typename T::Factor factor =
              T::factor(weights[row * weights_stride + group * packs + pack], t);
          for (int v = 0; v < width; ++v) {
            sums[row][v] = T::multiply_add(sums[row][v], factor, terms[v]);
          }
        }
      }
    }
  }
  for (int row = 0; row < rows; ++row) {
    for (int v = 0; v < width; ++v) store(output + row * head_size + v * kLanes, sums[row][v]);
  }
}

template <typename T, int rows>
struct RowKernels {
  static constexpr int kWidth = width_for<rows>();

  static void scores(const typename T::Operand* query, int64_t query_stride,
                     const typename T::Stored* const* keys, int64_t groups, int64_t steps,
                     float* scores) {
    int64_t group = 0;
    for (; group + kWidth <= groups; group += kWidth) {
      multiply_keys<T, rows, kWidth>(query, query_stride, keys + group, steps,
                                     scores + group * kLanes);
    }
    for (; group < groups; ++group) {
      multiply_keys<T, rows, 1>(query, query_stride, keys + group, steps, scores + group * kLanes);
    }
  }

  static void output(const typename T::Operand* weights, const typename T::Stored* const* values,
                     int64_t groups, int64_t head_size, const float* decay, float* output) {
    int64_t dimension = 0;
    for (; dimension + kWidth * kLanes <= head_size; dimension += kWidth * kLanes) {
      multiply_values<T, rows, kWidth>(weights, values, groups, head_size, dimension, decay,
                                       output + dimension);
    }
    for (; dimension < head_size; dimension += kLanes) {
      multiply_values<T, rows, 1>(weights, values, groups, head_size, dimension, decay,
                                  output + dimension);
    }
  }
};

struct Unit {
  int64_t request;
  int64_t kv_head;
  int64_t first_token;     // row of the first query in the batch
  int64_t first_position;  // its position in the sequence
  int64_t num_queries;
  Interval keys;           // the stretch of the window that this unit attends to
  bool with_global;
  bool by_amx;
  int64_t part;            // which part of a split
  int64_t num_parts;       // 1 for no split
  int64_t split;           // which split
};

template <typename T>
class UnitWorker {
  using Stored = typename T::Stored;
  using Operand = typename T::Operand;
  static constexpr int64_t kPackedStep = kLanes * T::kPack;  // what 16 lanes take of a cached step

 public:
  UnitWorker(const LminfBatch& batch, const LminfLayer& layer)
      : batch_(batch),
        layer_(layer),
        cache_{layer},
        group_size_(layer.num_heads / layer.num_kv_heads),
        steps_(layer.head_size / T::kPack),
        plain_(layer.softcap == 0.0f && layer.alibi_slopes == nullptr) {}

  // Leaves the unnormalised output, and for every row the maximum (in powers of two) and the sum.
  void run(const Unit& unit) {
    unit_ = &unit;
    num_rows_ = unit.num_queries * group_size_;
    query_.resize(whole_tiles(num_rows_) * steps_);
    clear();
    visible_.resize(unit.num_queries);
    read_queries(false);
    attend_window();
    if (unit.with_global) attend_global();
  }

  // Puts the parts of a split together.
  void join(const float* parts, int64_t num_parts, int64_t part_size) {
    clear();
    for (int64_t p = 0; p < num_parts; ++p) {
      const float* part = parts + p * part_size;
      for (int64_t row = 0; row < num_rows_; ++row, part += layer_.head_size + 2) {
        add(row, part[0], part[1], part + 2);
      }
    }
  }

  void save(float* part) const {
    const int64_t head_size = layer_.head_size;
    for (int64_t row = 0; row < num_rows_; ++row, part += head_size + 2) {
      part[0] = maximum_[row];
      part[1] = sum_[row];
      std::copy_n(&output_[row * head_size], head_size, part + 2);
    }
  }

  // Adds the keys of the middle that the unit's queries recall.
  void add_recalled(const Recalled<T>& recalled) {
    recalled_row_.resize(layer_.head_size);
    for (int64_t row = 0; row < num_rows_; ++row) {
      const int64_t query = row / group_size_;
      const RecalledState state = recalled.attend(
          unit_->request, position(query), unit_->first_token + query,
          unit_->kv_head * group_size_ + row % group_size_, recalled_row_.data());
      add(row, state.maximum, state.sum, recalled_row_.data());
    }
  }

  void write_output() {
    const int64_t head_size = layer_.head_size;
    for (int64_t row = 0; row < num_rows_; ++row) {
      const int64_t head = unit_->kv_head * group_size_ + row % group_size_;
      const int64_t token = unit_->first_token + row / group_size_;
      float share = 1.0f, sum = sum_[row];
      if (layer_.sinks != nullptr) {
        const float sink = layer_.sinks[head] * kLog2e;
        const float joint = std::max(maximum_[row], sink);
        share = std::exp2(maximum_[row] - joint);
        sum = sum * share + std::exp2(sink - joint);
      }
      const Floats factor = broadcast(share / sum);
      Stored* to = static_cast<Stored*>(layer_.output) + token * layer_.output_stride +
                   head * head_size;
      for (int64_t d = 0; d < head_size; d += kLanes) {
        T::narrow(to + d, load(&output_[row * head_size + d]) * factor);
      }
    }
  }

 private:
  int64_t position(int64_t query) const { return unit_->first_position + query; }

  // Rows with those that AMX needs besides; what is computed for these is left alone.
  static int64_t whole_tiles(int64_t rows) { return (rows + kHalf - 1) / kHalf * kHalf; }

  void clear() {
    output_.assign(whole_tiles(num_rows_) * layer_.head_size, 0.0f);
    maximum_.assign(whole_tiles(num_rows_), kMinusInfinity);
    sum_.assign(whole_tiles(num_rows_), 0.0f);
  }

  void add(int64_t row, float their_maximum, float their_sum, const float* theirs) {
    if (their_maximum == kMinusInfinity) return;
    const float joint = std::max(maximum_[row], their_maximum);
    const float keep = std::exp2(maximum_[row] - joint);
    const float take = std::exp2(their_maximum - joint);
    maximum_[row] = joint;
    sum_[row] = sum_[row] * keep + their_sum * take;
    float* output = &output_[row * layer_.head_size];
    for (int64_t d = 0; d < layer_.head_size; ++d) output[d] = output[d] * keep + theirs[d] * take;
  }

  // The unit's queries as operands; turned back to the distance limit, if asked for.
  void read_queries(bool turned) {
    const int64_t head_size = layer_.head_size;
    turned_row_.resize(head_size);
    for (int64_t row = 0; row < num_rows_; ++row) {
      const int64_t token = unit_->first_token + row / group_size_;
      const int64_t head = unit_->kv_head * group_size_ + row % group_size_;
      const Stored* from = static_cast<const Stored*>(layer_.query) +
                           token * layer_.query_stride + head * head_size;
      for (int64_t d = 0; d < head_size; d += kLanes) {
        store(&turned_row_[d], T::widen(from + d));
      }
      if (turned) {
        const int64_t half = batch_.rotary_half;
        rotate_head<Float32>(turned_row_.data(), batch_.query_cos + token * half,
                             batch_.query_sin + token * half, half, batch_.is_neox_style);
      }
      Operand* to = &query_[row * steps_];
      for (int64_t d = 0; d < head_size; d += kLanes) {
        T::operands(to + d / T::kPack, load(&turned_row_[d]));
      }
    }
  }

  void attend_window() {
    for (int64_t q = 0; q < unit_->num_queries; ++q) {
      const int64_t start = std::max<int64_t>(0, position(q) - batch_.n_local + 1);
      visible_[q] = {std::max(start, unit_->keys.begin),
                     std::min(position(q) + 1, unit_->keys.end)};
    }
    attend(unit_->keys, nullptr);
  }

  void attend_global() {
    const bool rotates = batch_.query_cos != nullptr;
    const int64_t last = position(unit_->num_queries - 1);
    const int64_t behind = std::min(batch_.n_global, last - batch_.n_local + 1);
    // Without a rotation the limit shows in ALiBi's distances alone, if at all.
    const int64_t limit =
        rotates ? batch_.distance_limit : std::numeric_limits<int64_t>::max() / 2;
    Interval near = {behind, 0}, far = {0, 0};
    for (int64_t q = 0; q < unit_->num_queries; ++q) {
      visible_[q] = {std::max<int64_t>(0, position(q) - limit),
                     std::min(behind, position(q) - batch_.n_local + 1)};
      if (visible_[q].begin >= visible_[q].end) continue;
      near.begin = std::min(near.begin, visible_[q].begin);
      near.end = std::max(near.end, visible_[q].end);
    }
    if (near.begin < near.end) attend(near, nullptr);
    if (!rotates) return;
    for (int64_t q = 0; q < unit_->num_queries; ++q) {
      visible_[q] = {0, std::min(behind, position(q) - limit)};
      far.end = std::max(far.end, visible_[q].end);
    }
    if (far.end <= 0) return;
    read_queries(true);
    turn_keys(far.end);
    attend(far, stationary_keys_.data());
  }

  // The leading global keys at the angle of position 0, laid out as in the cache.
  void turn_keys(int64_t num_keys) {
    const int64_t head_size = layer_.head_size, half = batch_.rotary_half;
    const int64_t num_groups = (num_keys + kGroup - 1) / kGroup;
    stationary_keys_.resize(num_groups * kGroup * head_size);
    lanes_.resize(head_size * kLanes);
    for (int64_t group = 0; group < num_groups; ++group) {
      const Stored* from = group_at(group * kGroup).keys;
      for (int64_t step = 0; step < steps_; ++step) {
        Floats elements[T::kPack];
        T::unpack(elements, from + step * kPackedStep);
        for (int e = 0; e < T::kPack; ++e) {
          store(&lanes_[(step * T::kPack + e) * kLanes], elements[e]);
        }
      }
      for (int64_t k = 0; k < half; ++k) {
        float* a = &lanes_[(batch_.is_neox_style ? k : 2 * k) * kLanes];
        float* b = &lanes_[(batch_.is_neox_style ? k + half : 2 * k + 1) * kLanes];
        const Floats cos = load(batch_.key_cos + k * batch_.key_stride + group * kGroup);
        const Floats sin = load(batch_.key_sin + k * batch_.key_stride + group * kGroup);
        const Floats first = load(a) * cos - load(b) * sin;
        store(b, load(b) * cos + load(a) * sin);
        store(a, first);
      }
      Stored* to = &stationary_keys_[group * kGroup * head_size];
      for (int64_t step = 0; step < steps_; ++step) {
        Floats elements[T::kPack];
        for (int e = 0; e < T::kPack; ++e) {
          elements[e] = load(&lanes_[(step * T::kPack + e) * kLanes]);
        }
        T::pack(to + step * kPackedStep, elements);
      }
    }
  }

  struct Group {
    const Stored* keys;
    const Stored* values;
  };

  Group group_at(int64_t position) const {
    const int64_t entry = position / layer_.block_size;
    const int64_t block =
        batch_.block_table[unit_->request * batch_.block_table_stride + entry];
    const int64_t offset = position % layer_.block_size;
    return {cache_.keys(block, offset, unit_->kv_head),
            cache_.values(block, offset, unit_->kv_head)};
  }

  // All rows over the keys of a range, as far as `visible_` lets each see them. The keys are the
  // cache's, or those given, of which the range's group 0 is the first.
  void attend(Interval range, const Stored* given_keys) {
    for (int64_t start = range.begin / kStep * kStep; start < range.end; start += kStep) {
      const int64_t end = std::min(range.end, start + kStep);
      const int64_t first_group = std::max<int64_t>(0, range.begin - start) / kGroup;
      const int64_t num_groups = (end - start + kGroup - 1) / kGroup;
      for (int64_t g = first_group; g < num_groups; ++g) {
        const int64_t first = start + g * kGroup;
        const Group group = group_at(first);
        keys_[g] = given_keys == nullptr ? group.keys : given_keys + first * layer_.head_size;
        values_[g] = group.values;
        if (first < range.begin || first + kGroup > range.end) {
          values_[g] = blank_values(group.values, first, range, g == first_group ? 0 : 1);
        }
      }
      if constexpr (kByAmx<T>) {
        if (unit_->by_amx) {
          pair_groups(first_group, num_groups);
          for (int64_t part = start; part < end; part += kAmxStep) {
            for (int64_t row = 0; row < num_rows_; row += kBlock) {
              attend_block(row, std::min(kBlock, num_rows_ - row), start, part,
                           std::min(end, part + kAmxStep));
            }
          }
          continue;
        }
      }
      for (int64_t row = 0; row < num_rows_; row += kRows) {
        const int64_t rows = std::min<int64_t>(kRows, num_rows_ - row);
        attend_rows(row, rows, start, end);
      }
    }
  }

  // A copy of a group of values with zeros at positions outside the range: a slot that nobody
  // wrote may hold NaN, and a weight of zero wouldn't undo that.
  const Stored* blank_values(const Stored* values, int64_t first, Interval range, int which) {
    const int64_t head_size = layer_.head_size;
    std::vector<Stored>& copy = edge_values_[which];
    copy.assign(values, values + kGroup * head_size);
    for (int64_t token = 0; token < kGroup; ++token) {
      if (first + token >= range.begin && first + token < range.end) continue;
      for (int64_t d = 0; d < head_size; ++d) copy[value_index<T>(token, d, head_size)] = 0;
    }
    return copy.data();
  }

  struct Sight {
    Interval by_any, by_all;
  };

  // Which keys any of these rows sees, and which all of them see.
  Sight sight(int64_t first_row, int64_t rows, int64_t start, int64_t end) const {
    Interval by_any = {end, start}, by_all = {start, end};
    const int64_t last_query = (first_row + rows - 1) / group_size_;
    for (int64_t q = first_row / group_size_; q <= last_query; ++q) {
      const Interval bounded = {std::max(visible_[q].begin, start),
                                std::min(visible_[q].end, end)};
      by_all = {std::max(by_all.begin, bounded.begin), std::min(by_all.end, bounded.end)};
      if (bounded.begin >= bounded.end) continue;
      by_any = {std::min(by_any.begin, bounded.begin), std::max(by_any.end, bounded.end)};
    }
    return {by_any, by_all};
  }

  void attend_rows(int64_t first_row, int64_t rows, int64_t start, int64_t end) {
    const auto [seen, by_all] = sight(first_row, rows, start, end);
    if (seen.begin >= seen.end) return;
    const int64_t first_group = (seen.begin - start) / kGroup;
    const int64_t num_groups = (seen.end - start + kGroup - 1) / kGroup - first_group;
    const int64_t first_key = start + first_group * kGroup;
    const bool masked =
        by_all.begin > first_key || by_all.end < first_key + num_groups * kGroup;

    alignas(64) float scores[kRows * kStep];
    alignas(64) Operand weights[kRows * kStep / T::kPack];
    float decay[kRows];
    with_rows(rows, [&](auto count) {
      RowKernels<T, count()>::scores(&query_[first_row * steps_], steps_, keys_ + first_group,
                                     num_groups, steps_, scores);
    });
    for (int64_t r = 0; r < rows; ++r) {
      float* row_scores = scores + r * kStep;
      const int64_t row = first_row + r, query = row / group_size_;
      if (!plain_) apply_rules(row, first_key, num_groups, row_scores);
      if (masked) mask(visible_[query], first_key, num_groups, row_scores);
      decay[r] = soften(row, num_groups, row_scores, weights + r * (kStep / T::kPack));
    }
    with_rows(rows, [&](auto count) {
      RowKernels<T, count()>::output(weights, values_ + first_group, num_groups,
                                     layer_.head_size, decay,
                                     &output_[first_row * layer_.head_size]);
    });
  }

  // Completes the pairs of groups that AMX multiplies at once: the keys that a step lacks in its first
  // or last pair may be any, as no row sees them, and the values are zero.
  void pair_groups(int64_t first_group, int64_t num_groups) {
    const int64_t head_size = layer_.head_size, group_size = kGroup * head_size;
    for (int64_t g = first_group / 2 * 2; g < num_groups; g += 2) {
      const Stored*& pair = pair_values_[g / 2];
      const bool has_first = g >= first_group, has_second = g + 1 < num_groups;
      if (!has_first) keys_[g] = keys_[g + 1];
      if (!has_second) keys_[g + 1] = keys_[g];
      if (has_first && has_second && values_[g + 1] == values_[g] + group_size) {
        pair = values_[g];
        continue;
      }
      joined_values_.resize(kStep * head_size);
      Stored* joined = &joined_values_[g * group_size];
      std::fill_n(joined, 2 * group_size, Stored{0});
      if (has_first) std::copy_n(values_[g], group_size, joined);
      if (has_second) std::copy_n(values_[g + 1], group_size, joined + group_size);
      pair = joined;
    }
  }

  // As `attend_rows`, by AMX.
  void attend_block(int64_t first_row, int64_t rows, int64_t base, int64_t start, int64_t end) {
    const auto [seen, by_all] = sight(first_row, rows, start, end);
    if (seen.begin >= seen.end) return;
    const int64_t head_size = layer_.head_size;
    const int64_t first_pair = (seen.begin - base) / kDepth;
    const int64_t num_pairs = (seen.end - base + kDepth - 1) / kDepth - first_pair;
    const int64_t first_key = base + first_pair * kDepth, num_keys = num_pairs * kDepth;
    const bool masked = by_all.begin > first_key || by_all.end < first_key + num_keys;

    // A row's weights take the place of its scores. Rows are apart so that they don't share places in
    // the cache.
    constexpr int64_t stride = kAmxStep + kLanes;
    alignas(64) float scores[kBlock * stride];
    const uint16_t* query = reinterpret_cast<const uint16_t*>(&query_[first_row * steps_]);
    const uint16_t* weights = reinterpret_cast<const uint16_t*>(scores);
    float* output = &output_[first_row * head_size];
    const auto keys = keys_ + 2 * first_pair;
    const auto values = pair_values_ + first_pair;
    if (rows > kHalf) {
      multiply_keys_by_amx<2>(query, head_size, keys, num_pairs, scores, stride);
    } else {
      multiply_keys_by_amx<1>(query, head_size, keys, num_pairs, scores, stride);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* row_scores = scores + r * stride;
      const int64_t row = first_row + r;
      if (!plain_) apply_rules(row, first_key, num_keys / kGroup, row_scores);
      if (masked) mask(visible_[row / group_size_], first_key, num_keys / kGroup, row_scores);
    }
    const float factor = plain_ ? layer_.scale * kLog2e : kLog2e;
    for (int64_t half = 0; half < rows; half += kHalf) {
      alignas(64) float decay[kHalf];
      const int64_t row = first_row + half;
      soften_by_amx(scores + half * stride, stride, num_pairs, factor, &maximum_[row], &sum_[row],
                    decay);
      for (int64_t r = 0; r < kHalf; ++r) {
        if (decay[r] == 1.0f) continue;
        for (int64_t d = 0; d < head_size; d += kLanes) {
          float* at = output + (half + r) * head_size + d;
          store(at, load(at) * broadcast(decay[r]));
        }
      }
    }
    if (rows > kHalf) {
      multiply_values_by_amx<2>(weights, 2 * stride, values, num_pairs, head_size, output);
    } else {
      multiply_values_by_amx<1>(weights, 2 * stride, values, num_pairs, head_size, output);
    }
  }

  // Soft-cap and ALiBi; what comes out is scaled already.
  void apply_rules(int64_t row, int64_t first_key, int64_t num_groups, float* scores) const {
    const int64_t head = unit_->kv_head * group_size_ + row % group_size_;
    const int64_t at = position(row / group_size_);
    for (int64_t k = 0; k < num_groups * kGroup; ++k) {
      float score = scores[k] * layer_.scale;
      if (layer_.softcap != 0.0f) score = layer_.softcap * std::tanh(score / layer_.softcap);
      if (layer_.alibi_slopes != nullptr) {
        const int64_t distance = std::min(at - (first_key + k), batch_.distance_limit);
        score -= layer_.alibi_slopes[head] * static_cast<float>(distance);
      }
      scores[k] = score;
    }
  }

  static void mask(Interval visible, int64_t first_key, int64_t num_groups, float* scores) {
    const int64_t num_keys = num_groups * kGroup;
    const int64_t begin = std::clamp<int64_t>(visible.begin - first_key, 0, num_keys);
    const int64_t end = std::clamp<int64_t>(visible.end - first_key, begin, num_keys);
    std::fill(scores, scores + begin, kMinusInfinity);
    std::fill(scores + end, scores + num_keys, kMinusInfinity);
  }

  // Turns a row's scores into weights, relative to the row's maximum so far.
  // Returns by how much what was summed up before has to shrink.
  float soften(int64_t row, int64_t num_groups, float* scores, Operand* weights) {
    const float factor = plain_ ? layer_.scale * kLog2e : kLog2e;
    Floats highest = load(scores);
    for (int64_t g = 1; g < num_groups; ++g) {
      highest = maximum(highest, load(scores + g * kLanes));
    }
    const float top = std::max(maximum_[row], reduce_max(highest) * factor);
    const float reference = top == kMinusInfinity ? 0.0f : top;
    const float decay = std::exp2(maximum_[row] - reference);
    const Floats shift = broadcast(reference), scale = broadcast(factor);
    Floats total = {};
    for (int64_t g = 0; g < num_groups; ++g) {
      const Floats weight = exp2_nonpositive(load(scores + g * kLanes) * scale - shift);
      total += weight;
      T::operands(weights + g * kLanes / T::kPack, weight);
    }
    sum_[row] = sum_[row] * decay + reduce_add(total);
    maximum_[row] = top;
    return decay;
  }

  const LminfBatch& batch_;
  const LminfLayer& layer_;
  const Cache<T> cache_;
  const int64_t group_size_;  // query heads to a key head
  const int64_t steps_;       // operands in a query
  const bool plain_;          // scores need no more than the scale
  const Unit* unit_ = nullptr;
  int64_t num_rows_ = 0;

  std::vector<Operand> query_;
  std::vector<float> output_, maximum_, sum_, turned_row_, recalled_row_, lanes_;
  std::vector<Interval> visible_;
  std::vector<Stored> stationary_keys_, edge_values_[2], joined_values_;
  const Stored* keys_[kStepGroups];
  const Stored* values_[kStepGroups];
  const Stored* pair_values_[kStepGroups / 2];
};

// Whether AMX computes what isn't split.
template <typename T>
bool uses_amx(const LminfLayer& layer) {
  return kByAmx<T> && layer.use_amx && layer.head_size % kDepth == 0 && ask_for_amx() == 1;
}

// Cuts a batch into units.
inline std::vector<Unit> plan(const LminfBatch& batch, const LminfLayer& layer, bool with_amx) {
  const int64_t group_size = layer.num_heads / layer.num_kv_heads;
  const int64_t rows = layer.head_size <= 128 ? 192 : 96;
  const int64_t tile = std::max<int64_t>(1, rows / group_size);
  std::vector<Unit> units;
  int64_t num_splits = 0;
  for (int64_t r = 0; r < batch.num_requests; ++r) {
    const int64_t token = batch.query_start_loc[r], queries = batch.query_start_loc[r + 1] - token;
    const int64_t first_position = batch.seq_lens[r] - queries;
    for (int64_t q = 0; q < queries; q += tile) {
      const int64_t count = std::min(tile, queries - q), position = first_position + q;
      const Interval keys = {std::max<int64_t>(0, position - batch.n_local + 1), position + count};
      const bool with_global = batch.n_global > 0 && position + count - batch.n_local > 0;
      const int64_t first_part = queries <= kSplitQueries ? keys.begin / kPart : 0;
      const int64_t num_parts =
          queries <= kSplitQueries ? (keys.end - 1) / kPart + 1 - first_part : 1;
      for (int64_t h = 0; h < layer.num_kv_heads; ++h) {
        for (int64_t part = 0; part < num_parts; ++part) {
          Interval piece = keys;
          if (num_parts > 1) {
            piece = {std::max(keys.begin, (first_part + part) * kPart),
                     std::min(keys.end, (first_part + part + 1) * kPart)};
          }
          units.push_back({r, h, token + q, position, count, piece, with_global && part == 0,
                           with_amx && num_parts == 1, part, num_parts, num_splits});
        }
        if (num_parts > 1) ++num_splits;
      }
    }
  }
  // Short units last: they fill what the long ones leave of the threads' time.
  std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) {
    return a.num_queries > b.num_queries;
  });
  return units;
}

template <typename T>
void attention(const LminfBatch& batch, const LminfLayer& layer,
               const Recalled<T>* recalled = nullptr) {
  const std::vector<Unit> units = plan(batch, layer, uses_amx<T>(layer));
  const bool any_by_amx = std::any_of(units.begin(), units.end(),
                                      [](const Unit& unit) { return unit.by_amx; });
  const int64_t group_size = layer.num_heads / layer.num_kv_heads;
  int64_t num_splits = 0, max_parts = 0, max_rows = 0;
  for (const Unit& unit : units) {
    if (unit.num_parts == 1) continue;
    num_splits = std::max(num_splits, unit.split + 1);
    max_parts = std::max(max_parts, unit.num_parts);
    max_rows = std::max(max_rows, unit.num_queries * group_size);
  }
  const int64_t part_size = max_rows * (layer.head_size + 2);
  const std::unique_ptr<float[]> saved(new float[num_splits * max_parts * part_size]);
  const std::unique_ptr<std::atomic<int>[]> finished(new std::atomic<int>[num_splits]());
  std::atomic<size_t> next{0};

  in_threads(units.size() > 1, [&] {
    const AmxSession session(any_by_amx);
    UnitWorker<T> worker(batch, layer);
    for (size_t u = next++; u < units.size(); u = next++) {
      const Unit& unit = units[u];
      worker.run(unit);
      if (unit.num_parts > 1) {
        float* parts = saved.get() + unit.split * max_parts * part_size;
        worker.save(parts + unit.part * part_size);
        if (finished[unit.split].fetch_add(1) + 1 < unit.num_parts) continue;
        worker.join(parts, unit.num_parts, part_size);
      }
      if (recalled != nullptr) worker.add_recalled(*recalled);
      worker.write_output();
    }
  });
}

}  // namespace lminf
