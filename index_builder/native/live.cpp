// Scans live entries by one bit a dimension, in a few microseconds a search.
//
// Vectors are rotated at random and kept as the signs of their components (the estimator of RaBitQ,
// Gao and Long, SIGMOD 2024): the inner product with a query follows from counting bits, with an
// error whose size is known for each row. Rows that could enter the answer are scored again in
// float32, so that scores are exact. Rows stand in blocks of 8: word w of the 8 rows lies together.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "shared.h"

namespace {

constexpr size_t kBlock = 8;   // rows whose words lie together
constexpr size_t kPlanes = 3;  // bits of a query's component
// Standard errors added to an estimate: the last row of an answer is missed with probability 0.006,
// better rows less often.
constexpr float kDeviations = 2.5;

// ---- the rotation

size_t padded(size_t dimension) {
  size_t size = 64;
  while (size < dimension) size *= 2;
  return size;
}

// splitmix64: the same signs in every process.
float sign_of(size_t round, size_t i) {
  uint64_t z = (round << 32 | i) * 0x9E3779B97F4A7C15ull + 0x632BE59BD9B4E019ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return ((z ^ (z >> 31)) & 1) ? 1.0f : -1.0f;
}

struct Rotation {
  size_t size = 0;
  std::vector<float> signs;  // two rounds, the scale of the transform included
  void prepare(size_t wanted) {
    if (size == wanted) return;
    size = wanted;
    signs.resize(2 * size);
    for (size_t i = 0; i < 2 * size; i++)
      signs[i] = sign_of(i / size, i % size) / std::sqrt(float(size));
  }
  // Applies random signs and a Hadamard transform, twice: norms and inner products stay, and
  // components become alike in size.
  void apply(const float* in, size_t dimension, std::vector<float>& out) const {
    out.assign(size, 0.0f);
    std::copy(in, in + dimension, out.begin());
    float* x = out.data();
    for (size_t round = 0; round < 2; round++) {
      const float* flip = signs.data() + round * size;
      for (size_t i = 0; i < size; i += 4) flip_and_mix_four(x + i, flip + i);
      for (size_t half = 4; half < size; half *= 2)
        for (size_t i = 0; i < size; i += 2 * half)
          for (size_t j = i; j < i + half; j++) {
            float a = x[j], b = x[j + half];
            x[j] = a + b;
            x[j + half] = a - b;
          }
    }
  }
  // Applies the signs and the two narrowest levels of the transform.
  static void flip_and_mix_four(float* x, const float* flip) {
    const float a = x[0] * flip[0], b = x[1] * flip[1], c = x[2] * flip[2], d = x[3] * flip[3];
    const float ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
    x[0] = ab + cd;
    x[1] = a_b + c_d;
    x[2] = ab - cd;
    x[3] = a_b - c_d;
  }
};

// ---- estimates

// Values of a row beside its signs; each array has one value a row.
struct Facts {
  float* set_bits;  // how many bits are set
  float* factor;    // 1 / sum of the absolute components
  float* margin;    // kDeviations standard errors of the estimate
};

// A rotated query in kPlanes bits a component: value = lowest + step * level.
struct Levels {
  const uint64_t* planes;  // words x kPlanes
  size_t words;
  float step, lowest, total;  // total: sum of the components
};

// Encoded rows in blocks of 8, words x 8 a block.
struct Blocks {
  const uint64_t* bits;
  Facts facts;
  size_t count;
};

// Computes the highest inner product that each row may have, and for each block which of its 8 rows
// are above the floor. One call a scan, so that the sums of a block need not wait for the last
// ones.
using Estimate = void (*)(Blocks rows, const Levels& query, float floor, float* most,
                          uint8_t* above);

// Inlined into functions of several instruction sets.
__attribute__((always_inline)) inline void estimate_by_popcount(Blocks rows, const Levels& query,
                                                                float floor, float* most,
                                                                uint8_t* above) {
  const uint64_t* bits = rows.bits;
  const Facts facts = rows.facts;
  for (size_t block = 0; block < rows.count; block++, bits += query.words * kBlock) {
    uint32_t bit = 0;
    for (size_t lane = 0; lane < kBlock; lane++) {
      const size_t row = block * kBlock + lane;
      int32_t sum = 0;
      for (size_t w = 0; w < query.words; w++)
        for (size_t p = 0; p < kPlanes; p++)
          sum +=
              int32_t(__builtin_popcountll(bits[w * kBlock + lane] & query.planes[w * kPlanes + p]))
              << p;
      const float product =
          2 * query.step * float(sum) + 2 * query.lowest * facts.set_bits[row] - query.total;
      most[row] = facts.factor[row] * product + facts.margin[row];
      bit |= uint32_t(most[row] > floor) << lane;
    }
    above[block] = uint8_t(bit);
  }
}

void estimate_plain(Blocks rows, const Levels& query, float floor, float* most, uint8_t* above) {
  estimate_by_popcount(rows, query, floor, most, above);
}

#ifdef OMNI_X86
__attribute__((target("popcnt"))) void estimate_popcnt(Blocks rows, const Levels& query,
                                                       float floor, float* most, uint8_t* above) {
  estimate_by_popcount(rows, query, floor, most, above);
}

__attribute__((target("avx512f,avx512dq,avx512vl,avx512vpopcntdq,fma"))) void estimate_avx512(
    Blocks encoded, const Levels& query, float floor, float* most, uint8_t* above) {
  static_assert(kPlanes == 3 && kBlock == 8, "one sum a plane, one lane a row");
  const uint64_t* bits = encoded.bits;
  const Facts facts = encoded.facts;
  const size_t blocks = encoded.count;
  const size_t words = query.words;
  const uint64_t* planes = query.planes;
  const __m256 twice_lowest = _mm256_set1_ps(2 * query.lowest),
               twice_step = _mm256_set1_ps(2 * query.step), total = _mm256_set1_ps(query.total);
  const __m256 least = _mm256_set1_ps(floor);
  for (size_t block = 0; block < blocks; block++, bits += words * kBlock) {
    __m512i s0 = _mm512_setzero_si512(), s1 = s0, s2 = s0;
    for (size_t w = 0; w < words; w++) {
      const __m512i rows = _mm512_loadu_si512(bits + w * kBlock);
      const uint64_t* plane = planes + w * kPlanes;
      s0 = _mm512_add_epi64(
          s0, _mm512_popcnt_epi64(_mm512_and_si512(rows, _mm512_set1_epi64(int64_t(plane[0])))));
      s1 = _mm512_add_epi64(
          s1, _mm512_popcnt_epi64(_mm512_and_si512(rows, _mm512_set1_epi64(int64_t(plane[1])))));
      s2 = _mm512_add_epi64(
          s2, _mm512_popcnt_epi64(_mm512_and_si512(rows, _mm512_set1_epi64(int64_t(plane[2])))));
    }
    const size_t row = block * kBlock;
    const __m512i sums =
        _mm512_add_epi64(s0, _mm512_slli_epi64(_mm512_add_epi64(s1, _mm512_slli_epi64(s2, 1)), 1));
    const __m256 set = _mm256_fmsub_ps(twice_lowest, _mm256_loadu_ps(facts.set_bits + row), total);
    const __m256 product = _mm256_fmadd_ps(twice_step, _mm512_cvtepi64_ps(sums), set);
    const __m256 highest = _mm256_fmadd_ps(_mm256_loadu_ps(facts.factor + row), product,
                                           _mm256_loadu_ps(facts.margin + row));
    _mm256_storeu_ps(most + row, highest);
    above[block] = uint8_t(_mm256_cmp_ps_mask(highest, least, _CMP_GT_OQ));
  }
}
#endif

Estimate estimate = estimate_plain;

void choose_estimates() {
#ifdef OMNI_X86
  const Simd allowed = allowed_simd();
  if (allowed == Simd::plain) return;
  if (__builtin_cpu_supports("popcnt")) estimate = estimate_popcnt;
  if (allowed == Simd::avx2) return;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vpopcntdq") &&
      __builtin_cpu_supports("fma"))
    estimate = estimate_avx512;
#endif
}

