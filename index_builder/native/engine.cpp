// Searches that Python cannot make fast enough: scans under a filter, a graph walk over 8-bit
// codes, and mapping hits to ids.
//
// One Engine borrows (through the buffer protocol) the arrays of one entity type: float32 vectors,
// 8-bit codes, out-links, ids. It owns no data, writes none of it, and can be searched from many
// threads; searches release the interpreter lock.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <iterator>

#include "carry.h"
#include "core.h"

namespace {

// Sums of products of codes (255) and a query's bytes (127) must fit 32 bits.
constexpr Py_ssize_t most_dimensions = 1 << 16;

struct EngineObject {
  PyObject_HEAD Core* core;
};

void engine_dealloc(PyObject* self) {
  delete reinterpret_cast<EngineObject*>(self)->core;
  Py_TYPE(self)->tp_free(self);
}

// Borrows the arrays of `engine_new`; on failure a TypeError is set.
bool take_arrays(Core& core, PyObject* const* objects) {
  const char* names[] = {"vectors",    "blob",         "offsets", "codes",   "graph", "node_of_row",
                         "row_starts", "rows_by_node", "sketch",  "factors", "links",
                         "quantiser"};
  Array* arrays[] = {&core.vectors, &core.blob,    &core.offsets, &core.codes,
                     &core.graph,   &core.nodes,   &core.starts,  &core.rows,
                     &core.sketch,  &core.factors, &core.links,  &core.quantiser};
  for (size_t i = 0; i < std::size(arrays); i++)
    if (!arrays[i]->take(objects[i], names[i])) return false;
  return true;
}

// What is wrong with ids and duplicates, or null.
const char* misfit_of_rows(const Core& core) {
  if (core.offsets.bytes() != (core.row_count + 1) * 8) return "offsets do not fit the rows";
  const uint64_t* offsets = core.offsets.as<uint64_t>();
  if (offsets[core.row_count] > core.blob.bytes()) return "offsets point past the ids";
  for (size_t i = 0; i < core.row_count; i++)
    if (offsets[i] > offsets[i + 1]) return "offsets of ids are not ascending";
  if (!core.rows_fit_nodes())
    return "node_of_row, row_starts and rows_by_node do not fit each other";
  return nullptr;
}

// Sets the unit of links and returns what is wrong with the quantiser, or null.
const char* misfit_of_quantiser(Core& core) {
  if (!core.quantiser.held) return nullptr;
  if (!core.codes.held || core.quantiser.bytes() != (2 * core.dimension + 2) * 4)
    return "the quantiser does not fit the vectors";
  double sum = 0.0;
  for (size_t i = 0; i < core.dimension; i++) {
    if (!(core.steps()[i] > 0.0f)) return "a step of the quantiser is not positive";
    sum += core.steps()[i];
  }
  if (!(core.code_error() >= 0.0f) || !(core.code_reach() >= 0.0f))
    return "the quantiser's error is not known";
  core.link_unit = float(sum / double(core.dimension));
  return nullptr;
}

// What is wrong with codes and sketches, or null.
const char* misfit_of_codes(Core& core) {
  if (core.codes.held && core.codes.bytes() != core.node_count * core.stride)
    return "codes do not fit the vectors";
  if (const char* message = misfit_of_quantiser(core)) return message;
  if (!core.sketch.held) return nullptr;
  const size_t blocks = (core.node_count + block_rows - 1) / block_rows;
  const bool fits = core.codes.held && core.sketch.bytes() == blocks * core.stride * 4 &&
                    core.factors.bytes() == blocks * block_rows * 4;
  return fits ? nullptr : "sketches do not fit the vectors";
}

// Sets the degree and returns what is wrong with the graph, or null.
const char* misfit_of_graph(Core& core) {
  if (!core.walks()) return nullptr;
  const Array& held = core.links.held ? core.links : core.graph;
  const size_t unit = core.links.held ? block_rows * (8 + core.stride / 8) : 4;
  if (!core.codes.held || core.node_count == 0 || core.node_count >= most_nodes ||
      held.bytes() == 0 || held.bytes() % (core.node_count * unit))
    return "the graph does not fit the vectors";
  core.degree = held.bytes() / (core.node_count * unit) * (core.links.held ? block_rows : 1);
  core.layout = LinkLayout{core.degree, core.stride};
  if (core.entry >= core.node_count) return "the entry is not a node";
  for (size_t node = 0; node < core.node_count; node++) {
    const uint32_t* out = reinterpret_cast<const uint32_t*>(core.out_links(uint32_t(node)));
    for (size_t i = 0; i < core.degree; i++)
      if (out[i] >= core.node_count) return "a link points past the nodes";
  }
  return nullptr;
}

// Sets the sizes and returns what is wrong with the arrays, or null.
const char* misfit(Core& core, Py_ssize_t dimension) {
  if (dimension > most_dimensions) return "vectors cannot be wider than 65,536 dimensions";
  if (dimension < 1 || core.vectors.bytes() % (size_t(dimension) * 4))
    return "vectors do not have that dimension";
  core.dimension = size_t(dimension);
  core.node_count = core.vectors.bytes() / (core.dimension * 4);
  core.row_count = core.nodes.held ? core.nodes.bytes() / 4 : core.node_count;
  core.stride = (core.dimension + 63) / 64 * 64;
  if (const char* message = misfit_of_rows(core)) return message;
  if (const char* message = misfit_of_codes(core)) return message;
  return misfit_of_graph(core);
}

PyObject* engine_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"vectors", "dimension", "blob",        "offsets",    "codes",
                                "graph",   "entry",     "node_of_row", "row_starts", "rows_by_node",
                                "sketch",  "factors",   "links",       "quantiser",  nullptr};
  PyObject* objects[12];  // as in take_arrays
  std::fill(std::begin(objects), std::end(objects), Py_None);
  Py_ssize_t dimension;
  unsigned int entry = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OnOO|OOIOOOOOOO", const_cast<char**>(names),
                                   &objects[0], &dimension, &objects[1], &objects[2], &objects[3],
                                   &objects[4], &entry, &objects[5], &objects[6], &objects[7],
                                   &objects[8], &objects[9], &objects[10], &objects[11]))
    return nullptr;
  auto* self = reinterpret_cast<EngineObject*>(type->tp_alloc(type, 0));
  if (self == nullptr) return nullptr;
  self->core = new Core();
  self->core->entry = entry;
  bool ready = take_arrays(*self->core, objects);
  if (ready) {
    const char* message = misfit(*self->core, dimension);
    if (message != nullptr) PyErr_SetString(PyExc_ValueError, message);
    ready = message == nullptr;
  }
  if (!ready) Py_CLEAR(self);
  return reinterpret_cast<PyObject*>(self);
}

