// cub compiles slowly: this is the one file that includes it.
#include "common/device_sort.h"

#include "common/launch.h"

#ifdef __CUDACC__
#include <cub/device/device_radix_sort.cuh>
#else
#include <numeric>
#include <vector>
#endif

namespace fastif {

template <class Key>
void sort_pairs(const char* op, [[maybe_unused]] const Gpu& gpu, Pairs<Key>& pairs, int bits) {
  if (pairs.count == 0 || bits == 0) return;
#ifdef __CUDACC__
  cub::DoubleBuffer<Key> keys(pairs.keys, pairs.spare_keys);
  cub::DoubleBuffer<uint32_t> rows(pairs.rows, pairs.spare_rows);
  // The type of the count is that of offsets in cub's kernels; with this one no registers spill.
  size_t bytes = 0;
  void* memory = nullptr;  // the first call says how much it needs
  for (int call = 0; call < 2; ++call) {
    check_cuda(op, cub::DeviceRadixSort::SortPairs(memory, bytes, keys, rows, Key(pairs.count), 0,
                                                   bits, static_cast<cudaStream_t>(gpu.stream)));
    if (call == 0) memory = gpu.scratch<unsigned char>(int64_t(bytes));
  }
  if (keys.Current() != pairs.keys) pairs.swap();
#else
  std::vector<int64_t> order(pairs.count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return pairs.keys[a] < pairs.keys[b]; });
  for (int64_t i = 0; i < pairs.count; ++i) {
    if (pairs.keys[i] >> (bits - 1) > 1) {
      std::fprintf(stderr, "%s: a key has more than %d bits\n", op, bits);
      std::abort();
    }
    pairs.spare_keys[i] = pairs.keys[order[i]];
    pairs.spare_rows[i] = pairs.rows[order[i]];
  }
  pairs.swap();
#endif
}

template void sort_pairs(const char*, const Gpu&, Pairs<uint32_t>&, int);
template void sort_pairs(const char*, const Gpu&, Pairs<uint64_t>&, int);

}  // namespace fastif
