// The middle recalled: the best keys of what the Λ hides, found in the archive and attended to.
//
// The work is cut into tiles: some queries of one request, and the query heads of one key head; the
// keys of few tiles are cut into segments too. One scan over the index (`codes.h`) gives for every
// key between which two numbers its score is (`archive.h`). A key stays a candidate unless k others
// are certain to be better; the candidates left in the end are scored exactly, and the k best of
// them are the k best of all, of equals those at lower positions. So the result doesn't depend on
// how the work is cut, or on how far the scan of another segment has come, from which a segment
// learns what it need not look at.
//
// What is ranked are units: keys, each query head having its own best; or blocks of positions, which
// the heads of a key head have in common, and which are as good as their best pair of key and head.
//
// The scores of what was found and its values are summed up in float32, and added to what a query
// sees anyway before that is divided by its weights (`attention.h`).

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "archive.h"
#include "codes.h"
#include "interface.h"
#include "ranges.h"
#include "rotary.h"
#include "threads.h"
#include "vector.h"

namespace lminf {

constexpr int64_t kTileLines = 24;         // lines of a tile; a line is one head of one query
constexpr int64_t kSegment = 4096;         // keys of a segment
constexpr size_t kTilesWithSegments = 64;  // more tiles than that aren't cut
constexpr int64_t kPending = 32;           // candidates that are gathered before some are dropped
constexpr int kMaxChunk = 8;               // groups of 16 keys that are scanned at once

// Groups of keys for a number of lines, so that sums fill the registers.
template <int lines>
constexpr int chunk_for() {
#if defined(__AVX512BW__)
  return lines > 2 ? 4 : 8;
#elif defined(__AVX2__)
  return lines > 3 ? 1 : lines > 1 ? 2 : 4;
#else
  return lines > 3 ? 1 : 2;
#endif
}

// A score, the same wherever it is asked for: compilers may round one copy of it unlike another.
template <typename T>
__attribute__((noinline)) float product(const float* query, const typename T::Stored* key,
                                        int64_t head_size) {
  Floats sum = {};
  for (int64_t d = 0; d < head_size; d += kLanes) {
    sum = multiply_add(sum, load(query + d), T::widen(key + d));
  }
  return reduce_add(sum);
}

// A query at the distance at which the middle is scored.
template <typename T>
void read_recalling_query(const LminfLayer& layer, const LminfRecall& recall, int64_t token,
                          int64_t head, float* query) {
  const typename T::Stored* from = static_cast<const typename T::Stored*>(layer.query) +
                                   token * layer.query_stride + head * layer.head_size;
  for (int64_t d = 0; d < layer.head_size; d += kLanes) store(query + d, T::widen(from + d));
  const int64_t half = recall.rotary_half;
  if (half == 0) return;
  rotate_head<Float32>(query, recall.query_cos + token * half, recall.query_sin + token * half,
                       half, recall.is_neox_style);
}

// A unit, and what it scores; or between what, where that isn't known yet.
struct Candidate {
  float low, high;
  int32_t unit;
  bool is_exact;
};

// The order in which units are recalled, by exact scores.
struct IsBetter {
  bool operator()(const Candidate& a, const Candidate& b) const {
    return a.low > b.low || (a.low == b.low && a.unit < b.unit);
  }
};

// Leaves the k best of candidates whose scores are exact.
inline void keep_best(std::vector<Candidate>& candidates, int64_t top_k) {
  if (static_cast<int64_t>(candidates.size()) <= top_k) return;
  std::nth_element(candidates.begin(), candidates.begin() + top_k, candidates.end(), IsBetter());
  candidates.resize(top_k);
}

struct RecallTile {
  int64_t request;
  int64_t kv_head;
  int64_t first_token;     // row of the first query in the batch
  int64_t first_position;  // its position in the sequence
  int64_t num_queries;
  int64_t first_row;       // the first query's number among those of the batch that look
  Interval keys;           // the middle of the last query
  int64_t first_segment;
  int64_t num_segments;
};

struct RecallSegment {
  int64_t tile;
  Interval keys;
};

// A bound below the k-th best score of a query, known to all segments.
using Threshold = std::atomic<float>;

// Searches segments, one after the other.
template <typename T>
class Searcher {
  using Stored = typename T::Stored;

