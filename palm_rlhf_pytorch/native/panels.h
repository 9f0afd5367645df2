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
constexpr int64_t PART = 128;           // inputs that several blocks of rows are multiplied with, one after the other,
constexpr int64_t MOST_BLOCKS = 48 / ROWS; // and how many blocks at most: so the part of the weight stays in near caches

// Rows as `product` reads them: blocks of like size, in each of them feature by feature
struct Rows {
  int64_t count, size;
  explicit Rows(int64_t n) : count(n), size((n + (n + ROWS - 1) / ROWS - 1) / ((n + ROWS - 1) / ROWS)) {}
  int64_t of_block(int64_t first) const { return std::min(size, count - first); }
  int64_t blocks() const { return (count + size - 1) / size; }
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

// sums (R, V * WIDE) += R rows x (n, R) times n inputs of V panels, which lie `apart`. For each input `pace` floats of a
// panel are fetched, from `soon` on.
template <int R, int V>
void multiply(const float* x, const float* panel, int64_t apart, int64_t n, const float* soon, int64_t pace, float* sums) {
  constexpr int N = V * PARTS;
  Lanes sum[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int u = 0; u < N; u++) sum[r][u] = load<Lanes>(sums + (r * N + u) * LANES);
  for (int64_t k = 0; k < n; k++) {
    Lanes weight[N];
#pragma GCC unroll 8
    for (int u = 0; u < N; u++) {
      hold(weight[u] = load<Lanes>(panel + u / PARTS * apart + k * WIDE + u % PARTS * LANES));
      if (u % PARTS == 0) __builtin_prefetch(soon + u / PARTS * apart + k * pace, 0, 2);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int u = 0; u < N; u++) sum[r][u] += x[k * R + r] * weight[u];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int u = 0; u < N; u++) store(sums + (r * N + u) * LANES, sum[r][u]);
}

typedef void Multiply(const float*, const float*, int64_t, int64_t, const float*, int64_t, float*);
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
    const int64_t first = task * together() * WIDE, groups = (rows.blocks() + MOST_BLOCKS - 1) / MOST_BLOCKS;
    const int64_t some = (rows.blocks() + groups - 1) / groups * rows.size;
    for (int64_t r = 0; r < rows.count; r += some) multiply_some(first, r, std::min(some, rows.count - r));
  }

  // `count` rows from `begin` on, MOST_BLOCKS blocks at most. Several take turns: while all of them are multiplied with a
  // part of the panel, the next part comes from memory.
  void multiply_some(int64_t first, int64_t begin, int64_t count) const {
    alignas(64) float sums[MOST_BLOCKS * ROWS * WIDE];
    const int64_t panels = std::min(together(), this->panels() - first / WIDE), width = panels * WIDE;
    const int64_t blocks = (count + rows.size - 1) / rows.size, part = blocks > 1 ? PART : inputs;
    std::fill_n(sums, count * width, 0.0f);
    for (int64_t k = 0; k < inputs; k += part)
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t r = begin + b * rows.size, many = rows.of_block(r), n = std::min(part, inputs - k);
        const float* const panel = weight + first * inputs + k * WIDE;
        const float* const soon = panel + (blocks > 1 ? (blocks + b) * n * WIDE / blocks : many > FEW ? AHEAD : NEAR);
        Multiply* const run = panels == 2 ? TWO_PANELS[many - 1] : ONE_PANEL[many - 1];
        run(x + r * inputs + k * many, panel, inputs * WIDE, n, soon, (WIDE + blocks - 1) / blocks,
            sums + (r - begin) * width);
      }
    for (int64_t r = 0; r < count; r++)
      for (int64_t o = 0; o < std::min(width, outputs - first); o += LANES) {
        const int64_t at = (begin + r) * outputs + first + o;
        put(load<Lanes>(sums + r * width + o), outputs - first - o, added ? added + at : nullptr, out + at);
      }
  }

  // all of it, by the threads of a parallel region
  void shared() const {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks(); task++) (*this)(task);
  }
};

} // namespace