// ---- encoded rows

// Arrays of one block of live entries, checked against each other.
struct Rows {
  Array vectors, bits, facts;
  size_t dimension = 0, words = 0, capacity = 0;
  Facts facts_at(size_t row) const {
    float* first = static_cast<float*>(facts.view.buf) + row;
    return Facts{first, first + capacity, first + 2 * capacity};
  }
  const float* vector(size_t row) const { return vectors.as<float>() + row * dimension; }
  uint64_t* word(size_t row, size_t w) const {
    return static_cast<uint64_t*>(bits.view.buf) + (row / kBlock * words + w) * kBlock +
           row % kBlock;
  }
  // Borrows vectors, bits and facts; on failure an error is set.
  bool take(PyObject* const* arrays, size_t width, size_t used, bool writable) {
    if (!vectors.take(arrays[0], "vectors") || !bits.take(arrays[1], "bits", writable) ||
        !facts.take(arrays[2], "facts", writable))
      return false;
    dimension = width;
    words = padded(dimension) / 64;
    capacity = facts.bytes() / 12;
    if (dimension == 0 || dimension > (size_t(1) << 20) || !bits.held || !facts.held ||
        facts.bytes() % (12 * kBlock) || bits.bytes() != capacity * words * 8 || used > capacity ||
        vectors.bytes() < used * dimension * 4) {
      PyErr_SetString(PyExc_ValueError, "vectors, bits and facts do not fit each other");
      return false;
    }
    return true;
  }
};