 public:
  Searcher(const LminfBatch& batch, const LminfLayer& layer, const LminfRecall& recall,
           const Pages<T>& pages)
      : batch_(batch),
        layer_(layer),
        recall_(recall),
        pages_(pages),
        group_size_(layer.num_heads / layer.num_kv_heads),
        by_key_(recall.unit_size == 1),
        capacity_(std::min<int64_t>(recall.top_k, std::numeric_limits<int32_t>::max()) +
                  kPending) {}

  // The best units of a segment for every list of the tile, in any order; fewer than k where others
  // are better. A list belongs to a line, or to a query where heads have their units in common.
  // `thresholds` has one for every list.
  void search(const RecallTile& tile, Interval keys, Threshold* thresholds,
              std::vector<Candidate>* found) {
    shared_ = thresholds;
    if (tile_ != &tile) {
      tile_ = &tile;
      num_lines_ = tile.num_queries * group_size_;
      num_lists_ = by_key_ ? num_lines_ : tile.num_queries;
      read_queries();
    }
    lists_.resize(num_lists_);
    for (std::vector<Candidate>& list : lists_) list.clear();
    thresholds_.resize(num_lists_);
    for (int64_t list = 0; list < num_lists_; ++list) {
      thresholds_[list] = thresholds[list].load(std::memory_order_relaxed);
    }
    if (!by_key_) {
      chunk_low_.resize(num_lists_ * kMaxChunk);
      chunk_high_.resize(num_lists_ * kMaxChunk);
      unit_low_.assign(num_lists_, broadcast(kMinusInfinity));
      unit_high_ = unit_low_;
    }
    scan(keys);
    if (!by_key_) finish_unit();
    for (int64_t list = 0; list < num_lists_; ++list) {
      select_exactly(list);
      found[list] = lists_[list];
    }
  }

 private:
  int64_t end_of_middle(int64_t query) const {
    return tile_->first_position + query - batch_.n_local + 1;
  }
  int64_t query_of(int64_t list) const { return by_key_ ? list / group_size_ : list; }
  int64_t page_of(int64_t position) const {
    return recall_.block_table[tile_->request * recall_.block_table_stride +
                               position / pages_.block_size];
  }
  const Stored* key_at(int64_t position) const {
    return pages_.keys(page_of(position), tile_->kv_head) +
           position % pages_.block_size * pages_.head_size;
  }

  // The tile's queries: as they are, and as whole numbers times a scale; see `archive.h`.
  void read_queries() {
    const int64_t head_size = layer_.head_size;
    query_.resize(num_lines_ * head_size);
    pairs_.resize(num_lines_ * head_size / 2);
    scale_.resize(num_lines_);
    length_.resize(num_lines_);
    shift_.resize(num_lines_);
    std::vector<double> exact(head_size);
    std::vector<int16_t> whole(head_size);
    for (int64_t line = 0; line < num_lines_; ++line) {
      float* query = &query_[line * head_size];
      read_recalling_query<T>(layer_, recall_, tile_->first_token + line / group_size_,
                              tile_->kv_head * group_size_ + line % group_size_, query);
      std::copy_n(query, head_size, exact.begin());
      const double largest = largest_size(exact.data(), head_size);
      const double size = length(exact.data(), head_size);
      const bool known = size == 0.0 || (size >= 0x1p-80 && size <= 0x1p60);  // not so for NaN
      scale_[line] = known ? static_cast<float>(largest / kQueryLimit)
                           : std::numeric_limits<float>::quiet_NaN();
      length_[line] = rounded_up(size);
      const double inverse = known && size > 0.0 ? 1.0 / scale_[line] : 0.0;
      for (int64_t d = 0; d < head_size; ++d) {
        const double bounded = std::min<double>(
            kQueryLimit, std::max<double>(-kQueryLimit, known ? exact[d] * inverse : 0.0));
        whole[d] = static_cast<int16_t>(static_cast<int32_t>(rounded(bounded)));
      }
      std::memcpy(&pairs_[line * head_size / 2], whole.data(), head_size * sizeof(int16_t));
    }
  }

