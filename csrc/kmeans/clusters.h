// Rows grouped by label: the rows of cluster j are order[start[j]] ... order[start[j + 1] - 1], in
// ascending order. Rows with label -1 are in no group.
#pragma once

#include <cstdint>
#include <vector>

namespace fastif {

struct Clusters {
  std::vector<int64_t> start, order;
  int64_t bad_row = -1;  // the first row whose label is not in [-1, clusters); nothing is grouped
};

inline Clusters group_rows(const int64_t* labels, int64_t rows, int64_t clusters) {
  Clusters groups;
  groups.start.assign(clusters + 1, 0);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t label = labels[i];
    if (label < -1 || label >= clusters) {
      groups.bad_row = i;
      return groups;
    }
    if (label >= 0) ++groups.start[label + 1];
  }
  for (int64_t j = 0; j < clusters; ++j) groups.start[j + 1] += groups.start[j];
  groups.order.resize(groups.start[clusters]);
  std::vector<int64_t> next(groups.start.begin(), groups.start.end() - 1);
  for (int64_t i = 0; i < rows; ++i) {
    if (labels[i] >= 0) groups.order[next[labels[i]]++] = i;
  }
  return groups;
}

}  // namespace fastif
