// FASTIF_CLONES compiles a function once per x86-64 level and picks the best at load time.
//
// Put it on leaf functions in anonymous namespaces. It does not reach into lambdas, so leaves take
// pointers. What a leaf calls must be always_inline (see simd.h) or it runs at the base level.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define FASTIF_X86_LEVELS 1
#define FASTIF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define FASTIF_TARGET_V4 __attribute__((target("arch=x86-64-v4")))
#define FASTIF_TARGET_V3 __attribute__((target("arch=x86-64-v3")))
#else
#define FASTIF_CLONES
#define FASTIF_TARGET_V4
#define FASTIF_TARGET_V3
#endif

namespace fastif {

// The x86-64 level, for kernels whose tiles differ from level to level. Such a kernel is one
// always_inline body, instantiated in a FASTIF_TARGET_* function for each level.
enum class SimdLevel { kBase, kV3, kV4 };

inline SimdLevel machine_simd_level() {
#ifdef FASTIF_X86_LEVELS
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("bmi") || !__builtin_cpu_supports("bmi2"))
    return SimdLevel::kBase;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512cd") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl"))
    return SimdLevel::kV3;
  return SimdLevel::kV4;
#else
  return SimdLevel::kBase;
#endif
}

// The level in use. Tests lower it to try them all.
inline SimdLevel& simd_level() {
  static SimdLevel level = machine_simd_level();
  return level;
}

}  // namespace fastif
