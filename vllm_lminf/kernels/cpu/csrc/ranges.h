// What the kernels for attention and for recall have in common.

#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

namespace lminf {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kMinusInfinity = -kInfinity;

// Positions [begin, end).
struct Interval {
  int64_t begin;
  int64_t end;
};

// Calls function(std::integral_constant<int, rows>) for a number of rows known at run time.
template <typename Function>
void with_rows(int64_t rows, Function&& function) {
  switch (rows) {
    case 1: function(std::integral_constant<int, 1>()); break;
    case 2: function(std::integral_constant<int, 2>()); break;
    case 3: function(std::integral_constant<int, 3>()); break;
    case 4: function(std::integral_constant<int, 4>()); break;
    case 5: function(std::integral_constant<int, 5>()); break;
    default: function(std::integral_constant<int, 6>()); break;
  }
}

}  // namespace lminf
