// Searches posting lists within a budget; see index_builder/lexical/scan.py, whose numpy part gives
// the same answers.
//
// A posting is a row and a weight of one byte. Scores are integers, so that sums do not depend on
// the order of addition. Lists of the rarest terms are read whole; the rows that are best by then
// are completed by looking up the other terms, and given up as soon as they cannot be among the k
// best any more.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <functional>
#include <new>
#include <vector>

#include "shared.h"

namespace {

constexpr size_t overdraft = 8;    // budgets that may be read to find k rows
constexpr size_t buckets = 2048;   // of the histogram that finds the best rows
constexpr size_t most_terms = 4096;
constexpr size_t terms_between_prunings = 4;
constexpr size_t look_up_steps = 12;  // postings read in the time in which a row is looked up

struct Lists {
  Array offsets_array, rows_array, weights_array, best_array;
  const uint32_t *offsets = nullptr, *rows = nullptr;
  const uint8_t *weights = nullptr, *best = nullptr;
  size_t terms = 0, postings = 0, count = 0;

  size_t length(uint32_t term) const { return offsets[term + 1] - offsets[term]; }

  // Returns what is wrong with the lists, or null; nothing is read out of bounds afterwards.
  const char* check() {
    if (offsets_array.bytes() < 4) return "offsets are missing";
    offsets = offsets_array.as<uint32_t>();
    rows = rows_array.as<uint32_t>();
    weights = weights_array.as<uint8_t>();
    best = best_array.as<uint8_t>();
    terms = offsets_array.bytes() / 4 - 1;
    postings = rows_array.bytes() / 4;
    if (weights_array.bytes() != postings || best_array.bytes() != terms ||
        offsets_array.bytes() % 4 || rows_array.bytes() % 4 || offsets[0] != 0 ||
        offsets[terms] != postings)
      return "offsets, rows and weights do not fit each other";
    for (size_t t = 0; t < terms; t++)
      if (offsets[t + 1] <= offsets[t] || offsets[t + 1] > postings) return "offsets do not rise";
    for (size_t t = 0; t < terms; t++) {
      uint8_t most = 0, least = 255;
      bool in_order = rows[offsets[t]] < count;
      for (size_t i = offsets[t]; i < offsets[t + 1]; i++) {
        most = std::max(most, weights[i]);
        least = std::min(least, weights[i]);
        if (i > offsets[t]) in_order &= rows[i] > rows[i - 1] && rows[i] < count;
      }
      if (!in_order) return "a row is out of range or order";
      if (least == 0 || most != best[t]) return "a weight is zero, or the best one is not the best";
    }
    return nullptr;
  }
};

// A row with its score, comparable: higher scores first, then lower rows.
inline uint64_t packed(uint32_t score, uint32_t row) {
  return uint64_t(score) << 32 | (0xFFFFFFFFu - row);
}
inline uint32_t row_of(uint64_t item) { return 0xFFFFFFFFu - uint32_t(item); }
inline uint32_t score_of(uint64_t item) { return uint32_t(item >> 32); }

struct Row {
  uint32_t row, score;
};

struct Search {
  const uint32_t *terms, *factors;
  size_t term_count, k, budget, complete;
  const uint8_t *allowed, *hidden;
  const uint32_t* also;
  size_t also_count;
  bool usable(uint32_t row) const {
    return (allowed == nullptr || allowed[row]) && (hidden == nullptr || !hidden[row]);
  }
};

struct Scratch {
  std::vector<uint32_t> sums, touched, histogram;
  std::vector<uint64_t> best;
  std::vector<Row> candidates, also;
  std::vector<uint32_t> order, scores, places;
  // Searches in a row that needed less than a quarter of `sums`, which is as long as the largest
  // index.
  size_t small_searches = 0;
  // Makes room for the sums of `count` rows; all are 0 between searches.
  void begin(size_t count) {
    constexpr size_t patience = 1000;
    small_searches = 4 * count + (1 << 16) < sums.size() ? small_searches + 1 : 0;
    if (sums.size() < count || small_searches > patience) {
      std::vector<uint32_t>(count, 0).swap(sums);
      small_searches = 0;
    }
  }
  void release() {
    trim(touched);
    trim(best);
    trim(candidates);
    trim(also);
    trim(order);
    trim(scores);
    trim(places);
  }
};
thread_local Scratch scratch;

// Adds whole lists to the sums; returns how many terms were read.
template <bool masked>
size_t read_lists(const Lists& lists, const Search& q, Scratch& s) {
  size_t total = 0, found = 0;
  for (size_t t = 0; t < q.term_count; t++) {
    const size_t start = lists.offsets[q.terms[t]], end = lists.offsets[q.terms[t] + 1];
    total += end - start;
    const bool is_over = total > q.budget * (found >= q.k ? 1 : overdraft);
    const bool is_long = end - start > look_up_steps * std::max(q.k, q.complete);
    if (t > 0 && q.budget > 0 && is_over && is_long) return t;
    if (s.touched.size() < found + end - start) s.touched.resize(found + end - start);
    const uint32_t factor = q.factors[t];
    uint32_t *sums = s.sums.data(), *touched = s.touched.data();
    for (size_t i = start; i < end; i++) {
      const uint32_t row = lists.rows[i];
      if (masked && !q.usable(row)) continue;
      touched[found] = row;
      found += sums[row] == 0;
      sums[row] += factor * lists.weights[i];
    }
    s.touched.resize(found);
  }
  return q.term_count;
}

// Leaves the best `wanted` touched rows in s.best, in no order; returns the highest sum left out.
uint32_t keep_best(size_t wanted, Scratch& s) {
  s.best.clear();
  uint32_t most = 0;
  for (uint32_t row : s.touched) most = std::max(most, s.sums[row]);
  uint32_t floor = 0;
  if (s.touched.size() > wanted) {
    unsigned shift = 0;
    while ((most >> shift) >= buckets) shift++;
    s.histogram.assign(buckets, 0);
    for (uint32_t row : s.touched) s.histogram[s.sums[row] >> shift]++;
    size_t above = 0, bucket = buckets;
    while (bucket > 0 && above < wanted) above += s.histogram[--bucket];
    floor = uint32_t(bucket) << shift;
  }
  uint32_t left = 0;
  for (uint32_t row : s.touched) {
    const uint32_t sum = s.sums[row];
    if (sum >= floor)
      s.best.push_back(packed(sum, row));
    else
      left = std::max(left, sum);
  }
  if (s.best.size() > wanted) {
    std::nth_element(s.best.begin(), s.best.begin() + ptrdiff_t(wanted), s.best.end(),
                     std::greater<uint64_t>());
    left = score_of(s.best[wanted]);
    s.best.resize(wanted);
  }
  return left;
}

// Adds what rows have of one term. Binary searches for all rows go step by step together, so that
// none waits for memory alone.
void look_up(const Lists& lists, uint32_t term, uint32_t factor, std::vector<Row>& rows,
             std::vector<uint32_t>& places) {
  const uint32_t* first = lists.rows + lists.offsets[term];
  const uint8_t* weights = lists.weights + lists.offsets[term];
  const size_t length = lists.length(term), count = rows.size();
  places.assign(count, 0);
  uint32_t* __restrict place = places.data();
  Row* __restrict row = rows.data();
  for (size_t left = length; left > 1;) {
    const uint32_t half = uint32_t(left / 2);
    for (size_t i = 0; i < count; i++)
      place[i] += first[place[i] + half - 1] < row[i].row ? half : 0;
    left -= half;
  }
  for (size_t i = 0; i < count; i++) {
    const size_t at = place[i] + (first[place[i]] < row[i].row);
    if (at < length && first[at] == row[i].row) row[i].score += factor * weights[at];
  }
}

// Gives up candidates that cannot be among the k best whatever they have of the other terms.
void prune(size_t k, uint64_t rest, Scratch& s) {
  if (s.candidates.size() <= k) return;
  s.scores.clear();
  for (const Row& r : s.candidates) s.scores.push_back(r.score);
  std::nth_element(s.scores.begin(), s.scores.begin() + ptrdiff_t(k - 1), s.scores.end(),
                   std::greater<uint32_t>());
  const uint64_t floor = s.scores[k - 1];
  s.candidates.erase(std::remove_if(s.candidates.begin(), s.candidates.end(),
                                    [&](const Row& r) { return r.score + rest < floor; }),
                     s.candidates.end());
}

// Scores q.also into `out`: sums of the lists that were read, and the other terms looked up.
void score_also(const Lists& lists, const Search& q, size_t read, Scratch& s, uint32_t* out) {
  s.order.resize(q.also_count);
  for (size_t i = 0; i < q.also_count; i++) s.order[i] = uint32_t(i);
  std::sort(s.order.begin(), s.order.end(),
            [&](uint32_t a, uint32_t b) { return q.also[a] < q.also[b]; });
  s.also.clear();
  for (uint32_t i : s.order) s.also.push_back(Row{q.also[i], s.sums[q.also[i]]});
  for (size_t t = read; t < q.term_count; t++)
    look_up(lists, q.terms[t], q.factors[t], s.also, s.places);
  for (size_t i = 0; i < s.order.size(); i++)
    out[s.order[i]] = q.usable(s.also[i].row) ? s.also[i].score : 0;
}

// Leaves the k best rows in s.best, best first; returns whether these are proved to be the best.
bool search(const Lists& lists, const Search& q, Scratch& s, uint32_t* also_scores) {
  s.begin(lists.count);
  s.touched.clear();
  const size_t read = q.allowed || q.hidden ? read_lists<true>(lists, q, s)
                                            : read_lists<false>(lists, q, s);
  const bool all_read = read == q.term_count;
  const size_t wanted = all_read ? q.k : std::max(q.k, q.complete);
  const uint32_t left = keep_best(wanted, s);
  score_also(lists, q, read, s, also_scores);
  for (uint32_t row : s.touched) s.sums[row] = 0;
  bool exact = all_read;
  if (!all_read) {
    uint64_t bound = 0;
    for (size_t t = read; t < q.term_count; t++)
      bound += uint64_t(q.factors[t]) * lists.best[q.terms[t]];
    s.candidates.clear();
    for (uint64_t item : s.best) s.candidates.push_back(Row{row_of(item), score_of(item)});
    std::sort(s.candidates.begin(), s.candidates.end(),
              [](const Row& a, const Row& b) { return a.row < b.row; });
    uint64_t rest = bound;
    for (size_t t = read; t < q.term_count; t++) {
      if ((t - read) % terms_between_prunings == 0) prune(q.k, rest, s);
      look_up(lists, q.terms[t], q.factors[t], s.candidates, s.places);
      rest -= uint64_t(q.factors[t]) * lists.best[q.terms[t]];
    }
    s.best.clear();
    for (const Row& r : s.candidates) s.best.push_back(packed(r.score, r.row));
    const size_t kept = std::min(q.k, s.best.size());
    std::nth_element(s.best.begin(), s.best.begin() + ptrdiff_t(kept), s.best.end(),
                     std::greater<uint64_t>());
    s.best.resize(kept);
    const uint64_t last =
        kept < q.k ? 0 : score_of(*std::min_element(s.best.begin(), s.best.end()));
    exact = kept == q.k && last > left + bound;
  }
  std::sort(s.best.begin(), s.best.end(), std::greater<uint64_t>());
  return exact;
}

struct PostingsObject {
  PyObject_HEAD Lists* lists;
};

// Postings(offsets, rows, weights, best, count): borrows and checks the arrays.
PyObject* postings_new(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject* arrays[4];
  Py_ssize_t count;
  if (!PyArg_ParseTuple(args, "OOOOn", &arrays[0], &arrays[1], &arrays[2], &arrays[3], &count))
    return nullptr;
  if (count < 0 || size_t(count) > 0xFFFFFFFFu)
    return refuse(PyExc_ValueError, "the number of rows is out of range");
  auto* self = reinterpret_cast<PostingsObject*>(type->tp_alloc(type, 0));
  if (self == nullptr) return nullptr;
  self->lists = new (std::nothrow) Lists;
  if (self->lists == nullptr) return Py_DECREF(self), PyErr_NoMemory();
  Lists& lists = *self->lists;
  lists.count = size_t(count);
  if (!lists.offsets_array.take(arrays[0], "offsets") ||
      !lists.rows_array.take(arrays[1], "rows") ||
      !lists.weights_array.take(arrays[2], "weights") ||
      !lists.best_array.take(arrays[3], "best"))
    return Py_DECREF(self), nullptr;
  const char* wrong;
  Py_BEGIN_ALLOW_THREADS wrong = lists.check();
  Py_END_ALLOW_THREADS if (wrong != nullptr) {
    Py_DECREF(self);
    return refuse(PyExc_ValueError, wrong);
  }
  return reinterpret_cast<PyObject*>(self);
}

void postings_dealloc(PyObject* self) {
  delete reinterpret_cast<PostingsObject*>(self)->lists;
  Py_TYPE(self)->tp_free(self);
}

// Borrowed arguments of a search, checked against the lists.
struct Request {
  Array terms, factors, rows, scores, also, also_scores, allowed, hidden;
  Search search{};
  // On failure an error is set.
  bool take(const Lists& lists, PyObject* const* args) {
    if (!terms.take(args[0], "terms") || !factors.take(args[1], "factors") ||
        !rows.take(args[2], "rows", true) || !scores.take(args[3], "scores", true) ||
        !also.take(args[4], "also") || !also_scores.take(args[5], "also_scores", true) ||
        !allowed.take(args[6], "allowed") || !hidden.take(args[7], "hidden"))
      return false;
    const Py_ssize_t budget = PyLong_AsSsize_t(args[8]), complete = PyLong_AsSsize_t(args[9]);
    if (PyErr_Occurred()) return false;
    search = {terms.as<uint32_t>(),   factors.as<uint32_t>(), terms.bytes() / 4,
              rows.bytes() / 4,       size_t(budget),         size_t(complete),
              allowed.as<uint8_t>(),  hidden.as<uint8_t>(),   also.as<uint32_t>(),
              also.bytes() / 4};
    const char* wrong = nullptr;
    if (budget < 0 || complete < 0 || search.k < 1 || scores.bytes() != rows.bytes() ||
        factors.bytes() != terms.bytes() || also_scores.bytes() != also.bytes() ||
        search.term_count > most_terms)
      wrong = "terms, factors, rows, scores or the budget have the wrong size";
    else if ((allowed.held && allowed.bytes() != lists.count) ||
             (hidden.held && hidden.bytes() != lists.count))
      wrong = "a mask must have one byte for each row";
    for (size_t t = 0; wrong == nullptr && t < search.term_count; t++)
      if (search.terms[t] >= lists.terms) wrong = "a term is out of range";
    for (size_t i = 0; wrong == nullptr && i < search.also_count; i++)
      if (search.also[i] >= lists.count) wrong = "a row is out of range";
    if (wrong != nullptr) PyErr_SetString(PyExc_ValueError, wrong);
    return wrong == nullptr;
  }
};

// search(terms, factors, rows, scores, also, also_scores, allowed, hidden, budget, complete)
// -> (found, exact): writes the best rows and their scores, and the scores of the rows `also`.
PyObject* postings_search(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const Lists& lists = *reinterpret_cast<PostingsObject*>(self)->lists;
  if (count != 10) return refuse(PyExc_TypeError, "search takes 10 arguments");
  Request r;
  if (!r.take(lists, args)) return nullptr;
  bool exact = false;
  size_t found = 0;
  const bool done = unlocked([&] {
    Scratch& s = scratch;
    try {
      exact = search(lists, r.search, s, static_cast<uint32_t*>(r.also_scores.view.buf));
    } catch (...) {
      s.sums.clear();  // perhaps not all zeros
      s.release();
      throw;
    }
    found = s.best.size();
    for (size_t i = 0; i < found; i++) {
      static_cast<uint32_t*>(r.rows.view.buf)[i] = row_of(s.best[i]);
      static_cast<uint32_t*>(r.scores.view.buf)[i] = score_of(s.best[i]);
    }
    s.release();
  });
  if (!done) return nullptr;
  return Py_BuildValue("nO", Py_ssize_t(found), exact ? Py_True : Py_False);
}

PyMethodDef postings_methods[] = {
    method("search", postings_search,
           "search(terms, factors, rows, scores, also, also_scores, allowed, hidden, budget, "
           "complete) -> (found, exact)"),
    {nullptr, nullptr, 0, nullptr}};

PyTypeObject postings_type{};
PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_lexical",
                      "Searches of posting lists within a budget.",
                      -1,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__lexical() {
  Py_SET_REFCNT(reinterpret_cast<PyObject*>(&postings_type), 1);
  postings_type.tp_name = "index_builder.native._lexical.Postings";
  postings_type.tp_basicsize = sizeof(PostingsObject);
  postings_type.tp_flags = Py_TPFLAGS_DEFAULT;
  postings_type.tp_doc = "Postings(offsets, rows, weights, best, count)";
  postings_type.tp_new = postings_new;
  postings_type.tp_dealloc = postings_dealloc;
  postings_type.tp_methods = postings_methods;
  if (PyType_Ready(&postings_type) < 0) return nullptr;
  PyObject* result = PyModule_Create(&module);
  if (result == nullptr) return nullptr;
  Py_INCREF(&postings_type);
  PyModule_AddObject(result, "Postings", reinterpret_cast<PyObject*>(&postings_type));
  return result;
}
