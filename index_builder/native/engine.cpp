// Searches that Python cannot make fast enough: 8-bit scans and graph walks that respect a filter, and mapping hits to ids.
//
// One Engine borrows (through the buffer protocol) the arrays of one entity type: float32 vectors, 8-bit codes, out-links, ids. It owns no data,
// writes none of it, and can be searched from many threads; searches release the interpreter lock.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#define OMNI_X86 1
#endif

namespace {

// ---- inner products, chosen once for this CPU ------------------------------------------------------------------------------------------

using CodeDot = int32_t (*)(const uint8_t*, const int8_t*, size_t);  // length is a multiple of 64
using FloatDot = float (*)(const float*, const float*, size_t);

int32_t code_dot_plain(const uint8_t* a, const int8_t* b, size_t n) {
  int32_t sum = 0;
  for (size_t i = 0; i < n; i++) sum += int32_t(a[i]) * int32_t(b[i]);
  return sum;
}

float float_dot_plain(const float* a, const float* b, size_t n) {
  float s[8] = {0};
  size_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (size_t j = 0; j < 8; j++) s[j] += a[i + j] * b[i + j];
  float sum = 0;
  for (size_t j = 0; j < 8; j++) sum += s[j];
  for (; i < n; i++) sum += a[i] * b[i];
  return sum;
}

#ifdef OMNI_X86
__attribute__((target("avx512f,avx512bw,avx512vnni"))) int32_t code_dot_vnni(const uint8_t* a, const int8_t* b, size_t n) {
  __m512i s0 = _mm512_setzero_si512(), s1 = _mm512_setzero_si512();
  size_t i = 0;
  for (; i + 128 <= n; i += 128) {
    s0 = _mm512_dpbusd_epi32(s0, _mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i));
    s1 = _mm512_dpbusd_epi32(s1, _mm512_loadu_si512(a + i + 64), _mm512_loadu_si512(b + i + 64));
  }
  if (i < n) s0 = _mm512_dpbusd_epi32(s0, _mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(s0, s1));
}

__attribute__((target("avx2"))) int32_t code_dot_avx2(const uint8_t* a, const int8_t* b, size_t n) {
  __m256i sum = _mm256_setzero_si256();
  for (size_t i = 0; i < n; i += 16) {
    __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a + i)));
    __m256i y = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + i)));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, y));
  }
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
  int32_t total = 0;
  for (int32_t lane : lanes) total += lane;
  return total;
}

__attribute__((target("avx512f"))) float float_dot_avx512(const float* a, const float* b, size_t n) {
  __m512 s0 = _mm512_setzero_ps(), s1 = _mm512_setzero_ps();
  size_t i = 0;
  for (; i + 32 <= n; i += 32) {
    s0 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), s0);
    s1 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16), _mm512_loadu_ps(b + i + 16), s1);
  }
  float sum = _mm512_reduce_add_ps(_mm512_add_ps(s0, s1));
  for (; i < n; i++) sum += a[i] * b[i];
  return sum;
}

__attribute__((target("avx2,fma"))) float float_dot_avx2(const float* a, const float* b, size_t n) {
  __m256 sum8 = _mm256_setzero_ps();
  size_t i = 0;
  for (; i + 8 <= n; i += 8) sum8 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), sum8);
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, sum8);
  float sum = 0;
  for (float lane : lanes) sum += lane;
  for (; i < n; i++) sum += a[i] * b[i];
  return sum;
}
#endif

CodeDot code_dot = code_dot_plain;
FloatDot float_dot = float_dot_plain;
const char* simd_name = "plain";

void choose_kernels() {
#ifdef OMNI_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    code_dot = code_dot_avx2;
    float_dot = float_dot_avx2;
    simd_name = "avx2";
  }
  if (__builtin_cpu_supports("avx512f")) float_dot = float_dot_avx512;
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")) {
    code_dot = code_dot_vnni;
    simd_name = "avx512vnni";
  }
#endif
}

