// Products of few rows with a weight, as fast as memory gives the weight.

#pragma once

#include "vectors.h"

#include <algorithm>
#include <array>
#include <utility>

namespace {

constexpr int ROWS = LANES == 8 ? 6 : 16 / PARTS; // rows multiplied at once: their sums leave registers for the rest
constexpr int FEW = 2;                   // rows that take less time than memory does
constexpr int AHEAD = 2048, NEAR = 512; // floats of a weight fetched before their turn, and with few rows

// Rows as `product` reads them: blocks of like size, in each of them feature by feature
struct Rows {
  int64_t count, size;
  explicit Rows(int64_t n) : count(n), size((n + (n + ROWS - 1) / ROWS - 1) / ((n + ROWS - 1) / ROWS)) {}
  int64_t of_block(int64_t first) const { return std::min(size, count - first); }
  // where a row's first of so many features is
  int64_t begin(int64_t row, int64_t features) const { return row / size * size * features + row % size; }
};

// a register's numbers, or the first n where those are fewer, plus what is `added` -> out
__attribute__((noinline)) void put_some(const Lanes& found, int64_t n, const float* added, float* out) {
  for (int64_t i = 0; i < n; i++) out[i] = found[i] + (added ? added[i] : 0.0f);
}
inline void put(Lanes found, int64_t n, const float* added, float* out) {
  if (n < LANES) return put_some(found, n, added, out);
  store(out, added ? found + load<Lanes>(added) : found);
}

// R rows x (inputs, R) with V panels, each (inputs, WIDE), plus what is `added` -> out (R, outputs), `stride` apart
template <int R, int V>
void multiply(const float* x, const float* panel, int64_t inputs, bool fetch, const float* added, float* out,
              int64_t stride, int64_t outputs) {
  constexpr int N = V * PARTS;
  Lanes sum[R][N] = {};
  for (int64_t k = 0; k < inputs; k++) {
    Lanes weight[N];
#pragma GCC unroll 8
    for (int u = 0; u < N; u++) {
      const float* place = panel + (u / PARTS * inputs + k) * WIDE + u % PARTS * LANES;
      hold(weight[u] = load<Lanes>(place));
      if (fetch && u % PARTS == 0) __builtin_prefetch(place + (R > FEW ? AHEAD : NEAR), 0, 2);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int u = 0; u < N; u++) sum[r][u] += x[k * R + r] * weight[u];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int u = 0; u < N; u++) {
      const int64_t at = r * stride + u * LANES;
      put(sum[r][u], outputs - u * LANES, added ? added + at : nullptr, out + at);
    }
}

typedef void Multiply(const float*, const float*, int64_t, bool, const float*, float*, int64_t, int64_t);
template <int V, std::size_t... R> constexpr std::array<Multiply*, sizeof...(R)> for_rows(std::index_sequence<R...>) {
  return {multiply<R + 1, V>...};
}
constexpr auto ONE_PANEL = for_rows<1>(std::make_index_sequence<ROWS>());
constexpr auto TWO_PANELS = for_rows<2>(std::make_index_sequence<ROWS / 2>());

// The product of x, laid out by `rows`, with a weight (inputs, outputs) in panels, plus `added` (rows, outputs), if any
// -> out. It falls into tasks of one or two panels. Each number is summed in one order, whatever rows it comes with.
struct Product {
  const float* x;
  const Rows& rows;
  const float* weight;
  int64_t inputs, outputs;
  const float* added;
  float* out;

  int64_t panels() const { return (outputs + WIDE - 1) / WIDE; }
  int64_t together() const { return rows.size <= ROWS / 2 ? 2 : 1; }
  int64_t tasks() const { return (panels() + together() - 1) / together(); }

  void operator()(int64_t task) const {
    const int64_t p = task * together(), first = p * WIDE, count = std::min(together(), panels() - p);
    for (int64_t r = 0; r < rows.count; r += rows.size) {
      const int64_t many = rows.of_block(r), at = r * outputs + first;
      Multiply* const run = count == 2 ? TWO_PANELS[many - 1] : ONE_PANEL[many - 1];
      run(x + r * inputs, weight + first * inputs, inputs, r == 0, added ? added + at : nullptr, out + at, outputs,
          std::min(count * WIDE, outputs - first));
    }
  }

  // all of it, by the threads of a parallel region
  void shared() const {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks(); task++) (*this)(task);
  }
};

} // namespace
