// Searches of one entity type over borrowed arrays; Python is used only to make the ids of an
// answer.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "links.h"
#include "shared.h"
#include "sketch.h"

namespace {

struct Hit {
  float score;
  uint32_t row;
};
inline bool better(const Hit& a, const Hit& b) {
  return a.score > b.score || (a.score == b.score && a.row < b.row);
}

// A node and its score by codes. The highest bit of `node` says that a walk has followed its links:
// insertions move half the bytes of a struct with a flag.
struct Candidate {
  static constexpr uint32_t followed = 1u << 31;
  int32_t score;
  uint32_t node;
};
constexpr size_t most_nodes = Candidate::followed;

// Rows that a search may return: those that pass the filter (`mask`) and are not hidden. Both have
// one byte a row, or are null: no filter, nothing hidden.
struct AllowedRows {
  const uint8_t* mask = nullptr;
  const uint8_t* hidden = nullptr;
  bool holds(uint32_t row) const {
    return (mask == nullptr || mask[row]) && (hidden == nullptr || !hidden[row]);
  }
  bool all() const { return mask == nullptr && hidden == nullptr; }
};

// Row numbers to score.
struct ChosenRows {
  const uint32_t* first;
  size_t count;
};

// A query in signed bytes, and what its inner products with codes say about those with vectors:
// product = base + unit * score, by at most `error` wrong.
struct CodedQuery {
  double base = 0.0, unit = 1.0, error = 0.0;
  // Lowest score that a row may have whose product is `product` or more.
  double lowest_score(double product) const { return (product - error - base) / unit; }
};

// Buffers of one running search; searches that take turns have one each.
struct Scratch {
  std::vector<uint16_t> seen;
  uint16_t epoch = 0;
  std::vector<float> weighted;
  std::vector<int8_t> query;
  std::vector<Candidate> pool;
  std::vector<uint32_t> fresh;
  SketchTable table;
  std::vector<Hit> hits, best;
  // A walk between two steps: its candidates are the first `size` of the pool, those before `at`
  // are followed, and `found` fresh nodes wait to be offered.
  size_t ef = 0, size = 0, at = 0, found = 0;
  // Walks in a row that needed less than a quarter of `seen`, which is as long as the largest graph.
  size_t small_walks = 0;
  void begin(size_t nodes) {
    constexpr size_t patience = 1000;
    small_walks = 4 * nodes + (1 << 16) < seen.size() ? small_walks + 1 : 0;
    if (seen.size() < nodes || small_walks > patience) {
      std::vector<uint16_t>(nodes, 0).swap(seen);
      epoch = small_walks = 0;
    }
    if (++epoch == 0) {
      std::fill(seen.begin(), seen.end(), uint16_t(0));
      epoch = 1;
    }
  }
  void release() {
    trim(weighted);
    trim(query);
    trim(pool);
    trim(fresh);
    trim(hits);
    trim(best);
  }
};
thread_local Scratch scratch;

// Releases large buffers at the end of a search.
struct Releases {
  Scratch& held;
  ~Releases() { held.release(); }
};

// Walks of a batch that take turns: one waits for memory while the others compute.
constexpr size_t turns = 4;
thread_local Scratch turn_scratch[turns];

struct Core {
  Array vectors, codes, graph, links, sketch, factors, nodes, starts, rows, blob, offsets;
  // float32: the centre of the codes, a step for each dimension, the largest distance of a vector
  // from what its codes stand for, and the largest norm of codes about the centre. Without it codes
  // are multiples of one unknown step, and rank but bound nothing.
  Array quantiser;
  float link_unit = 1.0f;  // what the factors of links were divided by
  size_t node_count = 0, row_count = 0, dimension = 0, stride = 0, degree = 0;
  LinkLayout layout;
  uint32_t entry = 0;

  const float* vector(uint32_t node) const {
    return vectors.as<float>() + size_t(node) * dimension;
  }
  const uint8_t* code(uint32_t node) const { return codes.as<uint8_t>() + size_t(node) * stride; }
  const float* centre() const { return quantiser.as<float>(); }
  const float* steps() const { return quantiser.as<float>() + dimension; }
  float code_error() const { return quantiser.as<float>()[2 * dimension]; }
  float code_reach() const { return quantiser.as<float>()[2 * dimension + 1]; }
  uint32_t node_of(uint32_t row) const { return nodes.held ? nodes.as<uint32_t>()[row] : row; }