// ---- the engine ------------------------------------------------------------------------------------------------------------------------

struct Array {
  Py_buffer view{};
  bool held = false;
  template <class T>
  const T* as() const { return held ? static_cast<const T*>(view.buf) : nullptr; }
  size_t bytes() const { return held ? size_t(view.len) : 0; }
  bool take(PyObject* object, const char* what, bool writable = false) {
    if (object == nullptr || object == Py_None) return true;
    if (PyObject_GetBuffer(object, &view, writable ? (PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) : PyBUF_C_CONTIGUOUS) != 0) {
      PyErr_Format(PyExc_TypeError, "%s must be a C-contiguous array%s", what, writable ? " that can be written" : "");
      return false;
    }
    held = true;
    return true;
  }
  ~Array() {
    if (held) PyBuffer_Release(&view);
  }
};

struct Hit {
  float score;
  uint32_t row;
};
inline bool better(const Hit& a, const Hit& b) { return a.score > b.score || (a.score == b.score && a.row < b.row); }

struct Candidate {
  int32_t score;
  uint32_t node;
  bool expanded;
};

struct Scratch {
  std::vector<uint16_t> seen;
  uint16_t epoch = 0;
  std::vector<int8_t> query;
  std::vector<Candidate> pool;
  std::vector<uint32_t> fresh, blocked;
  std::vector<Hit> hits;
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

struct Core {
  Array vectors, codes, graph, nodes, starts, rows, blob, offsets;
  size_t node_count = 0, row_count = 0, dimension = 0, stride = 0, degree = 0;
  uint32_t entry = 0;

  const float* vector(uint32_t node) const { return vectors.as<float>() + size_t(node) * dimension; }
  const uint8_t* code(uint32_t node) const { return codes.as<uint8_t>() + size_t(node) * stride; }
  uint32_t node_of(uint32_t row) const { return nodes.held ? nodes.as<uint32_t>()[row] : row; }

  // Whether any row of the node may be answered.
  bool allowed(uint32_t node, const uint8_t* mask, const uint8_t* hidden) const {
    if (!starts.held) return (mask == nullptr || mask[node]) && (hidden == nullptr || !hidden[node]);
    const uint32_t* first = starts.as<uint32_t>();
    for (uint32_t i = first[node]; i < first[node + 1]; i++) {
      uint32_t row = rows.as<uint32_t>()[i];
      if ((mask == nullptr || mask[row]) && (hidden == nullptr || !hidden[row])) return true;
    }
    return false;
  }

  void prefetch_code(uint32_t node) const {
    const uint8_t* at = code(node);
    for (size_t i = 0; i < stride; i += 64) __builtin_prefetch(at + i);
  }

  // The query as signed bytes; the codes' offset of 128 adds the same amount to every inner product, so order is kept.
  void quantise(const float* query, std::vector<int8_t>& out) const {
    float largest = 1e-12f;
    for (size_t i = 0; i < dimension; i++) largest = std::max(largest, std::fabs(query[i]));
    float scale = 127.0f / largest;
    out.assign(stride, 0);
    for (size_t i = 0; i < dimension; i++) out[i] = int8_t(std::lrintf(query[i] * scale));
  }

