// Rotary position embedding (Su et al., 2104.09864, eq. 34) of one head: its features are pairs (x, y), first halves and
// second. The sine comes negated in its first half.

#pragma once

#include <algorithm>
#include <cstdint>

namespace {

// x cos - y sin, y cos + x sin; without cosines, as it is
inline void turn(const float* x, const float* cos, const float* sin, int64_t d, float* __restrict out) {
  if (!cos) return void(std::copy_n(x, d, out));
  const int64_t half = d / 2;
  for (int64_t c = 0; c < half; c++) out[c] = x[c] * cos[c] + x[c + half] * sin[c];
  for (int64_t c = half; c < d; c++) out[c] = x[c] * cos[c] + x[c - half] * sin[c];
}

// the gradient by what was turned
inline void turn_back(const float* g, const float* cos, const float* sin, int64_t d, float* __restrict out) {
  const int64_t half = d / 2;
  for (int64_t c = 0; c < half; c++) out[c] = g[c] * cos[c] + g[c + half] * sin[c + half];
  for (int64_t c = half; c < d; c++) out[c] = g[c] * cos[c] + g[c - half] * sin[c - half];
}

} // namespace
