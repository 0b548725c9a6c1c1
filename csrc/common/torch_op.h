// What every *_op.cpp shares: torch's stable ABI, checks, dtype dispatch, torch's thread pool.
//
// Only *_op.cpp files include this. The Python functions in fastif_ext/ops check their arguments
// and explain; the checks here keep a direct torch.ops call from reading past a buffer.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <exception>
#include <mutex>

#include "common/numeric_types.h"
#include "common/parallel.h"

namespace fastif {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch's intra-op threads. Two tasks at least, so that a body always runs inside a parallel region
// and a GEMM it calls stays on one thread: its result is then the same for any number of threads.
// An exception of a task is carried to the caller: torch's C interface would lose its message.
inline Pool torch_pool() {
  return Pool{[](int64_t tasks, void (*task)(void*, int64_t), void* context) {
    std::exception_ptr failure;
    std::mutex mutex;
    torch::stable::parallel_for(0, std::max<int64_t>(tasks, 2), 1, [&](int64_t begin, int64_t end) {
      try {
        for (int64_t i = begin; i < std::min(end, tasks); ++i) task(context, i);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!failure) failure = std::current_exception();
      }
    });
    if (failure) std::rethrow_exception(failure);
  }};
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls body(T{}) with the element type T of a floating-point tensor.
template <class Body>
auto dispatch_floating(const char* op, ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Half:
      return body(Half{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "fastif_ext::", op,
                      ": expected float32, float64, float16 or bfloat16 input");
      return body(float{});
  }
}

// torch's dispatcher is asked only where there is something to do: by way of the C interface a call
// takes a microsecond or more.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// Contiguous, of any contents, and on the device of `like`.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape,
                         ScalarType dtype) {
  int64_t strides[4], stride = 1;
  STD_TORCH_CHECK(shape.size() <= 4, "fastif_ext: results have four dimensions at most");
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, shape.begin()[d]);
  }
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(shape.size()), shape.begin(), strides, code, device_type, device_index, &handle));
  return Tensor(handle);
}

}  // namespace fastif