  void scan(Interval keys) {
    const int64_t block_size = pages_.block_size;
    const int64_t seq_len = batch_.seq_lens[tile_->request];
    int64_t end;
    for (int64_t begin = keys.begin / kLanes * kLanes; begin < keys.end; begin = end) {
      const int64_t next = (begin / block_size + 1) * block_size;
      end = std::min(next, (keys.end + kLanes - 1) / kLanes * kLanes);
      if (next <= seq_len) {
        scan_page(begin, end, next < keys.end ? page_of(next) : -1);
      } else {
        take_unindexed(begin, end);
      }
    }
  }

  // Groups of a page that isn't full: it has no index yet.
  void take_unindexed(int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kLanes) {
      if (by_key_) {
        for (int64_t line = 0; line < num_lines_; ++line) {
          add_keys(line, first, broadcast(kMinusInfinity), broadcast(kInfinity), 0xffffu);
        }
      } else {
        for (int64_t query = 0; query < num_lists_; ++query) {
          chunk_low_[query * kMaxChunk] = broadcast(kMinusInfinity);
          chunk_high_[query * kMaxChunk] = broadcast(kInfinity);
        }
        add_to_unit(first, 0);
      }
    }
  }

  // Positions [begin, end) of a page, groups of 16; `next_page` is the one after it, or negative.
  void scan_page(int64_t begin, int64_t end, int64_t next_page) {
    const int64_t head = tile_->kv_head, head_size = layer_.head_size;
    const int64_t page = page_of(begin), offset = begin % pages_.block_size;
    const int8_t* codes = pages_.codes(page, head) + offset * head_size;
    const float* scales = pages_.scales(page, head) + offset;
    const float* radii = pages_.radii(page, head) + offset;
    const float* centre = pages_.centre(page, head);
    for (int64_t line = 0; line < num_lines_; ++line) {
      shift_[line] = product<Float32>(&query_[line * head_size], centre, head_size);
    }
    // What is scanned next is fetched meanwhile; behind the last page, what is there already.
    const int8_t* next = codes;
    if (next_page >= 0) {
      next = pages_.codes(next_page, head);
      prefetch(pages_.scales(next_page, head), pages_.block_size * sizeof(float));
      prefetch(pages_.radii(next_page, head), pages_.block_size * sizeof(float));
      prefetch(pages_.centre(next_page, head), head_size * sizeof(float));
    }
    const int64_t lines_at_once = std::min<int64_t>(6, num_lines_);
    int64_t chunk = 0;
    with_rows(lines_at_once, [&](auto count) { chunk = chunk_for<count()>(); });
    while (begin < end) {
      const int64_t groups = (end - begin) / kLanes >= chunk ? chunk : 1;
      const int64_t step = groups * kLanes * head_size;
      for (int64_t line = 0; line < num_lines_; line += lines_at_once) {
        const int64_t lines = std::min(lines_at_once, num_lines_ - line);
        with_rows(lines, [&](auto count) {
          // With fewer lines at the end than before, a chunk may be several of theirs.
          constexpr int most = chunk_for<count()>();
          int64_t g = 0;
          for (; g + most <= groups; g += most) {
            scan_chunk<count(), most>(line, begin, g, codes, scales, radii, next);
          }
          for (; g < groups; ++g) {
            scan_chunk<count(), 1>(line, begin, g, codes, scales, radii, next);
          }
        });
      }
      if (!by_key_) {
        for (int64_t g = 0; g < groups; ++g) add_to_unit(begin + g * kLanes, g);
      }
      begin += groups * kLanes;
      codes += step;
      next += step;
      scales += groups * kLanes;
      radii += groups * kLanes;
    }
  }

  static void prefetch(const void* from, int64_t size) {
    for (int64_t i = 0; i < size; i += 64) {
      __builtin_prefetch(static_cast<const char*>(from) + i);
    }
  }

  // `groups` groups from group `first` on, of a chunk that begins at a position.
  template <int lines, int groups>
  void scan_chunk(int64_t first_line, int64_t position, int64_t first, const int8_t* codes,
                  const float* scales, const float* radii, const int8_t* next) {
    const int64_t head_size = layer_.head_size;
    Floats products[lines][groups];
    multiply_codes<lines, groups>(&pairs_[first_line * head_size / 2], head_size / 2,
                                  codes + first * kLanes * head_size, head_size / 2,
                                  next + first * kLanes * head_size, products);
    for (int l = 0; l < lines; ++l) {
      const int64_t line = first_line + l;
      const Floats scale = broadcast(scale_[line]), shift = broadcast(shift_[line]);
      const Floats size = broadcast(length_[line]), underflow = broadcast(kUnderflow);
      for (int g = 0; g < groups; ++g) {
        const int64_t group = first + g;
        const Floats estimate =
            multiply_add(shift, load(scales + group * kLanes), products[l][g] * scale);
        const Floats bound = multiply_add(underflow, size, load(radii + group * kLanes));
        const Floats high = estimate + bound;
        if (by_key_) {
          const uint32_t hits = not_below(high, broadcast(thresholds_[line]));
          if (hits != 0) add_keys(line, position + group * kLanes, estimate - bound, high, hits);
        } else {
          join_heads(line, group, estimate - bound, high);
        }
      }
    }
  }

