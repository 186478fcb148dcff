// Shared by the compiled modules: inner products chosen once for this CPU, and arrays borrowed
// through the buffer protocol.
//
// Everything here is local to the module that includes it; include it once, after Python.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#define OMNI_X86 1
#endif

namespace {

// ---- inner products, chosen once for this CPU

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
__attribute__((target("avx512f,avx512bw,avx512vnni"))) int32_t code_dot_vnni(const uint8_t* a,
                                                                             const int8_t* b,
                                                                             size_t n) {
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

__attribute__((target("avx512f"))) float float_dot_avx512(const float* a, const float* b,
                                                          size_t n) {
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
  for (; i + 8 <= n; i += 8)
    sum8 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), sum8);
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, sum8);
  float sum = 0;
  for (float lane : lanes) sum += lane;
  for (; i < n; i++) sum += a[i] * b[i];
  return sum;
}
#endif

// Instruction sets that kernels may use where this CPU has them: fewer if OMNI_SIMD says so.
enum class Simd { plain, avx2, avx512 };

[[maybe_unused]] Simd allowed_simd() {
  const char* name = std::getenv("OMNI_SIMD");
  if (name != nullptr && std::strcmp(name, "plain") == 0) return Simd::plain;
  if (name != nullptr && std::strcmp(name, "avx2") == 0) return Simd::avx2;
  return Simd::avx512;
}

CodeDot code_dot = code_dot_plain;
FloatDot float_dot = float_dot_plain;
const char* simd_name = "plain";

void choose_kernels() {
#ifdef OMNI_X86
  const Simd allowed = allowed_simd();
  if (allowed == Simd::plain) return;
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    code_dot = code_dot_avx2;
    float_dot = float_dot_avx2;
    simd_name = "avx2";
  }
  if (allowed == Simd::avx2) return;
  if (__builtin_cpu_supports("avx512f")) float_dot = float_dot_avx512;
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")) {
    code_dot = code_dot_vnni;
    simd_name = "avx512vnni";
  }
#endif
}

// ---- borrowed arrays

// A borrowed array; empty where None was given.
struct Array {
  Py_buffer view{};
  bool held = false;
  template <class T>
  const T* as() const {
    return held ? static_cast<const T*>(view.buf) : nullptr;
  }
  size_t bytes() const { return held ? size_t(view.len) : 0; }
  // Borrows `object`, or nothing if it is None; on failure a TypeError is set.
  bool take(PyObject* object, const char* what, bool writable = false) {
    if (object == nullptr || object == Py_None) return true;
    if (PyObject_GetBuffer(object, &view,
                           writable ? (PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) : PyBUF_C_CONTIGUOUS) !=
        0) {
      PyErr_Format(PyExc_TypeError, "%s must be a C-contiguous array%s", what,
                   writable ? " that can be written" : "");
      return false;
    }
    held = true;
    return true;
  }
  ~Array() {
    if (held) PyBuffer_Release(&view);
  }
};

// ---- buffers

// Empties a buffer that one large search widened: threads live as long as the process.
template <class T>
void trim(std::vector<T>& buffer) {
  constexpr size_t kept_bytes = 1 << 20;
  if (buffer.capacity() * sizeof(T) > kept_bytes) std::vector<T>().swap(buffer);
}

// ---- errors

// Sets an error and returns null.
PyObject* refuse(PyObject* error, const char* message) {
  PyErr_SetString(error, message);
  return nullptr;
}

// Runs `work` and returns whether it finished. An exception (memory is short) must not reach the
// interpreter, which would end the process.
template <class Work>
bool guarded(Work work) {
  try {
    work();
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

// The same without the interpreter's lock; sets a MemoryError on failure.
template <class Work>
bool unlocked(Work work) {
  bool done;
  Py_BEGIN_ALLOW_THREADS done = guarded(work);
  Py_END_ALLOW_THREADS if (!done) PyErr_NoMemory();
  return done;
}

// ---- methods

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef method(const char* name, FastCall call, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL,
          doc};
}

}  // namespace
