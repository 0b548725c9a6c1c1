#include "hvp/hvp_accumulate.h"

#include <vector>

#include "common/run_on.h"
#include "hvp/parameter_list.h"

namespace fastif {
namespace {

void hvp_accumulate(Tensor acc, std::vector<Tensor> hvp, double weight) {
  constexpr const char* kOp = "fastif_ext::hvp_accumulate_";
  STD_TORCH_CHECK(acc.dim() == 2 && acc.is_contiguous(), kOp,
                  ": acc must be a contiguous [R, p] tensor");
  const int64_t R = acc.size(0), p = acc.size(1);
  const ParameterList list(kOp, hvp, R, p);
  dispatch_state(kOp, acc.scalar_type(), list.tensors[0].scalar_type(), [&](auto t, auto g) {
    using T = decltype(t);
    using G = decltype(g);
    const auto pointers = list.pointers<G>();
    const HvpAccumulate<T, G> task{R,
                                   p,
                                   int64_t(pointers.size()),
                                   pointers.data(),
                                   list.lengths.data(),
                                   mutable_data<T>(acc),
                                   weight};
    run_on(
        acc, [&](const Pool& pool) { hvp_accumulate_cpu(task, pool); },
        [&](const auto& gpu) { hvp_accumulate_cuda(task, gpu); });
  });
}

}  // namespace
}  // namespace fastif

FASTIF_REGISTER("hvp_accumulate_", fastif::hvp_accumulate)