  // Whether the three arrays that map rows and nodes are all there or all absent, have the right
  // sizes, and point nowhere else.
  bool rows_fit_nodes() const {
    if (nodes.held != starts.held || starts.held != rows.held) return false;
    if (!nodes.held) return true;
    if (starts.bytes() != (node_count + 1) * 4 || rows.bytes() != row_count * 4) return false;
    const uint32_t *node = nodes.as<uint32_t>(), *first = starts.as<uint32_t>(),
                   *row = rows.as<uint32_t>();
    if (first[node_count] != row_count) return false;
    for (size_t i = 0; i < node_count; i++)
      if (first[i] > first[i + 1]) return false;
    for (size_t i = 0; i < row_count; i++)
      if (node[i] >= node_count || row[i] >= row_count) return false;
    return true;
  }

  // Whether any row of the node is allowed.
  bool any_allowed(uint32_t node, AllowedRows allowed) const {
    if (!starts.held) return allowed.holds(node);
    const uint32_t* first = starts.as<uint32_t>();
    for (uint32_t i = first[node]; i < first[node + 1]; i++)
      if (allowed.holds(rows.as<uint32_t>()[i])) return true;
    return false;
  }

  // A bit for each of 32 bytes that is not zero.
  static uint32_t nonzero_bits(const uint8_t* bytes) {
    uint32_t bits = 0;
    for (size_t i = 0; i < 4; i++) {
      uint64_t eight;
      std::memcpy(&eight, bytes + 8 * i, 8);
      bits |= uint32_t((eight * 0x0102040810204080ull) >> 56) << (8 * i);  // masks hold 0 or 1
    }
    return bits;
  }

  // Inlined by force: to the compiler a function that only prefetches does nothing, and it may drop
  // the calls.
  __attribute__((always_inline)) static void prefetch(const uint8_t* at, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
  }
  __attribute__((always_inline)) void prefetch_code(uint32_t node) const {
    prefetch(code(node), stride);
  }
  bool walks() const { return graph.held || links.held; }
  const uint8_t* out_links(uint32_t node) const {
    return links.held ? links.as<uint8_t>() + size_t(node) * layout.bytes()
                      : graph.as<uint8_t>() + size_t(node) * degree * 4;
  }
  __attribute__((always_inline)) void prefetch_links(uint32_t node) const {
    prefetch(out_links(node), links.held ? layout.bytes() : degree * 4);
  }

  // Quantises the query, each component times the step of its dimension, to signed bytes; returns
  // the factor between. The codes' offset of 128 and their centre add the same amount to every inner
  // product, so their order is that of the vectors.
  float quantise(const float* query, Scratch& s) const {
    s.weighted.resize(dimension);
    float* __restrict weighted = s.weighted.data();
    float largest = 1e-12f;
    if (quantiser.held) {
      const float* step = steps();
      for (size_t i = 0; i < dimension; i++) weighted[i] = query[i] * step[i];
    } else {
      std::copy(query, query + dimension, weighted);
    }
    for (size_t i = 0; i < dimension; i++) largest = std::max(largest, std::fabs(weighted[i]));
    const float scale = 127.0f / largest;
    s.query.assign(stride, 0);
    int8_t* __restrict out = s.query.data();
    for (size_t i = 0; i < dimension; i++)
      out[i] = int8_t(int32_t(weighted[i] * scale + std::copysign(0.5f, weighted[i])));
    return scale;
  }

  // Returns what scores of the query quantised by `scale` say about inner products: a vector differs
  // from its codes by at most code_error(), the codes' norm is at most code_reach(), and the
  // remainder of the query is measured (Cauchy and Schwarz).
  CodedQuery bounds(const float* query, float scale, const Scratch& s) const {
    double rest = 0.0, norm = 0.0, offset = 0.0, centred = 0.0;
    for (size_t i = 0; i < dimension; i++) {
      const double left = double(s.weighted[i]) - double(s.query[i]) / double(scale);
      rest += left * left;
      norm += double(query[i]) * query[i];
      offset += s.query[i];
      centred += double(centre()[i]) * query[i];
    }
    const double rounding = (double(dimension) / 4 + 32) * 6e-8;  // of float_dot
    return CodedQuery{centred - 128.0 * offset / scale, 1.0 / scale,
                      (std::sqrt(norm) * code_error() + std::sqrt(rest) * code_reach()) * 1.000001 +
                          rounding * std::sqrt(norm)};
  }