struct Found {
  float score;
  int64_t place;  // a live row, or -1 - the place in the base's answer
};
// Better first; among equals the base in its order, then live rows in theirs.
inline bool before(const Found& a, const Found& b) {
  if (a.score != b.score) return a.score > b.score;
  if ((a.place < 0) != (b.place < 0)) return a.place < 0;
  return a.place < 0 ? a.place > b.place : a.place < b.place;
}

struct Scratch {
  Rotation rotation;
  std::vector<float> rotated;
  std::vector<uint8_t> levels, above;
  std::vector<uint64_t> planes;
  std::vector<float> most;
  std::vector<Found> candidates, found;
};
thread_local Scratch scratch;

// encode(vectors, dimension, bits, facts, first, end): encodes rows first..end-1.
PyObject* live_encode(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6) return refuse(PyExc_TypeError, "encode takes 6 arguments");
  const Py_ssize_t dimension = PyLong_AsSsize_t(args[1]), first = PyLong_AsSsize_t(args[4]),
                   end = PyLong_AsSsize_t(args[5]);
  if (PyErr_Occurred()) return nullptr;
  if (dimension < 1 || first < 0 || end < first)
    return refuse(PyExc_ValueError, "dimension, first or end is out of range");
  PyObject* const arrays[] = {args[0], args[2], args[3]};
  Rows rows;
  if (!rows.take(arrays, size_t(dimension), size_t(end), true)) return nullptr;
  Scratch& s = scratch;
  const size_t size = rows.words * 64;
  s.rotation.prepare(size);
  for (size_t row = size_t(first); row < size_t(end); row++) {
    s.rotation.apply(rows.vector(row), rows.dimension, s.rotated);
    float total = 0;
    size_t set = 0;
    for (size_t w = 0; w < rows.words; w++) {
      uint64_t word = 0;
      for (size_t i = 0; i < 64; i++) {
        const float x = s.rotated[w * 64 + i];
        total += std::fabs(x);
        if (x > 0) word |= 1ull << i, set++;
      }
      *rows.word(row, w) = word;
    }
    const float cosine =
        std::min(1.0f, total / std::sqrt(float(size)));  // of the vector and its signs
    const Facts facts = rows.facts_at(row);
    *facts.set_bits = float(set);
    *facts.factor = 1.0f / total;
    *facts.margin =
        kDeviations * std::sqrt((1 - cosine * cosine) / (cosine * cosine * float(size - 1)));
  }
  Py_RETURN_NONE;
}