  // Which of the 16 keys from a position on are in the middle of a query.
  uint32_t middle_of(int64_t query, int64_t first) const {
    const int64_t begin = std::clamp<int64_t>(batch_.n_global - first, 0, kLanes);
    const int64_t end = std::clamp<int64_t>(end_of_middle(query) - first, begin, kLanes);
    return (1u << end) - (1u << begin);
  }

  __attribute__((noinline)) void add_keys(int64_t line, int64_t first, Floats low, Floats high,
                                          uint32_t hits) {
    float lows[kLanes], highs[kLanes];
    store(lows, low);
    store(highs, high);
    for (hits &= middle_of(line / group_size_, first); hits != 0; hits &= hits - 1) {
      const int lane = __builtin_ctz(hits);
      add(line, first + lane, lows[lane], highs[lane]);
    }
  }

  // Puts the bounds of a line's 16 keys together with those of the query's other heads.
  void join_heads(int64_t line, int64_t group, Floats low, Floats high) {
    const int64_t at = line / group_size_ * kMaxChunk + group;
    const Floats unknown = broadcast(kInfinity);
    high = each([&](int p) { return high.part[p] == high.part[p] ? high.part[p] : unknown.part[p]; });
    const bool is_first = line % group_size_ == 0;
    chunk_high_[at] = is_first ? high : maximum(high, chunk_high_[at]);
    chunk_low_[at] = maximum(low, is_first ? broadcast(kMinusInfinity) : chunk_low_[at]);
  }

  // Adds 16 keys to the units that they are of; they are group `group` of a chunk.
  void add_to_unit(int64_t first, int64_t group) {
    if (first / recall_.unit_size != unit_) {
      finish_unit();
      unit_ = first / recall_.unit_size;
    }
    for (int64_t query = 0; query < num_lists_; ++query) {
      Floats low = chunk_low_[query * kMaxChunk + group];
      Floats high = chunk_high_[query * kMaxChunk + group];
      const uint32_t inside = middle_of(query, first);
      if (inside != 0xffffu) {
        float lows[kLanes], highs[kLanes];
        store(lows, low);
        store(highs, high);
        for (int lane = 0; lane < kLanes; ++lane) {
          if (inside >> lane & 1) continue;
          lows[lane] = highs[lane] = kMinusInfinity;
        }
        low = load(lows);
        high = load(highs);
      }
      unit_low_[query] = maximum(low, unit_low_[query]);
      unit_high_[query] = maximum(high, unit_high_[query]);
    }
  }

  // Makes candidates of the unit that was gathered, and begins another.
  void finish_unit() {
    for (int64_t query = 0; query < num_lists_; ++query) {
      if (not_below(unit_high_[query], broadcast(thresholds_[query])) != 0) {
        const float high = reduce_max(unit_high_[query]);
        // Otherwise it has no key in the query's middle.
        if (high > kMinusInfinity) add(query, unit_, reduce_max(unit_low_[query]), high);
      }
      unit_low_[query] = unit_high_[query] = broadcast(kMinusInfinity);
    }
  }

  void add(int64_t list, int64_t unit, float low, float high) {
    if (!(high >= low)) {  // one of them is NaN
      low = kMinusInfinity;
      high = kInfinity;
    }
    if (high < thresholds_[list]) return;
    lists_[list].push_back({low, high, static_cast<int32_t>(unit), false});
    if (static_cast<int64_t>(lists_[list].size()) >= capacity_) drop(list);
  }

  // Drops candidates that are certain to be no result.
  void drop(int64_t list) {
    const int64_t left = drop_by_bounds(list);
    if (left > capacity_ - kPending / 2) select_exactly(list);
  }