  // Best-first walk; pool is sorted best first. With a mask only allowed nodes are scored and kept, and blocked neighbours are looked through.
  void walk(const float* query, size_t ef, const uint8_t* mask, const uint8_t* hidden, const uint32_t* seeds, size_t seed_count, Scratch& s) const {
    s.begin(node_count);
    quantise(query, s.query);
    s.pool.clear();
    s.pool.reserve(ef + 1);
    const bool filtered = mask != nullptr;
    const uint32_t* links = graph.as<uint32_t>();
    const int8_t* q = s.query.data();
    size_t lowest = 0;
    auto offer = [&](uint32_t node) {
      int32_t score = code_dot(code(node), q, stride);
      if (s.pool.size() == ef) {
        if (score <= s.pool.back().score) return;
        s.pool.pop_back();
      }
      auto at = std::upper_bound(s.pool.begin(), s.pool.end(), score, [](int32_t value, const Candidate& c) { return value > c.score; });
      size_t position = size_t(at - s.pool.begin());
      s.pool.insert(at, Candidate{score, node, false});
      lowest = std::min(lowest, position);
    };
    for (size_t i = 0; i < seed_count; i++) prefetch_code(seeds[i]);
    for (size_t i = 0; i < seed_count; i++) {
      if (s.seen[seeds[i]] == s.epoch) continue;
      s.seen[seeds[i]] = s.epoch;
      if (!filtered || allowed(seeds[i], mask, hidden)) offer(seeds[i]);
    }
    size_t at = 0;
    while (at < s.pool.size()) {
      if (s.pool[at].expanded) {
        at++;
        continue;
      }
      s.pool[at].expanded = true;
      const uint32_t* out = links + size_t(s.pool[at].node) * degree;
      s.fresh.clear();
      s.blocked.clear();
      if (!filtered) {
        for (size_t i = 0; i < degree; i++) {
          uint32_t node = out[i];
          if (s.seen[node] == s.epoch) continue;
          s.seen[node] = s.epoch;
          prefetch_code(node);
          s.fresh.push_back(node);
        }
      } else {
        // Enough allowed neighbours, visited or not, make a connected graph of their own; where there are fewer, look through the blocked ones.
        size_t direct = 0;
        for (size_t i = 0; i < degree; i++) {
          uint32_t node = out[i];
          if (allowed(node, mask, hidden)) {
            direct++;
            if (s.seen[node] == s.epoch) continue;
            s.seen[node] = s.epoch;
            prefetch_code(node);
            s.fresh.push_back(node);
          } else if (s.seen[node] != s.epoch) {
            s.blocked.push_back(node);
          }
        }
        const size_t enough = degree / 2;
        if (direct < enough) {
          const size_t most = s.fresh.size() + enough - direct;
          for (uint32_t through : s.blocked) {
            const uint32_t* next = links + size_t(through) * degree;
            __builtin_prefetch(next);
            __builtin_prefetch(next + 16);
          }
          for (uint32_t through : s.blocked) {
            if (s.fresh.size() >= most) break;
            s.seen[through] = s.epoch;
            const uint32_t* next = links + size_t(through) * degree;
            for (size_t i = 0; i < degree; i++) {
              uint32_t node = next[i];
              if (s.seen[node] == s.epoch || !allowed(node, mask, hidden)) continue;
              s.seen[node] = s.epoch;
              prefetch_code(node);
              s.fresh.push_back(node);
            }
          }
        }
      }
      lowest = at + 1;
      for (uint32_t node : s.fresh) offer(node);
      at = std::min(at + 1, lowest);
    }
  }

  // The pool's best nodes scored in float32, as rows that may be answered, best first.
  void refine(const float* query, size_t k, const uint8_t* mask, const uint8_t* hidden, Scratch& s) const {
    size_t keep = std::min(s.pool.size(), std::max(2 * k, k + 16));
    for (size_t i = 0; i < keep; i++)
      for (size_t j = 0; j < dimension; j += 16) __builtin_prefetch(vector(s.pool[i].node) + j);
    s.hits.clear();
    for (size_t i = 0; i < s.pool.size() && (i < keep || s.hits.size() < k); i++)
      add_rows(s.pool[i].node, float_dot(vector(s.pool[i].node), query, dimension), mask, hidden, s.hits);
    finish(k, s.hits);
  }

  void add_rows(uint32_t node, float score, const uint8_t* mask, const uint8_t* hidden, std::vector<Hit>& hits) const {
    if (!starts.held) {
      if ((mask == nullptr || mask[node]) && (hidden == nullptr || !hidden[node])) hits.push_back(Hit{score, node});
      return;
    }
    const uint32_t* first = starts.as<uint32_t>();
    for (uint32_t i = first[node]; i < first[node + 1]; i++) {
      uint32_t row = rows.as<uint32_t>()[i];
      if ((mask == nullptr || mask[row]) && (hidden == nullptr || !hidden[row])) hits.push_back(Hit{score, row});
    }
  }

