// Work shared among the threads of OpenMP's team: by GCC's runtime, whatever the compiler.
//
// That runtime is the one that torch computes with, and vLLM binds its threads to cores. Clang's
// `-fopenmp` would bring its own: a second team, started under the first one's binding. GCC's entry
// points are called by name instead, as GCC itself calls them for `#pragma omp parallel`; LLVM's and
// Intel's runtimes have them too, for programs where they take its place.

#pragma once

#include <algorithm>
#include <cstdint>

extern "C" {
void GOMP_parallel(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);
int omp_get_num_threads(void);
int omp_get_thread_num(void);
}

namespace lminf {

// Calls function() in every thread of the team; in this one alone where that isn't worth it.
template <typename Function>
void in_threads(bool worth_it, Function function) {
  const unsigned all = 0;
  GOMP_parallel([](void* data) { (*static_cast<Function*>(data))(); }, &function,
                worth_it ? all : 1, 0);
}

// Calls function(i) for every i from 0 to count, a stretch of them in each thread.
template <typename Function>
void for_each(int64_t count, bool worth_it, Function function) {
  in_threads(worth_it, [&] {
    const int64_t threads = omp_get_num_threads(), stretch = (count + threads - 1) / threads;
    const int64_t begin = omp_get_thread_num() * stretch, end = std::min(count, begin + stretch);
    for (int64_t i = begin; i < end; ++i) function(i);
  });
}

}  // namespace lminf