  // Scores in float32 every candidate of the pool that may be among the best k, as far as codes
  // tell; the hits are the best k of the pool. `node_of_candidate` maps what the pool holds.
  // Returns how many were scored.
  template <class NodeOf>
  size_t settle(const float* query, size_t k, const CodedQuery& coded, NodeOf node_of_candidate,
                Scratch& s) const {
    std::vector<Candidate>& pool = s.pool;
    s.hits.clear();
    auto score_range = [&](size_t from, size_t to) {
      constexpr size_t ahead = 4;
      for (size_t i = from; i < to; i++) {
        if (i + ahead < to) {
          const float* next = vector(node_of_candidate(pool[i + ahead].node));
          for (size_t j = 0; j < dimension; j += 16) __builtin_prefetch(next + j);
        }
        const float* own = vector(node_of_candidate(pool[i].node));
        s.hits.push_back(Hit{float_dot(own, query, dimension), pool[i].node});
      }
    };
    const size_t first = std::max(2 * k, k + 16);
    if (pool.size() <= first) {
      score_range(0, pool.size());
      finish(k, s.hits);
      return pool.size();
    }
    std::nth_element(pool.begin(), pool.begin() + long(first), pool.end(),
                     [](const Candidate& a, const Candidate& b) { return a.score > b.score; });
    score_range(0, first);
    finish(k, s.hits);
    const double lowest = coded.lowest_score(s.hits.back().score);
    const auto end = std::partition(pool.begin() + long(first), pool.end(),
                                    [&](const Candidate& c) { return double(c.score) >= lowest; });
    const size_t scored = size_t(end - pool.begin());
    score_range(first, scored);
    finish(k, s.hits);
    return scored;
  }

  // Collects unseen nodes that this one links to: all, or where links carry sketches those whose
  // estimate, relative to this node's own score, is above `above`. A node that is passed over may
  // come again through another link, with another estimate.
  size_t follow(uint32_t node, float above, Scratch& s) const {
    const uint8_t* record = out_links(node);
    const uint32_t* out = reinterpret_cast<const uint32_t*>(record);
    uint16_t* seen = s.seen.data();
    uint32_t* fresh = s.fresh.data();
    const uint16_t epoch = s.epoch;
    size_t count = 0;
    auto take = [&](uint32_t target) {
      if (seen[target] == epoch) return;
      seen[target] = epoch;
      prefetch_code(target);
      fresh[count++] = target;
    };
    if (!links.held) {
      for (size_t i = 0; i < degree; i++) take(out[i]);
      return count;
    }
    float scores[block_rows];
    const float* scales = reinterpret_cast<const float*>(record + layout.factors_at());
    for (size_t i = 0; i < degree; i += block_rows) {
      const uint8_t* bits = record + layout.bits_at() + i * stride / 8;
      uint32_t promising = sketch_block(bits, s.table, scales + i, above, scores);
      for (; promising != 0; promising &= promising - 1)
        take(out[i + size_t(__builtin_ctz(promising))]);
    }
    return count;
  }

  // Walks best-first over the 8-bit codes; afterwards the pool holds the best nodes, best first.
  void walk(const float* query, size_t ef, Scratch& s) const {
    begin_walk(query, ef, s);
    do {
      offer_fresh<true>(s);
    } while (follow_next<true>(s));
    end_walk(s);
  }

  // Walks for several queries, taking turns, with the same answers as `walk`; calls
  // `done(i, scratch)` at the end of each.
  template <class Done>
  void walk_many(const float* queries, size_t count, size_t ef, Done done) const {
    constexpr size_t idle = ~size_t(0);
    size_t of[turns], next = 0, left = count;
    bool offers[turns];
    auto start = [&](size_t turn) {
      of[turn] = next < count ? next++ : idle;
      offers[turn] = true;
      if (of[turn] != idle) begin_walk(queries + of[turn] * dimension, ef, turn_scratch[turn]);
    };
    for (size_t turn = 0; turn < turns; turn++) start(turn);
    while (left > 0)
      for (size_t turn = 0; turn < turns; turn++) {
        if (of[turn] == idle) continue;
        Scratch& s = turn_scratch[turn];
        if (offers[turn]) {
          offer_fresh<false>(s);
          offers[turn] = false;
        } else if (follow_next<false>(s)) {
          offers[turn] = true;
        } else {
          end_walk(s);
          done(of[turn], s);
          left--;
          start(turn);
        }
      }
  }