  static void finish(size_t k, std::vector<Hit>& hits) {
    if (hits.size() > k) {
      std::nth_element(hits.begin(), hits.begin() + long(k), hits.end(), better);
      hits.resize(k);
    }
    std::sort(hits.begin(), hits.end(), better);
  }

  // Score the given rows: 8-bit codes first where they are many, then the best in float32.
  void scan(const float* query, size_t k, const uint32_t* chosen, size_t count, const uint8_t* hidden, Scratch& s) const {
    s.hits.clear();
    size_t keep = std::max(4 * k, k + 32);
    if (!codes.held || count <= 2 * keep) {
      for (size_t i = 0; i < count; i++) {
        uint32_t row = chosen[i];
        if (hidden != nullptr && hidden[row]) continue;
        s.hits.push_back(Hit{float_dot(vector(node_of(row)), query, dimension), row});
      }
      finish(k, s.hits);
      return;
    }
    quantise(query, s.query);
    const int8_t* q = s.query.data();
    auto worse = [](const Candidate& a, const Candidate& b) { return a.score > b.score || (a.score == b.score && a.node < b.node); };
    std::vector<Candidate>& heap = s.pool;  // a heap with the worst kept candidate on top; `node` holds a row here
    heap.clear();
    constexpr size_t ahead = 12;
    for (size_t i = 0; i < count; i++) {
      if (i + ahead < count) prefetch_code(node_of(chosen[i + ahead]));
      uint32_t row = chosen[i];
      if (hidden != nullptr && hidden[row]) continue;
      int32_t score = code_dot(code(node_of(row)), q, stride);
      if (heap.size() < keep) {
        heap.push_back(Candidate{score, row, false});
        std::push_heap(heap.begin(), heap.end(), worse);
      } else if (score > heap.front().score) {
        std::pop_heap(heap.begin(), heap.end(), worse);
        heap.back() = Candidate{score, row, false};
        std::push_heap(heap.begin(), heap.end(), worse);
      }
    }
    for (const Candidate& c : heap)
      for (size_t j = 0; j < dimension; j += 16) __builtin_prefetch(vector(node_of(c.node)) + j);
    for (const Candidate& c : heap) s.hits.push_back(Hit{float_dot(vector(node_of(c.node)), query, dimension), c.node});
    finish(k, s.hits);
  }

  PyObject* id_of(uint32_t row) const {
    const uint64_t* at = offsets.as<uint64_t>();
    return PyUnicode_DecodeUTF8(blob.as<char>() + at[row], Py_ssize_t(at[row + 1] - at[row]), nullptr);
  }

