// One-bit sketches of vectors, scored for 32 rows at a time.
//
// A row's sketch has one sign bit a dimension. Four dimensions make a nibble; 32 rows make a block,
// in which byte j of 16 holds the nibble of row j (low) and of row j + 16 (high). The query becomes
// a table of 16 bytes a nibble, and a shuffle looks up all rows of a block at once (FastScan).
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "shared.h"

namespace {

constexpr size_t block_rows = 32;

// A query as sums of entries, one for each nibble: inner product = step * sum + low.
struct SketchTable {
  std::vector<uint8_t> entries;  // 16 for each nibble
  size_t nibbles = 0;
  float step = 0.0f, low = 0.0f;
  void fill(const float* query, size_t dimension, size_t stride, float scale);
};

// Entry i of a nibble: the inner product of `scale` times its four components of the query with the
// signs that i stands for.
inline void SketchTable::fill(const float* query, size_t dimension, size_t stride, float scale) {
  nibbles = stride / 4;
  // Sums must fit 16 bits, although each entry may be rounded up.
  const float most = std::min(255.0f, std::floor(65535.0f / float(nibbles)) - 1);
  entries.assign(nibbles * 16, 0);
  uint8_t* __restrict entry = entries.data();
  float widest = 1e-12f, lowest = 0.0f;
  for (size_t i = 0; i < dimension; i += 4) {
    float width = 0.0f;
    for (size_t j = i; j < std::min(i + 4, dimension); j++) width += std::fabs(query[j]);
    widest = std::max(widest, 2.0f * width);
    lowest -= width;
  }
  const float steps = most / widest;
  for (size_t g = 0; 4 * g < dimension; g++) {
    float value[16] = {0.5f};  // for rounding; the lowest sum of these signs is 0
    for (size_t j = 0; j < 4; j++) {
      const float part = 4 * g + j < dimension ? query[4 * g + j] * steps : 0.0f;
      if (part < 0.0f) value[0] -= 2.0f * part;
    }
    for (size_t j = 0; j < 4; j++) {
      const float part = 4 * g + j < dimension ? query[4 * g + j] * steps : 0.0f;
      for (size_t i = 0; i < size_t(1) << j; i++)
        value[(size_t(1) << j) + i] = value[i] + 2.0f * part;
    }
    for (size_t i = 0; i < 16; i++)
      entry[g * 16 + i] = uint8_t(std::min(255, std::max(0, int32_t(value[i]))));
  }
  step = scale * widest / most;
  low = scale * lowest;
}

// Writes the 32 scores of a block, score = factor * (step * sum of entries + low), and returns a
// bit for each that is above the threshold.
using SketchBlock = uint32_t (*)(const uint8_t* bits, const SketchTable& query,
                                 const float* factors, float threshold, float* scores);

inline uint32_t sketch_block_plain(const uint8_t* bits, const SketchTable& query,
                                   const float* factors, float threshold, float* scores) {
  const uint8_t* entries = query.entries.data();
  const size_t nibbles = query.nibbles;
  uint16_t sums[block_rows] = {0};
  for (size_t g = 0; g < nibbles; g++)
    for (size_t j = 0; j < 16; j++) {
      sums[j] = uint16_t(sums[j] + entries[g * 16 + (bits[g * 16 + j] & 15)]);
      sums[j + 16] = uint16_t(sums[j + 16] + entries[g * 16 + (bits[g * 16 + j] >> 4)]);
    }
  const float step = query.step, low = query.low;
  uint32_t above = 0;
  for (size_t j = 0; j < block_rows; j++) {
    scores[j] = factors[j] * (step * float(sums[j]) + low);
    above |= uint32_t(scores[j] > threshold) << j;
  }
  return above;
}

#ifdef OMNI_X86
__attribute__((target("avx2,fma"))) inline uint32_t sketch_block_avx2(const uint8_t* bits,
                                                                      const SketchTable& query,
                                                                      const float* factors,
                                                                      float threshold,
                                                                      float* scores) {
  const uint8_t* table = query.entries.data();
  const size_t nibbles = query.nibbles;
  const __m256 step = _mm256_set1_ps(query.step), low = _mm256_set1_ps(query.low),
               least = _mm256_set1_ps(threshold);
  const __m256i nibble = _mm256_set1_epi8(15);
  // Bytes are added as 16-bit numbers: `all` also holds the odd bytes times 256, which is
  // subtracted at the end.
  __m256i low_all = _mm256_setzero_si256(), low_odd = low_all, high_all = low_all,
          high_odd = low_all;
  for (size_t g = 0; g < nibbles; g += 2) {
    __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits + g * 16));
    __m256i entries = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table + g * 16));
    __m256i a = _mm256_shuffle_epi8(entries, _mm256_and_si256(codes, nibble));
    __m256i b = _mm256_shuffle_epi8(entries, _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble));
    low_all = _mm256_add_epi16(low_all, a);
    low_odd = _mm256_add_epi16(low_odd, _mm256_srli_epi16(a, 8));
    high_all = _mm256_add_epi16(high_all, b);
    high_odd = _mm256_add_epi16(high_odd, _mm256_srli_epi16(b, 8));
  }
  alignas(32) uint16_t sums[block_rows];
  auto store = [&](__m256i all, __m256i odd, uint16_t* out) __attribute__((target("avx2,fma"))) {
    __m256i even = _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8));
    __m128i e = _mm_add_epi16(_mm256_castsi256_si128(even), _mm256_extracti128_si256(even, 1));
    __m128i o = _mm_add_epi16(_mm256_castsi256_si128(odd), _mm256_extracti128_si256(odd, 1));
    _mm_store_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi16(e, o));
    _mm_store_si128(reinterpret_cast<__m128i*>(out + 8), _mm_unpackhi_epi16(e, o));
  };
  store(low_all, low_odd, sums);
  store(high_all, high_odd, sums + 16);
  uint32_t above = 0;
  for (size_t j = 0; j < block_rows; j += 8) {
    __m256 sum = _mm256_cvtepi32_ps(
        _mm256_cvtepu16_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(sums + j))));
    __m256 score = _mm256_mul_ps(_mm256_loadu_ps(factors + j), _mm256_fmadd_ps(step, sum, low));
    _mm256_storeu_ps(scores + j, score);
    above |= uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(score, least, _CMP_GT_OQ))) << j;
  }
  return above;
}

