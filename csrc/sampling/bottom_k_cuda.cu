#include "sampling/bottom_k.h"

#include "sampling/draw_weights_cuda.h"

namespace fastif {

template <class T>
void bottom_k_cuda(const Weights<T>& weights, const Draw& draw, const Sample& sample,
                   const Gpu& gpu) {
  constexpr const char* kOp = "bottom_k";
  unsigned long long* bad = gpu.scratch<unsigned long long>(1);
  fill_bytes(kOp, gpu, bad, 0xff, sizeof(*bad));
  draw_weights_cuda(kOp, weights, draw, {sample, nullptr, draw.row_offset}, bad, nullptr, gpu);
}

template void bottom_k_cuda(const Weights<float>&, const Draw&, const Sample&, const Gpu&);
template void bottom_k_cuda(const Weights<double>&, const Draw&, const Sample&, const Gpu&);
template void bottom_k_cuda(const Weights<Half>&, const Draw&, const Sample&, const Gpu&);
template void bottom_k_cuda(const Weights<BFloat16>&, const Draw&, const Sample&, const Gpu&);

}  // namespace fastif