  PyObject* answer(const std::vector<Hit>& hits, float* scores) const {
    PyObject* list = PyList_New(Py_ssize_t(hits.size()));
    if (list == nullptr) return nullptr;
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

struct EngineObject {
  PyObject_HEAD
  Core* core;
};

void engine_dealloc(PyObject* self) {
  delete reinterpret_cast<EngineObject*>(self)->core;
  Py_TYPE(self)->tp_free(self);
}

PyObject* engine_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"vectors", "dimension", "blob", "offsets", "codes", "graph", "entry", "node_of_row", "row_starts", "rows_by_node", nullptr};
  PyObject *vectors, *blob, *offsets, *codes = Py_None, *graph = Py_None, *nodes = Py_None, *starts = Py_None, *rows = Py_None;
  Py_ssize_t dimension;
  unsigned int entry = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OnOO|OOIOOO", const_cast<char**>(names), &vectors, &dimension, &blob, &offsets, &codes, &graph, &entry,
                                   &nodes, &starts, &rows))
    return nullptr;
  auto* self = reinterpret_cast<EngineObject*>(type->tp_alloc(type, 0));
  if (self == nullptr) return nullptr;
  Core* core = self->core = new Core();
  auto refuse = [&](const char* message) {
    if (message != nullptr) PyErr_SetString(PyExc_ValueError, message);
    Py_DECREF(self);
    return static_cast<PyObject*>(nullptr);
  };
  if (!core->vectors.take(vectors, "vectors") || !core->blob.take(blob, "blob") || !core->offsets.take(offsets, "offsets") ||
      !core->codes.take(codes, "codes") || !core->graph.take(graph, "graph") || !core->nodes.take(nodes, "node_of_row") ||
      !core->starts.take(starts, "row_starts") || !core->rows.take(rows, "rows_by_node"))
    return refuse(nullptr);
  if (dimension < 1 || core->vectors.bytes() % (size_t(dimension) * 4)) return refuse("vectors do not have that dimension");
  core->dimension = size_t(dimension);
  core->node_count = core->vectors.bytes() / (core->dimension * 4);
  core->row_count = core->nodes.held ? core->nodes.bytes() / 4 : core->node_count;
  core->stride = (core->dimension + 63) / 64 * 64;
  core->entry = entry;
  if (core->offsets.bytes() != (core->row_count + 1) * 8) return refuse("offsets do not fit the rows");
  if (core->offsets.as<uint64_t>()[core->row_count] > core->blob.bytes()) return refuse("offsets point past the ids");
  for (size_t i = 0; i < core->row_count; i++)
    if (core->offsets.as<uint64_t>()[i] > core->offsets.as<uint64_t>()[i + 1]) return refuse("offsets of ids are not ascending");
  if (core->nodes.held && (core->starts.bytes() != (core->node_count + 1) * 4 || core->rows.bytes() != core->row_count * 4))
    return refuse("row_starts or rows_by_node do not fit");
  if (core->codes.held && core->codes.bytes() != core->node_count * core->stride) return refuse("codes do not fit the vectors");
  if (core->graph.held) {
    if (!core->codes.held || core->node_count == 0 || core->graph.bytes() % (core->node_count * 4)) return refuse("the graph does not fit the vectors");
    core->degree = core->graph.bytes() / (core->node_count * 4);
    if (entry >= core->node_count) return refuse("the entry is not a node");
    const uint32_t* links = core->graph.as<uint32_t>();
    for (size_t i = 0; i < core->node_count * core->degree; i++)
      if (links[i] >= core->node_count) return refuse("a link points past the nodes");
  }
  return reinterpret_cast<PyObject*>(self);
}

// Arguments of a search, checked: a query of the right length and room for k scores.
struct Request {
  Array query, out, mask, hidden, list, distances;
  size_t k = 0;
};

bool positive(PyObject* object, size_t& value) {
  Py_ssize_t number = PyLong_AsSsize_t(object);
  if (number < 1) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "expected a positive number");
    return false;
  }
  value = size_t(number);
  return true;
}

bool masks(const Core& core, Request& r, PyObject* mask, PyObject* hidden) {
  if (!r.mask.take(mask, "mask") || !r.hidden.take(hidden, "hidden")) return false;
  if ((r.mask.held && r.mask.bytes() != core.row_count) || (r.hidden.held && r.hidden.bytes() != core.row_count)) {
    PyErr_SetString(PyExc_ValueError, "a mask must have one byte per row");
    return false;
  }
  return true;
}

bool request(const Core& core, Request& r, PyObject* query, PyObject* k, PyObject* out) {
  if (!r.query.take(query, "query") || !r.out.take(out, "out", true) || !positive(k, r.k)) return false;
  if (r.query.bytes() != core.dimension * 4 || r.out.bytes() < r.k * 4) {
    PyErr_SetString(PyExc_ValueError, "the query or the room for scores has the wrong size");
    return false;
  }
  return true;
}

