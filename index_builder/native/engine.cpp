// Searches that Python cannot make fast enough: scans that respect a filter, a graph walk over 8-bit codes, and mapping hits to ids.
//
// One Engine borrows (through the buffer protocol) the arrays of one entity type: float32 vectors, 8-bit codes, out-links, ids. It owns no data,
// writes none of it, and can be searched from many threads; searches release the interpreter lock.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "core.h"

namespace {

constexpr Py_ssize_t most_dimensions = 1 << 20;  // sizes in bytes stay far from overflowing

struct EngineObject {
  PyObject_HEAD
  Core* core;
};

void engine_dealloc(PyObject* self) {
  delete reinterpret_cast<EngineObject*>(self)->core;
  Py_TYPE(self)->tp_free(self);
}

PyObject* engine_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"vectors", "dimension", "blob", "offsets", "codes", "graph", "entry", "node_of_row", "row_starts", "rows_by_node", "sketch", "factors", "links", nullptr};
  PyObject *vectors, *blob, *offsets, *codes = Py_None, *graph = Py_None, *nodes = Py_None, *starts = Py_None, *rows = Py_None, *sketch = Py_None, *factors = Py_None, *links = Py_None;
  Py_ssize_t dimension;
  unsigned int entry = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OnOO|OOIOOOOOO", const_cast<char**>(names), &vectors, &dimension, &blob, &offsets, &codes, &graph, &entry,
                                   &nodes, &starts, &rows, &sketch, &factors, &links))
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
      !core->starts.take(starts, "row_starts") || !core->rows.take(rows, "rows_by_node") || !core->sketch.take(sketch, "sketch") ||
      !core->factors.take(factors, "factors") || !core->links.take(links, "links"))
    return refuse(nullptr);
  if (dimension < 1 || dimension > most_dimensions || core->vectors.bytes() % (size_t(dimension) * 4)) return refuse("vectors do not have that dimension");
  core->dimension = size_t(dimension);
  core->node_count = core->vectors.bytes() / (core->dimension * 4);
  core->row_count = core->nodes.held ? core->nodes.bytes() / 4 : core->node_count;
  core->stride = (core->dimension + 63) / 64 * 64;
  core->entry = entry;
  if (core->offsets.bytes() != (core->row_count + 1) * 8) return refuse("offsets do not fit the rows");
  if (core->offsets.as<uint64_t>()[core->row_count] > core->blob.bytes()) return refuse("offsets point past the ids");
  for (size_t i = 0; i < core->row_count; i++)
    if (core->offsets.as<uint64_t>()[i] > core->offsets.as<uint64_t>()[i + 1]) return refuse("offsets of ids are not ascending");
  if (!core->rows_fit_nodes()) return refuse("node_of_row, row_starts and rows_by_node do not fit each other");
  if (core->codes.held && core->codes.bytes() != core->node_count * core->stride) return refuse("codes do not fit the vectors");
  if (core->sketch.held) {
    const size_t blocks = (core->node_count + block_rows - 1) / block_rows;
    if (!core->codes.held || core->sketch.bytes() != blocks * core->stride * 4 || core->factors.bytes() != blocks * block_rows * 4)
      return refuse("sketches do not fit the vectors");
  }
  if (core->walks()) {
    const Array& held = core->links.held ? core->links : core->graph;
    const size_t unit = core->links.held ? block_rows * (8 + core->stride / 8) : 4;
    if (!core->codes.held || core->node_count == 0 || core->node_count >= most_nodes || held.bytes() == 0 || held.bytes() % (core->node_count * unit))
      return refuse("the graph does not fit the vectors");
    core->degree = held.bytes() / (core->node_count * unit) * (core->links.held ? block_rows : 1);
    core->layout = LinkLayout{core->degree, core->stride};
    if (entry >= core->node_count) return refuse("the entry is not a node");
    for (size_t node = 0; node < core->node_count; node++) {
      const uint32_t* out = reinterpret_cast<const uint32_t*>(core->out_links(uint32_t(node)));
      for (size_t i = 0; i < core->degree; i++)
        if (out[i] >= core->node_count) return refuse("a link points past the nodes");
    }
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
  if (r.query.bytes() != core.dimension * 4 || r.out.bytes() / 4 < r.k) {
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
  if (r.out.bytes() / 4 < r.k || r.list.bytes() != n * width || (width != 4 && width != 8))
    return PyErr_SetString(PyExc_ValueError, "nodes, distances or out have the wrong size"), nullptr;
  Scratch& s = scratch;
  auto node_at = [&](size_t i) { return width == 4 ? uint64_t(r.list.as<uint32_t>()[i]) : r.list.as<uint64_t>()[i]; };
  for (size_t i = 0; i < n; i++)
    if (node_at(i) >= core.node_count) return PyErr_SetString(PyExc_ValueError, "a node is out of range"), nullptr;
  const bool done = guarded([&] {
    s.hits.clear();
    for (size_t i = 0; core.starts.held && i < std::min(n, r.k); i++) __builtin_prefetch(core.starts.as<uint32_t>() + node_at(i));
    for (size_t i = 0; i < n && s.hits.size() < r.k; i++)
      core.add_rows(uint32_t(node_at(i)), 1.0f - 0.5f * r.distances.as<float>()[i], r.mask.as<uint8_t>(), r.hidden.as<uint8_t>(), s.hits);
    if (s.hits.size() > r.k) s.hits.resize(r.k);
  });
  if (!done) return PyErr_NoMemory();
  return core.answer(s, static_cast<float*>(r.out.view.buf));
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
  const bool done = unlocked([&] {
    uint32_t largest = 0;
    for (size_t i = 0; i < n; i++) largest = std::max(largest, chosen[i]);
    in_range = n == 0 || largest < core.row_count;
    if (in_range) core.scan(r.query.as<float>(), r.k, chosen, n, r.hidden.as<uint8_t>(), s);
  });
  if (!done) return nullptr;
  if (!in_range) return PyErr_SetString(PyExc_ValueError, "a row is out of range"), nullptr;
  return core.answer(s, static_cast<float*>(r.out.view.buf));
}

// walk(query, k, ef, out, most, hidden) -> ids: the graph walk over codes; its best `most` nodes are scored in float32, hidden ones left out.
PyObject* engine_walk(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const Core& core = *reinterpret_cast<EngineObject*>(self)->core;
  Request r;
  size_t ef = 0, most = 0;
  if (count != 6) return PyErr_SetString(PyExc_TypeError, "walk takes 6 arguments"), nullptr;
  if (!core.walks()) return PyErr_SetString(PyExc_ValueError, "this engine has no graph"), nullptr;
  if (!request(core, r, args[0], args[1], args[3]) || !positive(args[2], ef) || !positive(args[4], most) || !masks(core, r, nullptr, args[5]))
    return nullptr;
  Scratch& s = scratch;
  const bool done = unlocked([&] {
    core.walk(r.query.as<float>(), std::max(ef, r.k), s);
    core.refine(r.query.as<float>(), r.k, most, nullptr, r.hidden.as<uint8_t>(), s);
  });
  if (!done) return nullptr;
  return core.answer(s, static_cast<float*>(r.out.view.buf));
}

// walk_batch(queries, k, ef, out, most, hidden) -> a list of ids for each query: the graph walks of several queries, taking turns.
PyObject* engine_walk_batch(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const Core& core = *reinterpret_cast<EngineObject*>(self)->core;
  Request r;
  size_t ef = 0, most = 0;
  if (count != 6) return PyErr_SetString(PyExc_TypeError, "walk_batch takes 6 arguments"), nullptr;
  if (!core.walks()) return PyErr_SetString(PyExc_ValueError, "this engine has no graph"), nullptr;
  if (!r.query.take(args[0], "queries") || !positive(args[1], r.k) || !positive(args[2], ef) || !r.out.take(args[3], "out", true) ||
      !positive(args[4], most) || !masks(core, r, nullptr, args[5]))
    return nullptr;
  const size_t queries = r.query.bytes() / (core.dimension * 4);
  if (r.query.bytes() != queries * core.dimension * 4 || (queries > 0 && r.out.bytes() / 4 / queries < r.k))
    return PyErr_SetString(PyExc_ValueError, "the queries or the room for scores have the wrong size"), nullptr;
  std::vector<std::vector<Hit>> found;
  const float* first = r.query.as<float>();
  const bool done = unlocked([&] {
    found.resize(queries);
    core.walk_many(first, queries, std::max(ef, r.k), [&](size_t i, Scratch& s) {
      core.refine(first + i * core.dimension, r.k, most, nullptr, r.hidden.as<uint8_t>(), s);
      found[i] = s.hits;
    });
  });
  if (!done) return nullptr;
  PyObject* lists = PyList_New(Py_ssize_t(queries));
  for (size_t i = 0; lists != nullptr && i < queries; i++) {
    PyObject* ids = core.answer(found[i], static_cast<float*>(r.out.view.buf) + i * r.k);
    if (ids == nullptr) Py_CLEAR(lists);
    else PyList_SET_ITEM(lists, Py_ssize_t(i), ids);
  }
  return lists;
}

// sketch(query, k, wanted, out, mask, hidden) -> ids: all rows by sketches, the best `wanted` allowed ones by codes, the best of those in float32.
PyObject* engine_sketch(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const Core& core = *reinterpret_cast<EngineObject*>(self)->core;
  Request r;
  size_t wanted = 0;
  if (count != 6) return PyErr_SetString(PyExc_TypeError, "sketch takes 6 arguments"), nullptr;
  if (!core.sketch.held) return PyErr_SetString(PyExc_ValueError, "this engine has no sketches"), nullptr;
  if (!request(core, r, args[0], args[1], args[3]) || !positive(args[2], wanted) || !masks(core, r, args[4], args[5])) return nullptr;
  Scratch& s = scratch;
  const bool done = unlocked([&] {
    core.sketch_scan(r.query.as<float>(), r.k, std::max(wanted, 4 * r.k), r.mask.as<uint8_t>(), r.hidden.as<uint8_t>(), s);
    core.refine(r.query.as<float>(), r.k, s.pool.size(), r.mask.as<uint8_t>(), r.hidden.as<uint8_t>(), s);
  });
  if (!done) return nullptr;
  return core.answer(s, static_cast<float*>(r.out.view.buf));
}

// nearest(query, k, ef, out_nodes, out_distances) -> count: the unfiltered walk in nodes, for use as an AnnIndex.
PyObject* engine_nearest(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const Core& core = *reinterpret_cast<EngineObject*>(self)->core;
  Request r;
  size_t ef = 0;
  if (count != 5) return PyErr_SetString(PyExc_TypeError, "nearest takes 5 arguments"), nullptr;
  if (!core.walks()) return PyErr_SetString(PyExc_ValueError, "this engine has no graph"), nullptr;
  if (!request(core, r, args[0], args[1], args[4]) || !positive(args[2], ef) || !r.list.take(args[3], "out_nodes", true)) return nullptr;
  if (r.list.bytes() / 4 < r.k || r.out.bytes() / 4 < r.k) return PyErr_SetString(PyExc_ValueError, "no room for the nodes"), nullptr;
  Scratch& s = scratch;
  const bool done = unlocked([&] {
    core.walk(r.query.as<float>(), std::max(ef, r.k), s);
    core.score_nodes(r.query.as<float>(), std::max(2 * r.k, r.k + 16), s);
    Core::finish(r.k, s.hits);
  });
  if (!done) return nullptr;
  for (size_t i = 0; i < s.hits.size(); i++) {
    static_cast<uint32_t*>(r.list.view.buf)[i] = s.hits[i].row;
    static_cast<float*>(r.out.view.buf)[i] = 2.0f - 2.0f * s.hits[i].score;
  }
  return PyLong_FromSize_t(s.hits.size());
}

// link_records(vectors, dimension, graph, scale, out): the records of all links, into zeros.
PyObject* link_records(PyObject*, PyObject* args) {
  PyObject *vectors_object, *graph_object, *out_object;
  Py_ssize_t dimension;
  double scale;
  Array vectors, graph, out;
  if (!PyArg_ParseTuple(args, "OnOdO", &vectors_object, &dimension, &graph_object, &scale, &out_object)) return nullptr;
  if (!vectors.take(vectors_object, "vectors") || !graph.take(graph_object, "graph") || !out.take(out_object, "out", true)) return nullptr;
  if (dimension > most_dimensions) return PyErr_SetString(PyExc_ValueError, "vectors cannot be that wide"), nullptr;
  const size_t width = size_t(dimension), count = dimension > 0 ? vectors.bytes() / (4 * width) : 0;
  const LinkLayout layout{count ? graph.bytes() / (4 * count) : 0, (width + 63) / 64 * 64};
  if (count == 0 || layout.degree % block_rows || out.bytes() != count * layout.bytes() || graph.bytes() != count * layout.degree * 4)
    return PyErr_SetString(PyExc_ValueError, "vectors, graph and out do not fit each other"), nullptr;
  const uint32_t* links = graph.as<uint32_t>();
  for (size_t i = 0; i < count * layout.degree; i++)
    if (links[i] >= count) return PyErr_SetString(PyExc_ValueError, "a link points past the nodes"), nullptr;
  Py_BEGIN_ALLOW_THREADS
  for (size_t node = 0; node < count; node++)
    write_links(layout, vectors.as<float>(), width, uint32_t(node), links + node * layout.degree, float(scale),
                static_cast<uint8_t*>(out.view.buf) + node * layout.bytes());
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

PyMethodDef module_methods[] = {{"link_records", link_records, METH_VARARGS, "link_records(vectors, dimension, graph, scale, out)"}, {nullptr, nullptr, 0, nullptr}};

PyMethodDef engine_methods[] = {
    {"finish", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(engine_finish)), METH_FASTCALL, "finish(nodes, distances, k, out, mask, hidden) -> ids"},
    {"scan", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(engine_scan)), METH_FASTCALL, "scan(query, k, rows, out, hidden) -> ids"},
    {"walk", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(engine_walk)), METH_FASTCALL, "walk(query, k, ef, out, most, hidden) -> ids"},
    {"walk_batch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(engine_walk_batch)), METH_FASTCALL, "walk_batch(queries, k, ef, out, most, hidden) -> ids of each"},
    {"sketch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(engine_sketch)), METH_FASTCALL, "sketch(query, k, wanted, out, mask, hidden) -> ids"},
    {"nearest", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(engine_nearest)), METH_FASTCALL, "nearest(query, k, ef, out_nodes, out_distances) -> count"},
    {nullptr, nullptr, 0, nullptr}};

PyTypeObject engine_type{};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_engine", "8-bit scans, filter-aware graph walks and id mapping.", -1, module_methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__engine() {
  choose_kernels();
  choose_sketch_kernel();
  Py_SET_REFCNT(reinterpret_cast<PyObject*>(&engine_type), 1);
  engine_type.tp_name = "index_builder.native._engine.Engine";
  engine_type.tp_basicsize = sizeof(EngineObject);
  engine_type.tp_flags = Py_TPFLAGS_DEFAULT;
  engine_type.tp_doc = "Engine(vectors, dimension, blob, offsets, codes, graph, entry, node_of_row, row_starts, rows_by_node, sketch, factors, links)";
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