  // By what is known of their scores. Returns how many are left.
  int64_t drop_by_bounds(int64_t list) {
    std::vector<Candidate>& candidates = lists_[list];
    const int64_t top_k = recall_.top_k;
    if (static_cast<int64_t>(candidates.size()) >= top_k) {
      lows_.clear();
      for (const Candidate& each : candidates) lows_.push_back(each.low);
      std::nth_element(lows_.begin(), lows_.begin() + (top_k - 1), lows_.end(),
                       std::greater<float>());
      raise_threshold(list, lows_[top_k - 1]);
    } else {
      raise_threshold(list, kMinusInfinity);
    }
    const float threshold = thresholds_[list];
    candidates.erase(
        std::remove_if(candidates.begin(), candidates.end(),
                       [=](const Candidate& each) { return each.high < threshold; }),
        candidates.end());
    return static_cast<int64_t>(candidates.size());
  }

  // Leaves the k best, with exact scores.
  void select_exactly(int64_t list) {
    std::vector<Candidate>& candidates = lists_[list];
    drop_by_bounds(list);
    for (const Candidate& each : candidates) {
      if (!each.is_exact && by_key_) {
        prefetch(key_at(each.unit), layer_.head_size * sizeof(Stored));
      }
    }
    for (Candidate& each : candidates) {
      if (each.is_exact) continue;
      each.low = each.high = score(list, each.unit);
      each.is_exact = true;
    }
    keep_best(candidates, recall_.top_k);
    if (static_cast<int64_t>(candidates.size()) < recall_.top_k) return;
    float worst = kInfinity;
    for (const Candidate& each : candidates) worst = std::min(worst, each.low);
    raise_threshold(list, worst);
  }

  // Tells other segments, and learns what they know.
  void raise_threshold(int64_t list, float threshold) {
    Threshold& shared = shared_[list];
    float known = shared.load(std::memory_order_relaxed);
    while (known < threshold &&
           !shared.compare_exchange_weak(known, threshold, std::memory_order_relaxed)) {
    }
    thresholds_[list] = std::max({thresholds_[list], known, threshold});
  }

  // What a unit scores. NaN counts as best, so that it is seen in the result.
  float score(int64_t list, int64_t unit) const {
    const int64_t head_size = layer_.head_size, query = query_of(list);
    if (by_key_) return ranked(product<T>(&query_[list * head_size], key_at(unit), head_size));
    const int64_t begin = std::max(batch_.n_global, unit * recall_.unit_size);
    const int64_t end = std::min(end_of_middle(query), (unit + 1) * recall_.unit_size);
    float best = kMinusInfinity;
    for (int64_t position = begin; position < end; ++position) {
      const Stored* key = key_at(position);
      for (int64_t h = 0; h < group_size_; ++h) {
        const float* line = &query_[(query * group_size_ + h) * head_size];
        best = std::max(best, ranked(product<T>(line, key, head_size)));
      }
    }
    return best;
  }

  static float ranked(float score) { return score == score ? score : kInfinity; }

  const LminfBatch& batch_;
  const LminfLayer& layer_;
  const LminfRecall& recall_;
  const Pages<T>& pages_;
  const int64_t group_size_;  // query heads to a key head
  const bool by_key_;         // a unit is a key
  const int64_t capacity_;    // of a list of candidates
  const RecallTile* tile_ = nullptr;
  Threshold* shared_ = nullptr;
  int64_t num_lines_ = 0, num_lists_ = 0, unit_ = -1;

  std::vector<float> query_, scale_, length_, shift_, thresholds_, lows_;
  std::vector<int32_t> pairs_;
  std::vector<std::vector<Candidate>> lists_;
  std::vector<Floats> chunk_low_, chunk_high_, unit_low_, unit_high_;
};

// Sums over recalled keys: of weights, relative to a maximum in powers of two.
struct RecalledState {
  float maximum;
  float sum;
};

// What the queries of a batch recall.
template <typename T>
class Recalled {
  using Stored = typename T::Stored;

