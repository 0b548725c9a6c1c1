// Uninitialised scratch memory that starts on a cache line.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace fastif {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(
            ::operator new(static_cast<size_t>(count) * sizeof(T) + 1, kCacheLine))) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kCacheLine{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kCacheLine); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace fastif