// Arguments of a search, checked: a query of the right length and room for k scores.
struct Request {
  Array query, out, mask, hidden, list, distances;
  size_t k = 0;
  AllowedRows allowed() const { return {mask.as<uint8_t>(), hidden.as<uint8_t>()}; }
};

// Reads a positive number; on failure an error is set, as by `masks` and `request`.
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
  if ((r.mask.held && r.mask.bytes() != core.row_count) ||
      (r.hidden.held && r.hidden.bytes() != core.row_count)) {
    PyErr_SetString(PyExc_ValueError, "a mask must have one byte per row");
    return false;
  }
  return true;
}

bool request(const Core& core, Request& r, PyObject* query, PyObject* k, PyObject* out) {
  if (!r.query.take(query, "query") || !r.out.take(out, "out", true) || !positive(k, r.k))
    return false;
  if (r.query.bytes() != core.dimension * 4 || r.out.bytes() / 4 < r.k) {
    PyErr_SetString(PyExc_ValueError, "the query or the room for scores has the wrong size");
    return false;
  }
  return true;
}

// finish(nodes, distances, k, out, mask, hidden) -> ids: maps a graph's answer to ids of the rows
// that are allowed.
PyObject* engine_finish(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const Core& core = *reinterpret_cast<EngineObject*>(self)->core;
  Request r;
  if (count != 6) return refuse(PyExc_TypeError, "finish takes 6 arguments");
  if (!r.list.take(args[0], "nodes") || !r.distances.take(args[1], "distances") ||
      !positive(args[2], r.k) || !r.out.take(args[3], "out", true) ||
      !masks(core, r, args[4], args[5]))
    return nullptr;
  size_t n = r.distances.bytes() / 4;
  size_t width = n ? r.list.bytes() / n : 4;
  if (r.out.bytes() / 4 < r.k || r.list.bytes() != n * width || (width != 4 && width != 8))
    return refuse(PyExc_ValueError, "nodes, distances or out have the wrong size");
  Scratch& s = scratch;
  const Releases at_end{s};
  auto node_at = [&](size_t i) {
    return width == 4 ? uint64_t(r.list.as<uint32_t>()[i]) : r.list.as<uint64_t>()[i];
  };
  for (size_t i = 0; i < n; i++)
    if (node_at(i) >= core.node_count) return refuse(PyExc_ValueError, "a node is out of range");
  const bool done = guarded([&] {
    s.hits.clear();
    for (size_t i = 0; core.starts.held && i < std::min(n, r.k); i++)
      __builtin_prefetch(core.starts.as<uint32_t>() + node_at(i));
    for (size_t i = 0; i < n && s.hits.size() < r.k; i++)
      core.add_rows(uint32_t(node_at(i)), 1.0f - 0.5f * r.distances.as<float>()[i], r.allowed(),
                    s.hits);
    if (s.hits.size() > r.k) s.hits.resize(r.k);
  });
  if (!done) return PyErr_NoMemory();
  return core.answer(s, static_cast<float*>(r.out.view.buf));
}