 public:
  Recalled(const LminfBatch& batch, const LminfLayer& layer, const LminfRecall& recall,
           const LminfArchive& archive)
      : layer_(layer),
        recall_(recall),
        pages_(archive, layer.num_kv_heads, layer.head_size),
        n_global_(batch.n_global),
        n_local_(batch.n_local),
        heads_to_a_list_(recall.unit_size == 1 ? 1 : layer.num_heads / layer.num_kv_heads),
        lists_to_a_row_(layer.num_heads / heads_to_a_list_) {
    plan(batch);
    if (!tiles_.empty()) search(batch);
  }

  // The keys of the middle that a query's head recalls: leaves the sum of their values by weight.
  RecalledState attend(int64_t request, int64_t position, int64_t token, int64_t head,
                       float* output) const {
    const Looking& looking = looking_[request];
    if (position < looking.first_position) return {kMinusInfinity, 0.0f};
    const int64_t row = looking.first_row + position - looking.first_position;
    const int64_t list = row * lists_to_a_row_ + head / heads_to_a_list_;
    const int64_t head_size = layer_.head_size;
    const int64_t kv_head = head / (layer_.num_heads / layer_.num_kv_heads);
    const int32_t* table = recall_.block_table + request * recall_.block_table_stride;
    const int64_t block_size = pages_.block_size, unit_size = recall_.unit_size;

    std::vector<int64_t> positions;
    for (int64_t u = 0; u < counts_[list]; ++u) {
      const int64_t unit = units_[list * max_units_ + u];
      const int64_t end = std::min(position - n_local_ + 1, (unit + 1) * unit_size);
      for (int64_t j = std::max(n_global_, unit * unit_size); j < end; ++j) {
        positions.push_back(j);
      }
    }
    std::vector<float> query(head_size), scores;
    read_recalling_query<T>(layer_, recall_, token, head, query.data());
    RecalledState state = {kMinusInfinity, 0.0f};
    for (const int64_t j : positions) {
      const Stored* key =
          pages_.keys(table[j / block_size], kv_head) + j % block_size * head_size;
      float score = product<T>(query.data(), key, head_size) * layer_.scale;
      if (layer_.softcap != 0.0f) score = layer_.softcap * std::tanh(score / layer_.softcap);
      scores.push_back(score * kLog2e);
      state.maximum = scores.back() <= state.maximum ? state.maximum : scores.back();
    }
    std::fill_n(output, head_size, 0.0f);
    for (size_t k = 0; k < positions.size(); ++k) {
      const int64_t j = positions[k];
      const Stored* value =
          pages_.values(table[j / block_size], kv_head) + j % block_size * head_size;
      const float weight = std::exp2(scores[k] - state.maximum);
      state.sum += weight;
      for (int64_t d = 0; d < head_size; d += kLanes) {
        store(output + d,
              multiply_add(load(output + d), broadcast(weight), T::widen(value + d)));
      }
    }
    return state;
  }

 private:
  // A request's queries that look: from a position on.
  struct Looking {
    int64_t first_position;
    int64_t first_row;
  };

  void plan(const LminfBatch& batch) {
    const int64_t group_size = layer_.num_heads / layer_.num_kv_heads;
    const int64_t rows_to_a_tile = std::max<int64_t>(1, kTileLines / group_size);
    const int64_t unit_size = recall_.unit_size;
    int64_t num_rows = 0, longest = 0;
    for (int64_t r = 0; r < batch.num_requests; ++r) {
      const int64_t token = batch.query_start_loc[r];
      const int64_t queries = batch.query_start_loc[r + 1] - token;
      const int64_t seq_len = batch.seq_lens[r], start = seq_len - queries;
      // The first query with a middle is at n_global + n_local.
      const int64_t first =
          std::max({start, int64_t{recall_.first_rows[r]}, n_global_ + n_local_});
      const bool looks = queries > 0 && recall_.top_k > 0;
      looking_.push_back({looks ? first : std::numeric_limits<int64_t>::max(), num_rows});
      for (int64_t at = first; looks && at < seq_len; at += rows_to_a_tile) {
        const int64_t count = std::min(rows_to_a_tile, seq_len - at);
        const Interval keys = {n_global_, at + count - n_local_};
        longest = std::max(longest, keys.end - keys.begin);
        for (int64_t h = 0; h < layer_.num_kv_heads; ++h) {
          tiles_.push_back({r, h, token + at - start, at, count, num_rows, keys, 0, 0});
        }
        num_rows += count;
      }
    }
    const int64_t units = longest / unit_size + (unit_size > 1 ? 2 : 0);
    max_units_ = std::min(recall_.top_k, units);
    counts_.resize(num_rows * lists_to_a_row_);
    units_.resize(counts_.size() * max_units_);
    // A unit is of one segment.
    const int64_t size = (kSegment + unit_size - 1) / unit_size * unit_size;
    const bool are_cut = tiles_.size() <= kTilesWithSegments;
    for (size_t t = 0; t < tiles_.size(); ++t) {
      RecallTile& tile = tiles_[t];
      tile.first_segment = static_cast<int64_t>(segments_.size());
      for (int64_t begin = tile.keys.begin; begin < tile.keys.end;) {
        const int64_t end =
            are_cut ? std::min(tile.keys.end, (begin / size + 1) * size) : tile.keys.end;
        segments_.push_back({static_cast<int64_t>(t), {begin, end}});
        begin = end;
      }
      tile.num_segments = static_cast<int64_t>(segments_.size()) - tile.first_segment;
    }
  }