  // Not inlined, so that the steps of a walk have the registers to themselves.
  __attribute__((noinline)) void begin_walk(const float* query, size_t ef, Scratch& s) const {
    ef = std::min(ef, node_count);
    s.begin(node_count);
    s.fresh.resize(degree);
    const float scale = quantise(query, s);
    if (links.held) s.table.fill(query, dimension, stride, scale * link_unit);
    s.pool.resize(ef + 1);
    s.ef = ef;
    s.size = s.at = 0;
    s.seen[entry] = s.epoch;
    s.fresh[0] = entry;
    s.found = 1;
  }

  // Inserts the nodes that the last step found into the candidates. `alone`: no other walk runs
  // meanwhile, so links that may be followed soon are prefetched.
  template <bool alone>
  void offer_fresh(Scratch& s) const {
    Candidate* pool = s.pool.data();
    const int8_t* q = s.query.data();
    const size_t ef = s.ef, at = s.at;
    size_t size = s.size, lowest = at;
    for (size_t i = 0; i < s.found; i++) {
      const uint32_t node = s.fresh[i];
      const int32_t score = code_dot(code(node), q, stride);
      if (size == ef) {
        if (score <= pool[size - 1].score) continue;
        size--;
      }
      size_t position = 0;
      // The first candidate that is worse, without a branch to predict.
      for (size_t rest = size; rest > 0;) {
        const size_t half = rest / 2;
        const bool after = pool[position + half].score >= score;
        position = after ? position + half + 1 : position;
        rest = after ? rest - half - 1 : half;
      }
      std::memmove(pool + position + 1, pool + position, (size - position) * sizeof(Candidate));
      pool[position] = Candidate{score, node};
      size++;
      lowest = std::min(lowest, position);
      if (alone && position <= at) prefetch_links(node);
    }
    s.size = size;
    s.at = lowest;
    skip_followed(s);
    if (!alone && s.at < size) prefetch_links(pool[s.at].node);
  }

  // Follows the links of the best candidate not followed yet; false where there is none.
  template <bool alone>
  bool follow_next(Scratch& s) const {
    if (s.at == s.size) return false;
    Candidate* pool = s.pool.data();
    const Candidate from = pool[s.at];
    pool[s.at].node |= Candidate::followed;
    const float above = s.size == s.ef ? float(pool[s.size - 1].score - from.score)
                                       : -std::numeric_limits<float>::infinity();
    s.found = follow(from.node, above, s);
    s.at++;
    for (size_t i = s.at; alone && i < std::min(s.size, s.at + 2); i++)
      if (!(pool[i].node & Candidate::followed)) {
        prefetch_links(pool[i].node);
        break;
      }
    return true;
  }

  static void skip_followed(Scratch& s) {
    while (s.at < s.size && s.pool[s.at].node & Candidate::followed) s.at++;
  }

  static void end_walk(Scratch& s) {
    s.pool.resize(s.size);
    for (Candidate& c : s.pool) c.node &= ~Candidate::followed;
  }

  // Keeps the best `count` of more hits, unordered, and returns the lowest score among them.
  static float best_hits(size_t count, std::vector<Hit>& hits) {
    std::nth_element(hits.begin(), hits.begin() + long(count - 1), hits.end(),
                     [](const Hit& a, const Hit& b) { return a.score > b.score; });
    hits.resize(count);
    return hits.back().score;
  }

  // Whether each node of a whole block has one row and these are consecutive, as almost everywhere;
  // `row` is then the first of them.
  bool consecutive_rows(size_t first, size_t& row) const {
    if (!starts.held) return true;
    const uint32_t* from = starts.as<uint32_t>() + first;
    if (from[block_rows] - from[0] != block_rows) return false;
    const uint32_t* list = rows.as<uint32_t>() + from[0];
    row = list[0];
    return list[block_rows - 1] - list[0] ==
           block_rows - 1;  // nodes stand in the order of their first rows
  }

