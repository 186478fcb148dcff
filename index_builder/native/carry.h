// Carries a graph over to a changed corpus: links between nodes that stay are kept, links to nodes
// that are gone are replaced by links to what these led to (as FreshDiskANN consolidates deletes;
// Singh et al., 2021), and new nodes are inserted by a search, as HNSW inserts into one layer.
//
// The same arguments give the same links.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "links.h"
#include "shared.h"

namespace {

constexpr uint32_t gone = ~uint32_t(0);

// A graph of the earlier corpus, and the number in the changed corpus of each of its nodes.
struct EarlierGraph {
  const uint32_t* links;
  const uint32_t* node_now;  // `gone` where there is none
  size_t count;
};

class CarriedGraph {
 public:
  // `links`: degree numbers for each of `count` nodes, written by `carry`; a free place holds the
  // number of the node itself.
  CarriedGraph(const float* vectors, size_t dimension, size_t count, uint32_t* links, size_t degree)
      : vectors_(vectors), dimension_(dimension), count_(count), links_(links), degree_(degree) {}

  // Writes all links. `entry` is a node that stays, from which new nodes look for neighbours among
  // `ef` candidates. Returns how many nodes that stay were inserted again, for lack of links to
  // them.
  size_t carry(const EarlierGraph& earlier, uint32_t entry, size_t ef) {
    for (size_t node = 0; node < count_; node++)
      std::fill_n(row(uint32_t(node)), degree_, uint32_t(node));
    std::vector<uint8_t> stays(count_, 0);
    for (size_t old = 0; old < earlier.count; old++) {
      if (earlier.node_now[old] == gone) continue;
      stays[earlier.node_now[old]] = 1;
      keep_links(earlier, uint32_t(old));
    }
    incoming_.assign(count_, 0);
    for (size_t node = 0; node < count_; node++)
      for (size_t i = 0; i < degree_; i++)
        if (row(uint32_t(node))[i] != node) incoming_[row(uint32_t(node))[i]]++;
    seen_.assign(count_, 0);
    size_t again = 0;
    for (size_t node = 0; node < count_; node++)
      if (stays[node] && incoming_[node] == 0 && node != entry) {
        insert(uint32_t(node), entry, ef);
        again++;
      }
    for (size_t node = 0; node < count_; node++)
      if (!stays[node]) insert(uint32_t(node), entry, ef);
    return again;
  }

 private:
  struct Near {
    float score;
    uint32_t node;
    bool followed;
  };
  static bool nearer(const Near& a, const Near& b) {
    return a.score > b.score || (a.score == b.score && a.node < b.node);
  }

  uint32_t* row(uint32_t node) { return links_ + size_t(node) * degree_; }
  const float* vector(uint32_t node) const { return vectors_ + size_t(node) * dimension_; }
  float score(uint32_t a, uint32_t b) const { return float_dot(vector(a), vector(b), dimension_); }
  void prefetch(uint32_t node) const {
    for (size_t i = 0; i < dimension_; i += 16) __builtin_prefetch(vector(node) + i);
  }
  bool links_to(uint32_t node, uint32_t target) {
    const uint32_t* out = row(node);
    return std::find(out, out + degree_, target) != out + degree_;
  }

  // Copies the links of a node that stays, and fills the places of those that led to nodes that are
  // gone with the nearest nodes that these led to: first such that are nearer to this node than to
  // any of its links.
  void keep_links(const EarlierGraph& earlier, uint32_t old) {
    const uint32_t* before = earlier.links + size_t(old) * degree_;
    const uint32_t node = earlier.node_now[old];
    uint32_t* out = row(node);
    lost_.clear();
    for (size_t i = 0; i < degree_; i++) {
      const uint32_t now = earlier.node_now[before[i]];
      if (now == gone)
        lost_.push_back(i);
      else
        out[i] = now;
    }
    if (lost_.empty()) return;
    pool_.clear();
    for (size_t place : lost_) {
      const uint32_t* beyond = earlier.links + size_t(before[place]) * degree_;
      for (size_t i = 0; i < degree_; i++) {
        const uint32_t now = earlier.node_now[beyond[i]];
        if (now == gone || now == node || links_to(node, now)) continue;
        if (std::none_of(pool_.begin(), pool_.end(), [&](const Near& n) { return n.node == now; }))
          pool_.push_back(Near{score(node, now), now, false});
      }
    }
    std::sort(pool_.begin(), pool_.end(), nearer);
    size_t filled = 0;
    for (const bool any : {false, true})
      for (Near& candidate : pool_) {
        if (filled == lost_.size()) return;
        if (candidate.followed || (!any && occluded(candidate, node, out))) continue;
        candidate.followed = true;
        out[lost_[filled++]] = candidate.node;
      }
  }

  // Whether a node is nearer to one of the links of another than to that node itself.
  bool occluded(const Near& candidate, uint32_t node, const uint32_t* links) const {
    for (size_t i = 0; i < degree_; i++)
      if (links[i] != node && score(links[i], candidate.node) > candidate.score) return true;
    return false;
  }