// Makes bit planes of the rotated query.
Levels quantise(Scratch& s, size_t words) {
  constexpr size_t lanes = 8;  // eight of each, since one sum would wait for itself
  float lowest[lanes], highest[lanes], sums[lanes] = {0};
  std::copy_n(s.rotated.data(), lanes, lowest);
  std::copy_n(s.rotated.data(), lanes, highest);
  for (size_t i = 0; i < words * 64; i += lanes)
    for (size_t j = 0; j < lanes; j++) {
      const float x = s.rotated[i + j];
      lowest[j] = x < lowest[j] ? x : lowest[j];
      highest[j] = x > highest[j] ? x : highest[j];
      sums[j] += x;
    }
  Levels query{};
  query.words = words;
  query.lowest = *std::min_element(lowest, lowest + lanes);
  query.total = std::accumulate(sums, sums + lanes, 0.0f);
  query.step = std::max(
      (*std::max_element(highest, highest + lanes) - query.lowest) / float((1 << kPlanes) - 1),
      1e-12f);
  const float scale = 1 / query.step, offset = 0.5f - query.lowest * scale;
  s.levels.resize(words * 64);
  uint8_t* __restrict levels_out = s.levels.data();
  const float* __restrict rotated = s.rotated.data();
  for (size_t i = 0; i < words * 64; i++)
    levels_out[i] = uint8_t(int32_t(rotated[i] * scale + offset));
  s.planes.resize(words * kPlanes);
  for (size_t w = 0; w < words; w++)
    for (size_t p = 0; p < kPlanes; p++) {
      const uint8_t* levels = s.levels.data() + w * 64;
      uint64_t plane = 0;
#ifdef OMNI_X86
      for (size_t i = 0; i < 64; i += 16) {
        const __m128i shifted = _mm_slli_epi16(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels + i)), int(7 - p));
        plane |= uint64_t(uint16_t(_mm_movemask_epi8(shifted))) << i;
      }
#else
      for (size_t i = 0; i < 64; i++) plane |= uint64_t(levels[i] >> p & 1) << i;
#endif
      s.planes[w * kPlanes + p] = plane;
    }
  query.planes = s.planes.data();
  return query;
}

// Puts living rows into s.found, which keeps the best k.
void scan(const Rows& rows, const float* query, size_t k, size_t used, const uint8_t* alive,
          Scratch& s) {
  s.rotation.prepare(rows.words * 64);
  s.rotation.apply(query, rows.dimension, s.rotated);
  const Levels levels = quantise(s, rows.words);
  std::vector<Found>& found = s.found;  // a heap with the worst on top
  std::make_heap(found.begin(), found.end(), before);
  float floor = found.size() == k ? found.front().score : -std::numeric_limits<float>::infinity();
  const size_t blocks = (used + kBlock - 1) / kBlock;
  s.most.resize(blocks * kBlock);
  s.above.resize(blocks);
  estimate({rows.bits.as<uint64_t>(), rows.facts_at(0), blocks}, levels, floor, s.most.data(),
           s.above.data());
  s.candidates.clear();
  for (size_t block = 0; block < blocks; block++)
    for (uint32_t above = s.above[block]; above != 0; above &= above - 1) {
      const size_t row = block * kBlock + size_t(__builtin_ctz(above));
      if (row >= used || !alive[row]) continue;
      for (size_t j = 0; j < rows.dimension; j += 16) __builtin_prefetch(rows.vector(row) + j);
      s.candidates.push_back(Found{s.most[row], int64_t(row)});
    }
  for (const Found& candidate : s.candidates) {
    if (candidate.score <= floor) continue;
    const float score = float_dot(rows.vector(size_t(candidate.place)), query, rows.dimension);
    if (score <= floor) continue;
    if (found.size() == k) {
      std::pop_heap(found.begin(), found.end(), before);
      found.pop_back();
    }
    found.push_back(Found{score, candidate.place});
    std::push_heap(found.begin(), found.end(), before);
    if (found.size() == k) floor = found.front().score;
  }
}