  // Collects the allowed nodes of every `every`-th block whose estimate is above the threshold;
  // about the best `wanted` where they are more.
  void sketch_pass(float threshold, size_t every, size_t wanted, AllowedRows allowed,
                   Scratch& s) const {
    const uint8_t* bits = sketch.as<uint8_t>();
    const float* scales = factors.as<float>();
    float scores[block_rows];
    s.hits.clear();
    for (size_t first = 0; first < node_count; first += every * block_rows) {
      const size_t count = std::min(block_rows, node_count - first);
      uint32_t may = count == block_rows ? ~0u : (1u << count) - 1;
      size_t row = first;
      const bool direct = count == block_rows && consecutive_rows(first, row);
      if (direct) {
        if (allowed.mask != nullptr) may = nonzero_bits(allowed.mask + row);
        if (allowed.hidden != nullptr) may &= ~nonzero_bits(allowed.hidden + row);
        if (may == 0) continue;
      }
      uint32_t above =
          may & sketch_block(bits + first * stride / 8, s.table, scales + first, threshold, scores);
      for (; above != 0; above &= above - 1) {
        const uint32_t j = uint32_t(__builtin_ctz(above)), node = uint32_t(first) + j;
        if (!direct && !any_allowed(node, allowed)) continue;
        s.hits.push_back(Hit{scores[j], node});
      }
      if (s.hits.size() >= 2 * wanted) threshold = best_hits(wanted, s.hits);
    }
  }

  // Scores every row's sketch, then the 8-bit codes of the best `wanted` allowed nodes, and of those
  // in float32 as many as could be among the best k; the hits are rows, best first.
  void sketch_scan(const float* query, size_t k, size_t wanted, AllowedRows allowed,
                   Scratch& s) const {
    s.table.fill(query, dimension, stride, 1.0f);
    // A threshold from every 16th block lets one pass keep little more than is wanted; where it is
    // too high, all is read again without one.
    constexpr size_t sampled = 16;
    const float none = -std::numeric_limits<float>::infinity();
    const size_t rank = wanted / sampled + wanted / (4 * sampled) + 4;
    sketch_pass(none, sampled, rank + 1, allowed, s);
    float threshold = s.hits.size() > rank ? best_hits(rank, s.hits) : none;
    sketch_pass(threshold, 1, wanted, allowed, s);
    if (threshold != none && s.hits.size() < wanted / 2 + k)
      sketch_pass(none, 1, wanted, allowed, s);
    if (s.hits.size() > wanted) best_hits(wanted, s.hits);
    const float scale = quantise(query, s);
    s.pool.clear();
    constexpr size_t ahead = 12;
    for (size_t i = 0; i < s.hits.size(); i++) {
      if (i + ahead < s.hits.size()) prefetch_code(s.hits[i + ahead].row);
      s.pool.push_back(
          Candidate{code_dot(code(s.hits[i].row), s.query.data(), stride), s.hits[i].row});
    }
    // Every node has an allowed row, so the best k nodes are enough.
    settle(query, k, bounded(query, scale, s), [](uint32_t node) { return node; }, s);
    expand(k, allowed, s);
  }

  // Bounds where the quantiser is known; without it nothing is ruled out.
  CodedQuery bounded(const float* query, float scale, const Scratch& s) const {
    if (quantiser.held) return bounds(query, scale, s);
    return CodedQuery{0.0, 1.0, std::numeric_limits<double>::infinity()};
  }

  // Scores the allowed ones of the pool's first `most` nodes in float32; the hits are rows, best
  // first.
  void refine(const float* query, size_t k, size_t most, AllowedRows allowed, Scratch& s) const {
    if (s.pool.size() > most) s.pool.resize(most);
    if (!allowed.all()) {
      auto refused = [&](const Candidate& c) { return !any_allowed(c.node, allowed); };
      s.pool.erase(std::remove_if(s.pool.begin(), s.pool.end(), refused), s.pool.end());
    }
    score_nodes(query, most, s);
    finish(k, s.hits);  // every node left has an allowed row, so the best k nodes are enough
    expand(k, allowed, s);
  }

  // Turns the hits from nodes to their allowed rows, the best k.
  void expand(size_t k, AllowedRows allowed, Scratch& s) const {
    if (!starts.held) return;
    s.best.swap(s.hits);
    s.hits.clear();
    for (const Hit& hit : s.best) __builtin_prefetch(starts.as<uint32_t>() + hit.row);
    for (const Hit& hit : s.best) add_rows(hit.row, hit.score, allowed, s.hits);
    finish(k, s.hits);
  }