// scan(query, k, rows, out, hidden) -> (ids, scored): finds the best of the given rows, and says how
// many were scored in float32; all of them where codes could rule out none.
PyObject* engine_scan(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const Core& core = *reinterpret_cast<EngineObject*>(self)->core;
  Request r;
  if (count != 5) return refuse(PyExc_TypeError, "scan takes 5 arguments");
  if (!request(core, r, args[0], args[1], args[3]) || !r.list.take(args[2], "rows") ||
      !masks(core, r, nullptr, args[4]))
    return nullptr;
  const uint32_t* chosen = r.list.as<uint32_t>();
  size_t n = r.list.bytes() / 4;
  bool in_range = true;
  size_t scored = 0;
  Scratch& s = scratch;
  const Releases at_end{s};
  const bool done = unlocked([&] {
    uint32_t largest = 0;
    for (size_t i = 0; i < n; i++) largest = std::max(largest, chosen[i]);
    in_range = n == 0 || largest < core.row_count;
    if (in_range)
      scored = core.scan(r.query.as<float>(), r.k, {chosen, n}, r.hidden.as<uint8_t>(), s);
  });
  if (!done) return nullptr;
  if (!in_range) return refuse(PyExc_ValueError, "a row is out of range");
  PyObject* ids = core.answer(s, static_cast<float*>(r.out.view.buf));
  return ids == nullptr ? nullptr : Py_BuildValue("(Nn)", ids, Py_ssize_t(scored));
}

// walk(query, k, ef, out, most, hidden) -> ids: walks the graph over codes; its best `most` nodes
// are scored in float32, hidden ones left out.
PyObject* engine_walk(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const Core& core = *reinterpret_cast<EngineObject*>(self)->core;
  Request r;
  size_t ef = 0, most = 0;
  if (count != 6) return refuse(PyExc_TypeError, "walk takes 6 arguments");
  if (!core.walks()) return refuse(PyExc_ValueError, "this engine has no graph");
  if (!request(core, r, args[0], args[1], args[3]) || !positive(args[2], ef) ||
      !positive(args[4], most) || !masks(core, r, nullptr, args[5]))
    return nullptr;
  Scratch& s = scratch;
  const Releases at_end{s};
  const bool done = unlocked([&] {
    core.walk(r.query.as<float>(), std::max(ef, r.k), s);
    core.refine(r.query.as<float>(), r.k, most, r.allowed(), s);
  });
  if (!done) return nullptr;
  return core.answer(s, static_cast<float*>(r.out.view.buf));
}