  // Finds the `ef` nodes nearest to a node, best first, into the pool; never the node itself.
  void search(uint32_t node, uint32_t entry, size_t ef) {
    if (++epoch_ == 0) {
      std::fill(seen_.begin(), seen_.end(), 0u);
      epoch_ = 1;
    }
    seen_[node] = seen_[entry] = epoch_;
    pool_.clear();
    pool_.push_back(Near{score(node, entry), entry, false});
    for (size_t at = 0; at < pool_.size();) {
      if (pool_[at].followed) {
        at++;
        continue;
      }
      pool_[at].followed = true;
      fresh_.clear();
      const uint32_t* out = row(pool_[at].node);
      for (size_t i = 0; i < degree_; i++) {
        if (seen_[out[i]] == epoch_) continue;
        seen_[out[i]] = epoch_;
        prefetch(out[i]);
        fresh_.push_back(out[i]);
      }
      for (uint32_t target : fresh_) {
        const Near found{score(node, target), target, false};
        if (pool_.size() == ef) {
          if (!nearer(found, pool_.back())) continue;
          pool_.pop_back();
        }
        const auto place = std::lower_bound(pool_.begin(), pool_.end(), found, nearer);
        at = std::min(at, size_t(place - pool_.begin()));
        pool_.insert(place, found);
      }
    }
  }

  // Links a node with its nearest neighbours, both ways.
  void insert(uint32_t node, uint32_t entry, size_t ef) {
    search(node, entry, ef);
    for (Near& candidate : pool_) candidate.followed = false;
    uint32_t* out = row(node);
    if (std::count(out, out + degree_, node) == long(degree_)) {
      size_t filled = 0;
      for (const bool any : {false, true})
        for (Near& candidate : pool_) {
          if (filled == degree_) break;
          if (candidate.followed || (!any && occluded(candidate, node, out))) continue;
          candidate.followed = true;
          incoming_[candidate.node]++;
          out[filled++] = candidate.node;
        }
    }
    if (pool_.empty()) return;
    nearest_ = pool_;
    for (const Near& candidate : nearest_)
      if (links_to(node, candidate.node)) link_back(candidate.node, node, false);
    if (incoming_[node] == 0) link_back(nearest_.front().node, node, true);
  }

  // Adds a link from a node to a new one: in a free place, or for the farthest link that is
  // occluded, which may be the new one unless `must`. A last link to a node stays.
  void link_back(uint32_t node, uint32_t added, bool must) {
    uint32_t* out = row(node);
    if (links_to(node, added)) return;
    for (size_t i = 0; i < degree_; i++)
      if (out[i] == node) {
        out[i] = added;
        incoming_[added]++;
        return;
      }
    pool_.clear();
    for (size_t i = 0; i < degree_; i++) prefetch(out[i]);
    for (size_t i = 0; i < degree_; i++) pool_.push_back(Near{score(node, out[i]), out[i], false});
    pool_.push_back(Near{score(node, added), added, false});
    std::sort(pool_.begin(), pool_.end(), nearer);
    uint32_t dropped = gone;
    for (size_t far = pool_.size(); far-- > 1 && dropped == gone;) {
      if (is_needed(pool_[far].node, added, must)) continue;
      for (size_t i = 0; i < far; i++)
        if (score(pool_[far].node, pool_[i].node) > pool_[far].score) {
          dropped = pool_[far].node;
          break;
        }
    }
    for (size_t far = pool_.size(); far-- > 0 && dropped == gone;)
      if (!is_needed(pool_[far].node, added, must)) dropped = pool_[far].node;
    if (dropped == gone || dropped == added) return;
    incoming_[dropped]--;
    incoming_[added]++;
    *std::find(out, out + degree_, dropped) = added;
  }

  bool is_needed(uint32_t target, uint32_t added, bool must) const {
    return target == added ? must : incoming_[target] <= 1;
  }

  const float* vectors_;
  size_t dimension_, count_;
  uint32_t* links_;
  size_t degree_;
  std::vector<uint32_t> incoming_, seen_, fresh_;
  std::vector<size_t> lost_;
  std::vector<Near> pool_, nearest_;
  uint32_t epoch_ = 0;
};

// Records of links that were written for an earlier corpus.
struct EarlierRecords {
  const uint8_t* first;
  const uint32_t* node_now;  // number in the changed corpus of each earlier node, or `gone`
  size_t count;
  float ratio;  // of the scale now to the scale then
};

// Writes the records of `graph`: what earlier records say of links that are still there is copied.
inline void carry_records(const LinkLayout& layout, const ScaledVectors& vectors,
                          const EarlierRecords& earlier, const uint32_t* graph, size_t count,
                          uint8_t* records) {
  std::vector<uint8_t> stays(count, 0);
  for (size_t old = 0; old < earlier.count; old++) {
    const uint32_t node = earlier.node_now[old];
    if (node == gone) continue;
    stays[node] = 1;
    const uint8_t* before = earlier.first + old * layout.bytes();
    uint8_t* record = records + size_t(node) * layout.bytes();
    const uint32_t* targets = graph + size_t(node) * layout.degree;
    std::memcpy(record, before, layout.bytes());
    std::memcpy(record, targets, layout.degree * 4);
    float* factors = reinterpret_cast<float*>(record + layout.factors_at());
    for (size_t i = 0; i < layout.degree; i++) {
      const uint32_t target = reinterpret_cast<const uint32_t*>(before)[i];
      if (target < earlier.count && earlier.node_now[target] == targets[i])
        factors[i] *= earlier.ratio;
      else
        write_link(layout, vectors, node, targets, i, record);
    }
  }
  for (size_t node = 0; node < count; node++)
    if (!stays[node])
      write_links(layout, vectors, uint32_t(node), graph + node * layout.degree,
                  records + node * layout.bytes());
}

}  // namespace
