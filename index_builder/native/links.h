// Links that carry a one-bit sketch of where they lead, so that a walk reads the codes of promising
// nodes only.
//
// A node's record holds its out-links, a factor for each, and blocks of sketches laid out as in
// sketch.h. A link's sketch is that of the *difference* of the two vectors: the score of the node
// itself is known when its links are followed, and the difference is shorter than the vector (as in
// SymphonyQG; Gou et al., SIGMOD 2025).
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "shared.h"
#include "sketch.h"

namespace {

// Offsets inside a node's record. The degree is a multiple of block_rows, the stride one of 64.
struct LinkLayout {
  size_t degree = 0, stride = 0;
  size_t factors_at() const { return degree * 4; }
  size_t bits_at() const { return degree * 8; }
  size_t bytes() const { return degree * 8 + degree * stride / 8; }
};

// Vectors, and what their components are multiplied by to become codes.
struct ScaledVectors {
  const float* first;
  size_t dimension;
  float scale;
  const float* at(uint32_t node) const { return first + size_t(node) * dimension; }
};

// Writes factor and sketch of one link into the record of a node.
inline void write_link(const LinkLayout& layout, const ScaledVectors& vectors, uint32_t node,
                       const uint32_t* targets, size_t link, uint8_t* record) {
  float* factors = reinterpret_cast<float*>(record + layout.factors_at());
  const float *own = vectors.at(node), *other = vectors.at(targets[link]);
  uint8_t* bits = record + layout.bits_at() + link / block_rows * block_rows * layout.stride / 8;
  const size_t at = link % 16, shift = link % block_rows < 16 ? 0 : 4;
  float squares = 0.0f, width = 0.0f;
  for (size_t i = 0; i < vectors.dimension; i++) {
    const float part = other[i] - own[i];
    squares += part * part;
    width += std::fabs(part);
    const unsigned bit = 1u << (i % 4 + shift);
    uint8_t& byte = bits[i / 4 * 16 + at];
    byte = uint8_t(part > 0.0f ? byte | bit : byte & ~bit);
  }
  factors[link] = width > 0.0f ? vectors.scale * squares / width : 0.0f;
}

// Writes the record of one node; factors are in units of codes, and padding stays as it is.
inline void write_links(const LinkLayout& layout, const ScaledVectors& vectors, uint32_t node,
                        const uint32_t* targets, uint8_t* record) {
  std::memcpy(record, targets, layout.degree * 4);
  for (size_t link = 0; link < layout.degree; link++)
    write_link(layout, vectors, node, targets, link, record);
}

}  // namespace