// walk_batch(queries, k, ef, out, most, hidden) -> ids of each query: walks for several queries,
// which take turns.
PyObject* engine_walk_batch(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const Core& core = *reinterpret_cast<EngineObject*>(self)->core;
  Request r;
  size_t ef = 0, most = 0;
  if (count != 6) return refuse(PyExc_TypeError, "walk_batch takes 6 arguments");
  if (!core.walks()) return refuse(PyExc_ValueError, "this engine has no graph");
  if (!r.query.take(args[0], "queries") || !positive(args[1], r.k) || !positive(args[2], ef) ||
      !r.out.take(args[3], "out", true) || !positive(args[4], most) ||
      !masks(core, r, nullptr, args[5]))
    return nullptr;
  const size_t queries = r.query.bytes() / (core.dimension * 4);
  if (r.query.bytes() != queries * core.dimension * 4 ||
      (queries > 0 && r.out.bytes() / 4 / queries < r.k))
    return refuse(PyExc_ValueError, "the queries or the room for scores have the wrong size");
  std::vector<std::vector<Hit>> found;
  const float* first = r.query.as<float>();
  const Releases at_end[turns] = {{turn_scratch[0]}, {turn_scratch[1]}, {turn_scratch[2]},
                                  {turn_scratch[3]}};
  const bool done = unlocked([&] {
    found.resize(queries);
    core.walk_many(first, queries, std::max(ef, r.k), [&](size_t i, Scratch& s) {
      core.refine(first + i * core.dimension, r.k, most, r.allowed(), s);
      found[i] = s.hits;
    });
  });
  if (!done) return nullptr;
  PyObject* lists = PyList_New(Py_ssize_t(queries));
  for (size_t i = 0; lists != nullptr && i < queries; i++) {
    PyObject* ids = core.answer(found[i], static_cast<float*>(r.out.view.buf) + i * r.k);
    if (ids == nullptr)
      Py_CLEAR(lists);
    else
      PyList_SET_ITEM(lists, Py_ssize_t(i), ids);
  }
  return lists;
}

// sketch(query, k, wanted, out, mask, hidden) -> ids: scores all rows by sketches, the best
// `wanted` allowed ones by codes, and of those in float32 all that could be among the best.
PyObject* engine_sketch(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const Core& core = *reinterpret_cast<EngineObject*>(self)->core;
  Request r;
  size_t wanted = 0;
  if (count != 6) return refuse(PyExc_TypeError, "sketch takes 6 arguments");
  if (!core.sketch.held) return refuse(PyExc_ValueError, "this engine has no sketches");
  if (!request(core, r, args[0], args[1], args[3]) || !positive(args[2], wanted) ||
      !masks(core, r, args[4], args[5]))
    return nullptr;
  Scratch& s = scratch;
  const Releases at_end{s};
  const bool done = unlocked([&] {
    core.sketch_scan(r.query.as<float>(), r.k, std::max(wanted, 4 * r.k), r.allowed(), s);
  });
  if (!done) return nullptr;
  return core.answer(s, static_cast<float*>(r.out.view.buf));
}

// nearest(query, k, ef, out_nodes, out_distances) -> count: walks without a filter and returns
// nodes, as an AnnIndex does.
PyObject* engine_nearest(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const Core& core = *reinterpret_cast<EngineObject*>(self)->core;
  Request r;
  size_t ef = 0;
  if (count != 5) return refuse(PyExc_TypeError, "nearest takes 5 arguments");
  if (!core.walks()) return refuse(PyExc_ValueError, "this engine has no graph");
  if (!request(core, r, args[0], args[1], args[4]) || !positive(args[2], ef) ||
      !r.list.take(args[3], "out_nodes", true))
    return nullptr;
  if (r.list.bytes() / 4 < r.k || r.out.bytes() / 4 < r.k)
    return refuse(PyExc_ValueError, "no room for the nodes");
  Scratch& s = scratch;
  const Releases at_end{s};
  const bool done = unlocked([&] {
    core.walk(r.query.as<float>(), std::max(ef, r.k), s);
    core.score_nodes(r.query.as<float>(), std::max<size_t>(2 * r.k, 26), s);
    Core::finish(r.k, s.hits);
  });
  if (!done) return nullptr;
  for (size_t i = 0; i < s.hits.size(); i++) {
    static_cast<uint32_t*>(r.list.view.buf)[i] = s.hits[i].row;
    static_cast<float*>(r.out.view.buf)[i] = 2.0f - 2.0f * s.hits[i].score;
  }
  return PyLong_FromSize_t(s.hits.size());
}