// finish(nodes, distances, k, out, mask, hidden) -> ids: maps a graph's answer to ids, dropping rows that may not be answered.
PyObject* engine_finish(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const Core& core = *reinterpret_cast<EngineObject*>(self)->core;
  Request r;
  if (count != 6) return PyErr_SetString(PyExc_TypeError, "finish takes 6 arguments"), nullptr;
  if (!r.list.take(args[0], "nodes") || !r.distances.take(args[1], "distances") || !positive(args[2], r.k) || !r.out.take(args[3], "out", true) ||
      !masks(core, r, args[4], args[5]))
    return nullptr;
  size_t n = r.distances.bytes() / 4;
  size_t width = n ? r.list.bytes() / n : 4;
  if (r.out.bytes() < r.k * 4 || r.list.bytes() != n * width || (width != 4 && width != 8))
    return PyErr_SetString(PyExc_ValueError, "nodes, distances or out have the wrong size"), nullptr;
  std::vector<Hit>& hits = scratch.hits;
  hits.clear();
  for (size_t i = 0; i < n && hits.size() < r.k; i++) {
    uint64_t node = width == 4 ? r.list.as<uint32_t>()[i] : r.list.as<uint64_t>()[i];
    if (node >= core.node_count) return PyErr_SetString(PyExc_ValueError, "a node is out of range"), nullptr;
    core.add_rows(uint32_t(node), 1.0f - 0.5f * r.distances.as<float>()[i], r.mask.as<uint8_t>(), r.hidden.as<uint8_t>(), hits);
  }
  if (hits.size() > r.k) hits.resize(r.k);
  return core.answer(hits, static_cast<float*>(r.out.view.buf));
}

// scan(query, k, rows, out, hidden) -> ids: the best of the given rows.
PyObject* engine_scan(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const Core& core = *reinterpret_cast<EngineObject*>(self)->core;
  Request r;
  if (count != 5) return PyErr_SetString(PyExc_TypeError, "scan takes 5 arguments"), nullptr;
  if (!request(core, r, args[0], args[1], args[3]) || !r.list.take(args[2], "rows") || !masks(core, r, nullptr, args[4])) return nullptr;
  const uint32_t* chosen = r.list.as<uint32_t>();
  size_t n = r.list.bytes() / 4;
  bool in_range = true;
  Scratch& s = scratch;
  Py_BEGIN_ALLOW_THREADS
  uint32_t largest = 0;
  for (size_t i = 0; i < n; i++) largest = std::max(largest, chosen[i]);
  in_range = n == 0 || largest < core.row_count;
  if (in_range) core.scan(r.query.as<float>(), r.k, chosen, n, r.hidden.as<uint8_t>(), s);
  Py_END_ALLOW_THREADS
  if (!in_range) return PyErr_SetString(PyExc_ValueError, "a row is out of range"), nullptr;
  return core.answer(s.hits, static_cast<float*>(r.out.view.buf));
}

// walk(query, k, ef, seeds, out, mask, hidden) -> ids: the graph walk; with a mask only allowed nodes are scored.
PyObject* engine_walk(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const Core& core = *reinterpret_cast<EngineObject*>(self)->core;
  Request r;
  size_t ef = 0;
  if (count != 7) return PyErr_SetString(PyExc_TypeError, "walk takes 7 arguments"), nullptr;
  if (!core.graph.held) return PyErr_SetString(PyExc_ValueError, "this engine has no graph"), nullptr;
  if (!request(core, r, args[0], args[1], args[4]) || !positive(args[2], ef) || !r.list.take(args[3], "seeds") || !masks(core, r, args[5], args[6]))
    return nullptr;
  const uint32_t* seeds = r.list.held ? r.list.as<uint32_t>() : &core.entry;
  size_t n = r.list.held ? r.list.bytes() / 4 : 1;
  for (size_t i = 0; i < n; i++)
    if (seeds[i] >= core.node_count) return PyErr_SetString(PyExc_ValueError, "a seed is out of range"), nullptr;
  Scratch& s = scratch;
  Py_BEGIN_ALLOW_THREADS
  core.walk(r.query.as<float>(), std::max(ef, r.k), r.mask.as<uint8_t>(), r.hidden.as<uint8_t>(), seeds, n, s);
  core.refine(r.query.as<float>(), r.k, r.mask.as<uint8_t>(), r.hidden.as<uint8_t>(), s);
  Py_END_ALLOW_THREADS
  return core.answer(s.hits, static_cast<float*>(r.out.view.buf));
}