__attribute__((target("avx512f,avx512bw,avx2,fma"))) inline uint32_t sketch_block_avx512(
    const uint8_t* bits, const SketchTable& query, const float* factors, float threshold,
    float* scores) {
  const uint8_t* table = query.entries.data();
  const size_t nibbles = query.nibbles;
  const __m512 step = _mm512_set1_ps(query.step), low = _mm512_set1_ps(query.low),
               least = _mm512_set1_ps(threshold);
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i low_all = _mm512_setzero_si512(), low_odd = low_all, high_all = low_all,
          high_odd = low_all;
  for (size_t g = 0; g < nibbles; g += 4) {
    __m512i codes = _mm512_loadu_si512(bits + g * 16), entries = _mm512_loadu_si512(table + g * 16);
    __m512i a = _mm512_shuffle_epi8(entries, _mm512_and_si512(codes, nibble));
    __m512i b = _mm512_shuffle_epi8(entries, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble));
    low_all = _mm512_add_epi16(low_all, a);
    low_odd = _mm512_add_epi16(low_odd, _mm512_srli_epi16(a, 8));
    high_all = _mm512_add_epi16(high_all, b);
    high_odd = _mm512_add_epi16(high_odd, _mm512_srli_epi16(b, 8));
  }
  uint32_t above = 0;
  for (size_t half = 0; half < 2; half++) {
    __m512i odd = half ? high_odd : low_odd;
    __m512i even = _mm512_sub_epi16(half ? high_all : low_all, _mm512_slli_epi16(odd, 8));
    __m256i e2 = _mm256_add_epi16(_mm512_castsi512_si256(even), _mm512_extracti64x4_epi64(even, 1));
    __m256i o2 = _mm256_add_epi16(_mm512_castsi512_si256(odd), _mm512_extracti64x4_epi64(odd, 1));
    __m128i e = _mm_add_epi16(_mm256_castsi256_si128(e2), _mm256_extracti128_si256(e2, 1));
    __m128i o = _mm_add_epi16(_mm256_castsi256_si128(o2), _mm256_extracti128_si256(o2, 1));
    __m256i sums = _mm256_set_m128i(_mm_unpackhi_epi16(e, o), _mm_unpacklo_epi16(e, o));
    __m512 sum = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(sums));
    __m512 score =
        _mm512_mul_ps(_mm512_loadu_ps(factors + 16 * half), _mm512_fmadd_ps(step, sum, low));
    _mm512_storeu_ps(scores + 16 * half, score);
    above |= uint32_t(_mm512_cmp_ps_mask(score, least, _CMP_GT_OQ)) << (16 * half);
  }
  return above;
}
#endif

SketchBlock sketch_block = sketch_block_plain;

void choose_sketch_kernel() {
#ifdef OMNI_X86
  const Simd allowed = allowed_simd();
  if (allowed == Simd::plain) return;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    sketch_block = sketch_block_avx2;
  if (allowed == Simd::avx2) return;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"))
    sketch_block = sketch_block_avx512;
#endif
}

}  // namespace
