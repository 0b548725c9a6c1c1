// FASTIF_CLONES compiles a function once per x86-64 level and picks the best at load time.
//
// Put it on leaf functions in anonymous namespaces. It does not reach into lambdas, so leaves take
// pointers. What a leaf calls must be always_inline (see simd.h) or it runs at the base level.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define FASTIF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTIF_CLONES
#endif
