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

// Buffers of one running search; searches that take turns have one each.
struct Scratch {
  std::vector<uint16_t> seen;
  uint16_t epoch = 0;
  std::vector<int8_t> query;
  std::vector<Candidate> pool;
  std::vector<uint32_t> fresh;
  SketchTable table;
  std::vector<Hit> hits, best;
  // A walk between two steps: its candidates are the first `size` of the pool, those before `at`
  // are followed, and `found` fresh nodes wait to be offered.
  size_t ef = 0, size = 0, at = 0, found = 0;
  void begin(size_t nodes) {
    if (seen.size() < nodes) {
      seen.assign(nodes, 0);
      epoch = 0;
    }
    if (++epoch == 0) {
      std::fill(seen.begin(), seen.end(), uint16_t(0));
      epoch = 1;
    }
  }
};
thread_local Scratch scratch;

// Walks of a batch that take turns: one waits for memory while the others compute.
constexpr size_t turns = 4;
thread_local Scratch turn_scratch[turns];

struct Core {
  Array vectors, codes, graph, links, sketch, factors, nodes, starts, rows, blob, offsets;
  size_t node_count = 0, row_count = 0, dimension = 0, stride = 0, degree = 0;
  LinkLayout layout;
  uint32_t entry = 0;

  const float* vector(uint32_t node) const {
    return vectors.as<float>() + size_t(node) * dimension;
  }
  const uint8_t* code(uint32_t node) const { return codes.as<uint8_t>() + size_t(node) * stride; }
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

  // Factor from a component of the query to a signed byte.
  float query_scale(const float* query) const {
    float largest = 1e-12f;
    for (size_t i = 0; i < dimension; i++) largest = std::max(largest, std::fabs(query[i]));
    return 127.0f / largest;
  }

  // Quantises the query to signed bytes. The codes' offset of 128 adds the same amount to every
  // inner product, so their order is that of the vectors.
  void quantise(const float* query, std::vector<int8_t>& out) const {
    const float scale = query_scale(query);
    out.assign(stride, 0);
    for (size_t i = 0; i < dimension; i++)
      out[i] = int8_t(int32_t(query[i] * scale + std::copysign(0.5f, query[i])));
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
    quantise(query, s.query);
    if (links.held) s.table.fill(query, dimension, stride, query_scale(query));
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

  // Scores every row's sketch, then the 8-bit codes of the best `wanted` allowed nodes; afterwards
  // the pool holds the best of those, unordered.
  void sketch_scan(const float* query, size_t k, size_t wanted, AllowedRows allowed,
                   Scratch& s) const {
    s.table.fill(query, dimension, stride, 1.0f);
    // A threshold from every 16th block lets one pass keep little more than is wanted; where it is
    // too high, all is read again without one.
    constexpr size_t sampled = 16;
    const float none = -std::numeric_limits<float>::infinity();
    sketch_pass(none, sampled, node_count, allowed, s);
    const size_t rank = wanted / sampled + wanted / (4 * sampled) + 4;
    float threshold = s.hits.size() > rank ? best_hits(rank, s.hits) : none;
    sketch_pass(threshold, 1, wanted, allowed, s);
    if (threshold != none && s.hits.size() < wanted / 2 + k)
      sketch_pass(none, 1, wanted, allowed, s);
    if (s.hits.size() > wanted) best_hits(wanted, s.hits);
    quantise(query, s.query);
    s.pool.clear();
    constexpr size_t ahead = 12;
    for (size_t i = 0; i < s.hits.size(); i++) {
      if (i + ahead < s.hits.size()) prefetch_code(s.hits[i + ahead].row);
      s.pool.push_back(
          Candidate{code_dot(code(s.hits[i].row), s.query.data(), stride), s.hits[i].row});
    }
    const size_t keep = std::max(4 * k, k + 32);
    if (s.pool.size() > keep) {
      std::nth_element(s.pool.begin(), s.pool.begin() + long(keep), s.pool.end(),
                       [](const Candidate& a, const Candidate& b) { return a.score > b.score; });
      s.pool.resize(keep);
    }
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

  // Scores the chosen rows: by 8-bit codes first where they are many, then the best in float32.
  void scan(const float* query, size_t k, ChosenRows chosen, const uint8_t* hidden,
            Scratch& s) const {
    const size_t count = chosen.count;
    s.hits.clear();
    size_t keep = std::max(4 * k, k + 32);
    if (!codes.held || count <= 2 * keep) {
      for (size_t i = 0; i < count; i++) {
        uint32_t row = chosen.first[i];
        if (hidden != nullptr && hidden[row]) continue;
        s.hits.push_back(Hit{float_dot(vector(node_of(row)), query, dimension), row});
      }
      finish(k, s.hits);
      return;
    }
    quantise(query, s.query);
    const int8_t* q = s.query.data();
    auto worse = [](const Candidate& a, const Candidate& b) {
      return a.score > b.score || (a.score == b.score && a.node < b.node);
    };
    // A heap with the worst kept candidate on top; `node` holds a row here.
    std::vector<Candidate>& heap = s.pool;
    heap.clear();
    constexpr size_t ahead = 12;
    for (size_t i = 0; i < count; i++) {
      if (i + ahead < count) prefetch_code(node_of(chosen.first[i + ahead]));
      uint32_t row = chosen.first[i];
      if (hidden != nullptr && hidden[row]) continue;
      int32_t score = code_dot(code(node_of(row)), q, stride);
      if (heap.size() < keep) {
        heap.push_back(Candidate{score, row});
        std::push_heap(heap.begin(), heap.end(), worse);
      } else if (score > heap.front().score) {
        std::pop_heap(heap.begin(), heap.end(), worse);
        heap.back() = Candidate{score, row};
        std::push_heap(heap.begin(), heap.end(), worse);
      }
    }
    for (const Candidate& c : heap)
      for (size_t j = 0; j < dimension; j += 16) __builtin_prefetch(vector(node_of(c.node)) + j);
    for (const Candidate& c : heap)
      s.hits.push_back(Hit{float_dot(vector(node_of(c.node)), query, dimension), c.node});
    finish(k, s.hits);
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
      scores[i] = hits[i].score;
    }
    return list;
  }
};

}  // namespace