  void search(const LminfBatch& batch) {
    const int64_t group_size = layer_.num_heads / layer_.num_kv_heads;
    const int64_t lists_to_a_tile =
        std::max<int64_t>(1, kTileLines / group_size) * group_size / heads_to_a_list_;
    const size_t num_lists = tiles_.size() * lists_to_a_tile;
    const std::unique_ptr<Threshold[]> thresholds(new Threshold[num_lists]);
    for (size_t i = 0; i < num_lists; ++i) thresholds[i] = kMinusInfinity;
    std::vector<std::vector<Candidate>> found(segments_.size() * lists_to_a_tile);
    const std::unique_ptr<std::atomic<int64_t>[]> finished(
        new std::atomic<int64_t>[tiles_.size()]());
    std::atomic<size_t> next{0};
    in_threads(segments_.size() > 1, [&] {
      Searcher<T> searcher(batch, layer_, recall_, pages_);
      for (size_t s = next++; s < segments_.size(); s = next++) {
        const RecallSegment& segment = segments_[s];
        const RecallTile& tile = tiles_[segment.tile];
        searcher.search(tile, segment.keys, &thresholds[segment.tile * lists_to_a_tile],
                        &found[s * lists_to_a_tile]);
        if (finished[segment.tile].fetch_add(1) + 1 < tile.num_segments) continue;
        join(tile, &found[tile.first_segment * lists_to_a_tile], lists_to_a_tile);
      }
    });
  }

  // The best units of all segments of a tile, in the order of their positions.
  void join(const RecallTile& tile, std::vector<Candidate>* found, int64_t lists_to_a_tile) {
    const int64_t lists_to_a_key_head = lists_to_a_row_ / layer_.num_kv_heads;
    for (int64_t list = 0; list < tile.num_queries * lists_to_a_key_head; ++list) {
      std::vector<Candidate>& all = found[list];
      for (int64_t s = 1; s < tile.num_segments; ++s) {
        std::vector<Candidate>& more = found[s * lists_to_a_tile + list];
        all.insert(all.end(), more.begin(), more.end());
        std::vector<Candidate>().swap(more);
      }
      keep_best(all, recall_.top_k);
      const int64_t count = static_cast<int64_t>(all.size());
      const int64_t row = tile.first_row + list / lists_to_a_key_head;
      const int64_t at = row * lists_to_a_row_ + tile.kv_head * lists_to_a_key_head +
                         list % lists_to_a_key_head;
      int32_t* units = &units_[at * max_units_];
      for (int64_t u = 0; u < count; ++u) units[u] = all[u].unit;
      std::sort(units, units + count);
      counts_[at] = count;
      std::vector<Candidate>().swap(all);
    }
  }

  const LminfLayer& layer_;
  const LminfRecall& recall_;
  const Pages<T> pages_;
  const int64_t n_global_, n_local_;
  const int64_t heads_to_a_list_, lists_to_a_row_;
  int64_t max_units_ = 0;
  std::vector<Looking> looking_;         // of every request
  std::vector<RecallTile> tiles_;
  std::vector<RecallSegment> segments_;  // those of a tile one after the other
  std::vector<int64_t> counts_;          // [rows that look, lists_to_a_row_]
  std::vector<int32_t> units_;           // [rows that look, lists_to_a_row_, max_units_]
};

}  // namespace lminf
