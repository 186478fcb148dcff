// Scans live entries by one bit a dimension, in about a nanosecond an entry.
//
// Vectors are rotated at random and kept as the signs of their components, laid out as in sketch.h
// (the estimator of RaBitQ, Gao and Long, SIGMOD 2024): the inner product with a query follows from
// the signs, with an error whose size is known for each row. Rows that could enter the answer are
// scored again in float32, so that scores are exact.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "shared.h"
#include "sketch.h"

namespace {

// Standard errors added to an estimate: a row that is due is missed with probability 0.0014 at most
// (normal errors; the last row of an answer that often, better rows less often).
constexpr float kDeviations = 3.0f;
// Rows of a scan that gives up the interpreter's lock, which costs more than scanning fewer.
constexpr size_t kUnlockedRows = 16384;

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

// ---- encoded rows

// Values of a row beside its signs; each array has one value a row.
struct Facts {
  const float* factor;     // norm squared / sum of the absolute components
  const float* deviation;  // one standard error of the estimate
  float largest_factor, largest_deviation;
};

// Arrays of one block of live entries, checked against each other. The facts are factors and
// deviations, one a row, and behind them the largest of each.
struct Rows {
  Array vectors, bits, facts;
  size_t dimension = 0, size = 0, capacity = 0;
  float* fact(size_t at) const { return static_cast<float*>(facts.view.buf) + at; }
  Facts all_facts() const {
    return Facts{fact(0), fact(capacity), *fact(2 * capacity), *fact(2 * capacity + 1)};
  }
  const float* vector(size_t row) const { return vectors.as<float>() + row * dimension; }
  size_t block_bytes() const { return size / 4 * 16; }
  // Byte of the row's first nibble; the next nibble is 16 bytes further.
  uint8_t* nibbles(size_t row) const {
    return static_cast<uint8_t*>(bits.view.buf) + row / block_rows * block_bytes() + row % 16;
  }
  // Borrows vectors, bits and facts; on failure an error is set.
  bool take(PyObject* const* arrays, size_t width, size_t used, bool writable) {
    if (!vectors.take(arrays[0], "vectors") || !bits.take(arrays[1], "bits", writable) ||
        !facts.take(arrays[2], "facts", writable))
      return false;
    dimension = width;
    size = dimension > 0 && dimension <= (size_t(1) << 16) ? padded(dimension) : 0;
    capacity = facts.bytes() >= 8 ? (facts.bytes() - 8) / 8 : 0;
    if (size == 0 || !bits.held || !facts.held || facts.bytes() != 8 * capacity + 8 ||
        capacity % block_rows || bits.bytes() != capacity / block_rows * block_bytes() ||
        used > capacity || vectors.bytes() < used * dimension * 4) {
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
  SketchTable table;
  std::vector<Found> candidates, found;
  // Empties what one large search widened: threads live as long as the process.
  void release() {
    constexpr size_t kept = (size_t(1) << 20) / sizeof(Found);
    if (candidates.capacity() > kept) std::vector<Found>().swap(candidates);
    if (found.capacity() > kept) std::vector<Found>().swap(found);
  }
};
thread_local Scratch scratch;

// Writes signs and facts of one row. Rows 16 apart share bytes: a reader of the other one sees its
// own half unchanged.
void encode_row(const Rows& rows, size_t row, Scratch& s) {
  s.rotation.apply(rows.vector(row), rows.dimension, s.rotated);
  const float* x = s.rotated.data();
  uint8_t* out = rows.nibbles(row);
  const int shift = row % block_rows < 16 ? 0 : 4;
  float width = 1e-12f, squares = 1e-24f;
  for (size_t i = 0; i < rows.size; i += 4, out += 16) {
    unsigned nibble = 0;
    for (size_t j = 0; j < 4; j++) {
      width += std::fabs(x[i + j]);
      squares += x[i + j] * x[i + j];
      nibble |= unsigned(x[i + j] > 0.0f) << j;
    }
    *out = uint8_t((*out & ~(15u << shift)) | nibble << shift);
  }
  // The cosine of the vector and its signs
  const float cosine = std::min(1.0f, width / std::sqrt(float(rows.size) * squares));
  const float factor = squares / width;
  const float deviation =
      std::sqrt(squares * (1 - cosine * cosine) / (cosine * cosine * float(rows.size - 1)));
  const size_t capacity = rows.capacity;
  *rows.fact(row) = factor;
  *rows.fact(capacity + row) = deviation;
  *rows.fact(2 * capacity) = std::max(*rows.fact(2 * capacity), factor);
  *rows.fact(2 * capacity + 1) = std::max(*rows.fact(2 * capacity + 1), deviation);
}

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
  const bool done = unlocked([&] {
    scratch.rotation.prepare(rows.size);
    for (size_t row = size_t(first); row < size_t(end); row++) encode_row(rows, row, scratch);
  });
  if (!done) return nullptr;
  Py_RETURN_NONE;
}

// Collects living rows that may score above `floor`, with the most that each may score.
void collect(const Rows& rows, float floor, size_t used, const uint8_t* alive, Scratch& s) {
  const Facts facts = rows.all_facts();
  // Entries of the table are rounded by half a step at most.
  const float rounding = 0.5001f * float(s.table.nibbles) * s.table.step;
  const float widest =
      kDeviations * facts.largest_deviation + rounding * facts.largest_factor + 1e-5f;
  const uint8_t* bits = rows.bits.as<uint8_t>();
  float scores[block_rows];
  s.candidates.clear();
  for (size_t first = 0; first < used; first += block_rows, bits += rows.block_bytes()) {
    uint32_t above = sketch_block(bits, s.table, facts.factor + first, floor - widest, scores);
    for (; above != 0; above &= above - 1) {
      const size_t j = size_t(__builtin_ctz(above)), row = first + j;
      if (row >= used || !alive[row]) continue;
      const float most = scores[j] + kDeviations * facts.deviation[row] +
                         rounding * facts.factor[row] + 1e-5f;
      if (most > floor) s.candidates.push_back(Found{most, int64_t(row)});
    }
  }
}

// Puts living rows into s.found, which keeps the best k.
void scan(const Rows& rows, const float* query, size_t k, size_t used, const uint8_t* alive,
          Scratch& s) {
  s.rotation.prepare(rows.size);
  s.rotation.apply(query, rows.dimension, s.rotated);
  s.table.fill(s.rotated.data(), rows.size, rows.size, 1.0f);
  std::vector<Found>& found = s.found;  // a heap with the worst on top
  std::make_heap(found.begin(), found.end(), before);
  const float none = -std::numeric_limits<float>::infinity();
  float floor = found.size() == k ? found.front().score : none;
  collect(rows, floor, used, alive, s);
  std::vector<Found>& candidates = s.candidates;
  if (candidates.size() > 4 * k + 32)  // the best first, so that the floor rises early
    std::nth_element(candidates.begin(), candidates.begin() + long(2 * k), candidates.end(), before);
  constexpr size_t ahead = 4;
  for (size_t i = 0; i < candidates.size(); i++) {
    if (i + ahead < candidates.size()) {
      const float* next = rows.vector(size_t(candidates[i + ahead].place));
      for (size_t j = 0; j < rows.dimension; j += 16) __builtin_prefetch(next + j);
    }
    const Found& candidate = candidates[i];
    if (candidate.score <= floor) continue;
    const float product = float_dot(rows.vector(size_t(candidate.place)), query, rows.dimension);
    const float score = std::min(1.0f, std::max(-1.0f, product));
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
  struct AtEnd {
    Scratch& held;
    ~AtEnd() { held.release(); }
  } const at_end{s};
  auto work = [&] {
    s.found.clear();
    for (size_t i = 0; i < given; i++)
      s.found.push_back(Found{scores.as<float>()[i], -1 - int64_t(i)});
    scan(rows, query.as<float>(), size_t(k), alive.bytes(), alive.as<uint8_t>(), s);
  };
  if (alive.bytes() > kUnlockedRows) {
    if (!unlocked(work)) return nullptr;
  } else if (!guarded(work)) {
    return PyErr_NoMemory();
  }
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
  choose_sketch_kernel();
  return PyModule_Create(&module);
}