// link_records(vectors, dimension, graph, scale, out): writes the records of all links over zeros.
PyObject* link_records(PyObject*, PyObject* args) {
  PyObject *vectors_object, *graph_object, *out_object;
  Py_ssize_t dimension;
  double scale;
  Array vectors, graph, out;
  if (!PyArg_ParseTuple(args, "OnOdO", &vectors_object, &dimension, &graph_object, &scale,
                        &out_object))
    return nullptr;
  if (!vectors.take(vectors_object, "vectors") || !graph.take(graph_object, "graph") ||
      !out.take(out_object, "out", true))
    return nullptr;
  if (dimension > most_dimensions) return refuse(PyExc_ValueError, "vectors cannot be that wide");
  const size_t width = size_t(dimension), count = dimension > 0 ? vectors.bytes() / (4 * width) : 0;
  const LinkLayout layout{count ? graph.bytes() / (4 * count) : 0, (width + 63) / 64 * 64};
  if (count == 0 || layout.degree % block_rows || out.bytes() != count * layout.bytes() ||
      graph.bytes() != count * layout.degree * 4)
    return refuse(PyExc_ValueError, "vectors, graph and out do not fit each other");
  const uint32_t* links = graph.as<uint32_t>();
  for (size_t i = 0; i < count * layout.degree; i++)
    if (links[i] >= count) return refuse(PyExc_ValueError, "a link points past the nodes");
  Py_BEGIN_ALLOW_THREADS const ScaledVectors scaled{vectors.as<float>(), width, float(scale)};
  for (size_t node = 0; node < count; node++)
    write_links(layout, scaled, uint32_t(node), links + node * layout.degree,
                static_cast<uint8_t*>(out.view.buf) + node * layout.bytes());
  Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

// Whether each number is below `limit` or `gone`, and no other one comes twice.
bool are_distinct_nodes(const uint32_t* numbers, size_t count, size_t limit) {
  std::vector<uint8_t> met(limit, 0);
  for (size_t i = 0; i < count; i++) {
    if (numbers[i] == gone) continue;
    if (numbers[i] >= limit || met[numbers[i]]) return false;
    met[numbers[i]] = 1;
  }
  return true;
}

// carry_graph(vectors, dimension, earlier, node_now, entry, ef, out) -> count: writes the links of a
// changed corpus, and says how many of the nodes that stay were inserted again.
PyObject* carry_graph(PyObject*, PyObject* args) {
  PyObject *vectors_object, *earlier_object, *now_object, *out_object;
  Py_ssize_t dimension, entry, ef;
  Array vectors, earlier, now, out;
  if (!PyArg_ParseTuple(args, "OnOOnnO", &vectors_object, &dimension, &earlier_object, &now_object,
                        &entry, &ef, &out_object))
    return nullptr;
  if (!vectors.take(vectors_object, "vectors") || !earlier.take(earlier_object, "earlier") ||
      !now.take(now_object, "node_now") || !out.take(out_object, "out", true))
    return nullptr;
  if (dimension < 1 || dimension > most_dimensions)
    return refuse(PyExc_ValueError, "vectors cannot be that wide");
  const size_t width = size_t(dimension), count = vectors.bytes() / (4 * width);
  const size_t before = now.bytes() / 4, degree = count ? out.bytes() / (4 * count) : 0;
  if (count == 0 || count >= most_nodes || degree == 0 || vectors.bytes() != 4 * count * width ||
      out.bytes() != 4 * count * degree || earlier.bytes() != 4 * before * degree)
    return refuse(PyExc_ValueError, "vectors, earlier, node_now and out do not fit each other");
  if (ef < 1 || entry < 0 || size_t(entry) >= count)
    return refuse(PyExc_ValueError, "ef or entry is out of range");
  const uint32_t *links = earlier.as<uint32_t>(), *node_now = now.as<uint32_t>();
  if (std::any_of(links, links + before * degree, [&](uint32_t to) { return to >= before; }))
    return refuse(PyExc_ValueError, "a link points past the nodes");
  bool fits = false;
  size_t again = 0;
  const bool done = unlocked([&] {
    fits = are_distinct_nodes(node_now, before, count) &&
           std::find(node_now, node_now + before, uint32_t(entry)) != node_now + before;
    CarriedGraph graph(vectors.as<float>(), width, count, static_cast<uint32_t*>(out.view.buf),
                       degree);
    if (fits) again = graph.carry({links, node_now, before}, uint32_t(entry), size_t(ef));
  });
  if (!done) return nullptr;
  if (!fits) return refuse(PyExc_ValueError, "node_now names a node twice, or not the entry");
  return PyLong_FromSize_t(again);
}

// carry_link_records(vectors, dimension, graph, scale, earlier, node_now, ratio, out): writes the
// records of all links; those of links that are still there are copied from `earlier`.
PyObject* carry_link_records(PyObject*, PyObject* args) {
  PyObject *vectors_object, *graph_object, *earlier_object, *now_object, *out_object;
  Py_ssize_t dimension;
  double scale, ratio;
  Array vectors, graph, earlier, now, out;
  if (!PyArg_ParseTuple(args, "OnOdOOdO", &vectors_object, &dimension, &graph_object, &scale,
                        &earlier_object, &now_object, &ratio, &out_object))
    return nullptr;
  if (!vectors.take(vectors_object, "vectors") || !graph.take(graph_object, "graph") ||
      !earlier.take(earlier_object, "earlier") || !now.take(now_object, "node_now") ||
      !out.take(out_object, "out", true))
    return nullptr;
  if (dimension < 1 || dimension > most_dimensions)
    return refuse(PyExc_ValueError, "vectors cannot be that wide");
  const size_t width = size_t(dimension), count = vectors.bytes() / (4 * width);
  const size_t before = now.bytes() / 4;
  const LinkLayout layout{count ? graph.bytes() / (4 * count) : 0, (width + 63) / 64 * 64};
  if (count == 0 || layout.degree % block_rows || vectors.bytes() != 4 * count * width ||
      graph.bytes() != 4 * count * layout.degree || out.bytes() != count * layout.bytes() ||
      earlier.bytes() != before * layout.bytes())
    return refuse(PyExc_ValueError, "vectors, graph, earlier and out do not fit each other");
  const uint32_t* links = graph.as<uint32_t>();
  if (std::any_of(links, links + count * layout.degree, [&](uint32_t to) { return to >= count; }))
    return refuse(PyExc_ValueError, "a link points past the nodes");
  bool fits = false;
  const bool done = unlocked([&] {
    fits = are_distinct_nodes(now.as<uint32_t>(), before, count);
    const ScaledVectors scaled{vectors.as<float>(), width, float(scale)};
    const EarlierRecords records{earlier.as<uint8_t>(), now.as<uint32_t>(), before, float(ratio)};
    if (fits)
      carry_records(layout, scaled, records, links, count, static_cast<uint8_t*>(out.view.buf));
  });
  if (!done) return nullptr;
  if (!fits) return refuse(PyExc_ValueError, "node_now names a node twice");
  Py_RETURN_NONE;
}

PyMethodDef module_methods[] = {
    {"link_records", link_records, METH_VARARGS,
     "link_records(vectors, dimension, graph, scale, out)"},
    {"carry_graph", carry_graph, METH_VARARGS,
     "carry_graph(vectors, dimension, earlier, node_now, entry, ef, out) -> inserted again"},
    {"carry_link_records", carry_link_records, METH_VARARGS,
     "carry_link_records(vectors, dimension, graph, scale, earlier, node_now, ratio, out)"},
    {nullptr, nullptr, 0, nullptr}};

PyMethodDef engine_methods[] = {
    method("finish", engine_finish, "finish(nodes, distances, k, out, mask, hidden) -> ids"),
    method("scan", engine_scan, "scan(query, k, rows, out, hidden) -> (ids, scored)"),
    method("walk", engine_walk, "walk(query, k, ef, out, most, hidden) -> ids"),
    method("walk_batch", engine_walk_batch,
           "walk_batch(queries, k, ef, out, most, hidden) -> ids of each"),
    method("sketch", engine_sketch, "sketch(query, k, wanted, out, mask, hidden) -> ids"),
    method("nearest", engine_nearest, "nearest(query, k, ef, out_nodes, out_distances) -> count"),
    {nullptr, nullptr, 0, nullptr}};

PyTypeObject engine_type{};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_engine",
    "Scans and graph walks over 8-bit codes and one-bit sketches, and id mapping.",
    -1,
    module_methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__engine() {
  choose_kernels();
  choose_sketch_kernel();
  Py_SET_REFCNT(reinterpret_cast<PyObject*>(&engine_type), 1);
  engine_type.tp_name = "index_builder.native._engine.Engine";
  engine_type.tp_basicsize = sizeof(EngineObject);
  engine_type.tp_flags = Py_TPFLAGS_DEFAULT;
  engine_type.tp_doc =
      "Engine(vectors, dimension, blob, offsets, codes, graph, entry, node_of_row, row_starts, "
      "rows_by_node, sketch, factors, links, quantiser)";
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