// merge(query, k, vectors, bits, facts, alive, live_ids, ids, scores, out) -> ids: finds the k best
// of a base's answer and the living rows; returns the very list `ids` where no live row is among
// them (then `out` is untouched). alive has one byte for each row of the segment.
PyObject* live_merge(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 10) return refuse(PyExc_TypeError, "merge takes 10 arguments");
  PyObject *live_ids = args[6], *ids = args[7];
  const Py_ssize_t k = PyLong_AsSsize_t(args[1]);
  if (k == -1 && PyErr_Occurred()) return nullptr;
  Array query, alive, scores, out;
  Rows rows;
  if (!query.take(args[0], "query") || !alive.take(args[5], "alive") ||
      !scores.take(args[8], "scores") || !out.take(args[9], "out", true))
    return nullptr;
  if (!rows.take(args + 2, query.bytes() / 4, alive.bytes(), false)) return nullptr;
  if (!PyList_Check(live_ids) || !PyList_Check(ids))
    return refuse(PyExc_TypeError, "ids must be lists");
  const size_t given = size_t(PyList_GET_SIZE(ids));
  if (k < 1 || given > size_t(k) || scores.bytes() != given * 4 || out.bytes() / 4 < size_t(k) ||
      size_t(PyList_GET_SIZE(live_ids)) < alive.bytes())
    return refuse(PyExc_ValueError, "k, ids, scores or out have the wrong size");
  Scratch& s = scratch;
  const bool done = guarded([&] {
    s.found.clear();
    for (size_t i = 0; i < given; i++)
      s.found.push_back(Found{scores.as<float>()[i], -1 - int64_t(i)});
    scan(rows, query.as<float>(), size_t(k), alive.bytes(), alive.as<uint8_t>(), s);
  });
  if (!done) return PyErr_NoMemory();
  if (std::all_of(s.found.begin(), s.found.end(), [](const Found& f) { return f.place < 0; }))
    return Py_INCREF(ids), ids;
  std::vector<Found> found;
  // Moved out: making a list may collect garbage, and a finaliser may search.
  found.swap(s.found);
  std::sort(found.begin(), found.end(), before);
  PyObject* answer = PyList_New(Py_ssize_t(found.size()));
  if (answer == nullptr) return nullptr;
  for (size_t i = 0; i < found.size(); i++) {
    const Found& f = found[i];
    PyObject* id =
        f.place < 0 ? PyList_GET_ITEM(ids, -1 - f.place) : PyList_GET_ITEM(live_ids, f.place);
    Py_INCREF(id);
    PyList_SET_ITEM(answer, Py_ssize_t(i), id);
    static_cast<float*>(out.view.buf)[i] = f.score;
  }
  found.swap(s.found);
  return answer;
}

PyMethodDef live_methods[] = {
    method("encode", live_encode, "encode(vectors, dimension, bits, facts, first, end)"),
    method("merge", live_merge,
           "merge(query, k, vectors, bits, facts, alive, live_ids, ids, scores, out) -> ids"),
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_live",
                      "Scans of live entries by one bit a dimension.",
                      -1,
                      live_methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__live() {
  choose_kernels();
  choose_estimates();
  return PyModule_Create(&module);
}
