#include "sampling/curvature_multinomial.h"

#include "sampling/draw_weights_cuda.h"

namespace fastif {

template <class T>
void curvature_multinomial_cuda(const CurvatureSizes<T>& task, float floor, const Draw& draw,
                                const Sample& sample, int64_t* skipped, const Gpu& gpu) {
  constexpr const char* kOp = "curvature_multinomial";
  unsigned long long* flags = gpu.scratch<unsigned long long>(2);  // bad, skipped
  fill_bytes(kOp, gpu, flags, 0xff, sizeof(*flags));
  fill_bytes(kOp, gpu, flags + 1, 0, sizeof(*flags));
  float* sizes = gpu.scratch<float>(task.n);
  curvature_sizes_cuda(task, sizes, gpu, floor, flags + 1, flags);
  const Weights<float> weights{sizes, 1, task.n, task.n, 1};
  draw_weights_cuda(kOp, weights, draw, {sample, skipped, draw.row_offset}, flags, flags + 1, gpu);
}

#define FASTIF_INSTANTIATE(T)                                                            \
  template void curvature_multinomial_cuda(const CurvatureSizes<T>&, float, const Draw&, \
                                           const Sample&, int64_t*, const Gpu&)
FASTIF_INSTANTIATE(float);
FASTIF_INSTANTIATE(double);
FASTIF_INSTANTIATE(Half);
FASTIF_INSTANTIATE(BFloat16);
#undef FASTIF_INSTANTIATE

}  // namespace fastif
