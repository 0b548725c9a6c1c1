// The k smallest of each cluster, by (key, row).
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "kmeans/clusters.h"

namespace fastif {

// Calls found(cluster, place, row, key) for places 0, 1, ... of each cluster, at most k of them.
template <class KeyOf, class Found>
void smallest_of_clusters(const int64_t* labels, int64_t rows, int64_t clusters, int64_t k,
                          const Pool& pool, KeyOf key_of, Found found) {
  const Clusters groups = group_rows(labels, rows, clusters);
  parallel_tasks(pool, clusters, [&](int64_t j) {
    using Key = decltype(key_of(int64_t{}));
    std::vector<std::pair<Key, int64_t>> members;
    members.reserve(groups.start[j + 1] - groups.start[j]);
    for (int64_t i = groups.start[j]; i < groups.start[j + 1]; ++i) {
      members.emplace_back(key_of(groups.order[i]), groups.order[i]);
    }
    const int64_t kept = std::min(k, int64_t(members.size()));
    std::partial_sort(members.begin(), members.begin() + kept, members.end());
    for (int64_t place = 0; place < kept; ++place) {
      found(j, place, members[place].second, members[place].first);
    }
  });
}

}  // namespace fastif