  // Scores the pool's first `most` nodes in float32, in its order; `row` of a hit holds the node.
  void score_nodes(const float* query, size_t most, Scratch& s) const {
    const size_t keep = std::min(s.pool.size(), most);
    for (size_t i = 0; i < keep; i++)
      for (size_t j = 0; j < dimension; j += 16) __builtin_prefetch(vector(s.pool[i].node) + j);
    s.hits.clear();
    for (size_t i = 0; i < keep; i++)
      s.hits.push_back(Hit{float_dot(vector(s.pool[i].node), query, dimension), s.pool[i].node});
  }

  // Adds the allowed rows of a node.
  void add_rows(uint32_t node, float score, AllowedRows allowed, std::vector<Hit>& hits) const {
    if (!starts.held) {
      if (allowed.holds(node)) hits.push_back(Hit{score, node});
      return;
    }
    const uint32_t* first = starts.as<uint32_t>();
    for (uint32_t i = first[node]; i < first[node + 1]; i++) {
      uint32_t row = rows.as<uint32_t>()[i];
      if (allowed.holds(row)) hits.push_back(Hit{score, row});
    }
  }

  // Keeps the best k hits, best first.
  static void finish(size_t k, std::vector<Hit>& hits) {
    if (hits.size() > k) {
      std::nth_element(hits.begin(), hits.begin() + long(k), hits.end(), better);
      hits.resize(k);
    }
    std::sort(hits.begin(), hits.end(), better);
  }

  // Finds the best k of the chosen rows: by 8-bit codes, then in float32 all that these leave
  // possible; all in float32 where rows are few or nothing bounds the codes. Returns how many rows
  // were scored in float32.
  size_t scan(const float* query, size_t k, ChosenRows chosen, const uint8_t* hidden,
              Scratch& s) const {
    const size_t count = chosen.count;
    auto node = [&](uint32_t row) { return node_of(row); };
    s.pool.clear();
    if (!codes.held || !quantiser.held || count <= 2 * std::max(4 * k, k + 32)) {
      s.hits.clear();
      for (size_t i = 0; i < count; i++) {
        const uint32_t row = chosen.first[i];
        if (hidden != nullptr && hidden[row]) continue;
        s.hits.push_back(Hit{float_dot(vector(node_of(row)), query, dimension), row});
      }
      finish(k, s.hits);
      return count;
    }
    const float scale = quantise(query, s);
    const int8_t* q = s.query.data();
    s.pool.reserve(count);
    constexpr size_t ahead = 12;
    for (size_t i = 0; i < count; i++) {
      if (i + ahead < count) prefetch_code(node_of(chosen.first[i + ahead]));
      const uint32_t row = chosen.first[i];
      if (hidden != nullptr && hidden[row]) continue;
      s.pool.push_back(Candidate{code_dot(code(node_of(row)), q, stride), row});
    }
    const size_t visible = s.pool.size();
    const size_t scored = settle(query, k, bounds(query, scale, s), node, s);
    return scored == visible ? count : scored;
  }

  PyObject* id_of(uint32_t row) const {
    const uint64_t* at = offsets.as<uint64_t>();
    return PyUnicode_DecodeUTF8(blob.as<char>() + at[row], Py_ssize_t(at[row + 1] - at[row]),
                                nullptr);
  }

  // Makes ids of the scratch's hits. The hits are moved out meanwhile: making a list may collect
  // garbage, and a finaliser may search.
  PyObject* answer(Scratch& s, float* scores) const {
    std::vector<Hit> hits;
    hits.swap(s.hits);
    PyObject* ids = answer(hits, scores);
    hits.swap(s.hits);
    return ids;
  }

  PyObject* answer(const std::vector<Hit>& hits, float* scores) const {
    PyObject* list = PyList_New(Py_ssize_t(hits.size()));
    if (list == nullptr) return nullptr;
    for (const Hit& hit : hits) __builtin_prefetch(offsets.as<uint64_t>() + hit.row);
    for (const Hit& hit : hits)
      __builtin_prefetch(blob.as<char>() + offsets.as<uint64_t>()[hit.row]);
    for (size_t i = 0; i < hits.size(); i++) {
      PyObject* id = id_of(hits[i].row);
      if (id == nullptr) {
        Py_DECREF(list);
        return nullptr;
      }
      PyList_SET_ITEM(list, Py_ssize_t(i), id);
      scores[i] = std::min(1.0f, std::max(-1.0f, hits[i].score));
    }
    return list;
  }
};

}  // namespace