// nearest(query, k, ef, out_nodes, out_distances) -> count: the unfiltered walk in nodes, for use as an AnnIndex.
PyObject* engine_nearest(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const Core& core = *reinterpret_cast<EngineObject*>(self)->core;
  Request r;
  size_t ef = 0;
  if (count != 5) return PyErr_SetString(PyExc_TypeError, "nearest takes 5 arguments"), nullptr;
  if (!core.graph.held) return PyErr_SetString(PyExc_ValueError, "this engine has no graph"), nullptr;
  if (!request(core, r, args[0], args[1], args[4]) || !positive(args[2], ef) || !r.list.take(args[3], "out_nodes", true)) return nullptr;
  if (r.list.bytes() < r.k * 4) return PyErr_SetString(PyExc_ValueError, "no room for the nodes"), nullptr;
  Scratch& s = scratch;
  Py_BEGIN_ALLOW_THREADS
  core.walk(r.query.as<float>(), std::max(ef, r.k), nullptr, nullptr, &core.entry, 1, s);
  size_t keep = std::min(s.pool.size(), std::max(2 * r.k, r.k + 16));
  for (size_t i = 0; i < keep; i++)
    for (size_t j = 0; j < core.dimension; j += 16) __builtin_prefetch(core.vector(s.pool[i].node) + j);
  s.hits.clear();
  for (size_t i = 0; i < keep; i++) s.hits.push_back(Hit{float_dot(core.vector(s.pool[i].node), r.query.as<float>(), core.dimension), s.pool[i].node});
  Core::finish(r.k, s.hits);
  Py_END_ALLOW_THREADS
  for (size_t i = 0; i < s.hits.size(); i++) {
    static_cast<uint32_t*>(r.list.view.buf)[i] = s.hits[i].row;
    static_cast<float*>(r.out.view.buf)[i] = 2.0f - 2.0f * s.hits[i].score;
  }
  return PyLong_FromSize_t(s.hits.size());
}

PyMethodDef engine_methods[] = {
    {"finish", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(engine_finish)), METH_FASTCALL, "finish(nodes, distances, k, out, mask, hidden) -> ids"},
    {"scan", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(engine_scan)), METH_FASTCALL, "scan(query, k, rows, out, hidden) -> ids"},
    {"walk", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(engine_walk)), METH_FASTCALL, "walk(query, k, ef, seeds, out, mask, hidden) -> ids"},
    {"nearest", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(engine_nearest)), METH_FASTCALL, "nearest(query, k, ef, out_nodes, out_distances) -> count"},
    {nullptr, nullptr, 0, nullptr}};

PyTypeObject engine_type{};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_engine", "8-bit scans, filter-aware graph walks and id mapping.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__engine() {
  choose_kernels();
  Py_SET_REFCNT(reinterpret_cast<PyObject*>(&engine_type), 1);
  engine_type.tp_name = "index_builder.native._engine.Engine";
  engine_type.tp_basicsize = sizeof(EngineObject);
  engine_type.tp_flags = Py_TPFLAGS_DEFAULT;
  engine_type.tp_doc = "Engine(vectors, dimension, blob, offsets, codes, graph, entry, node_of_row, row_starts, rows_by_node)";
  engine_type.tp_new = engine_new;
  engine_type.tp_dealloc = engine_dealloc;
  engine_type.tp_methods = engine_methods;
  if (PyType_Ready(&engine_type) < 0) return nullptr;
  PyObject* result = PyModule_Create(&module);
  if (result == nullptr) return nullptr;
  Py_INCREF(&engine_type);
  PyModule_AddObject(result, "Engine", reinterpret_cast<PyObject*>(&engine_type));
  PyModule_AddStringConstant(result, "simd", simd_name);
  return result;
}
