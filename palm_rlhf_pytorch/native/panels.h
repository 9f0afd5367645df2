// Products of few rows with a weight, as fast as memory gives the weight.

#pragma once

#include "vectors.h"

#include <algorithm>
#include <array>
#include <utility>

namespace {

constexpr int ROWS = LANES == 8 ? 6 : 16 / PARTS; // rows multiplied at once: their sums leave registers for the rest
constexpr int64_t STREAMS = 4;            // parts of a weight's inputs that memory gives side by side
constexpr int64_t PART = 32;             // inputs of each that several blocks of rows are multiplied with in turn,
constexpr int64_t MOST_BLOCKS = 48 / ROWS; // and how many blocks at most: so that much of the weight stays in near caches

// A weight (inputs, outputs) in panels of WIDE outputs: the first STREAMS `part`s of its inputs, each (panels, part, WIDE),
// and the few inputs that are left, (panels, left, WIDE). A core gets more from memory by several streams than by one,
// and more by those that go on and on, which its prefetchers see, than by fetches of ours.
struct Panels {
  int64_t inputs, outputs;
  int64_t count() const { return (outputs + WIDE - 1) / WIDE; }
  int64_t part() const { return inputs / STREAMS; }
  int64_t left() const { return inputs % STREAMS; }
  int64_t stream() const { return count() * part() * WIDE; } // from one stream to the next
  int64_t of_part(int64_t panel) const { return panel * part() * WIDE; }
  int64_t of_left(int64_t panel) const { return STREAMS * stream() + panel * left() * WIDE; }
};

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

// sums (R, WIDE) += R rows x (n, R) of S streams times n inputs of each; from one stream to the next x lies `part`
// inputs apart, the weight `stream`. With FETCH `pace` floats are fetched for each, from `soon` on.
template <int R, int S, bool FETCH>
void multiply(const float* x, int64_t part, const float* weight, int64_t stream, int64_t n, const float* soon, int64_t pace,
              float* sums) {
  Lanes sum[R][PARTS];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) sum[r][p] = load<Lanes>(sums + (r * PARTS + p) * LANES);
  for (int64_t k = 0; k < n; k++)
#pragma GCC unroll 4
    for (int s = 0; s < S; s++) {
      Lanes w[PARTS];
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; p++) hold(w[p] = load<Lanes>(weight + s * stream + k * WIDE + p * LANES));
      if (FETCH) __builtin_prefetch(soon + s * stream + k * pace, 0, 2);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) sum[r][p] += x[(s * part + k) * R + r] * w[p];
    }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) store(sums + (r * PARTS + p) * LANES, sum[r][p]);
}

typedef void Multiply(const float*, int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*);
template <int S, bool FETCH, std::size_t... R>
constexpr std::array<Multiply*, sizeof...(R)> for_rows(std::index_sequence<R...>) {
  return {multiply<R + 1, S, FETCH>...};
}
constexpr auto ALL_ROWS = std::make_index_sequence<ROWS>();
constexpr auto STREAMING = for_rows<STREAMS, false>(ALL_ROWS), IN_TURN = for_rows<STREAMS, true>(ALL_ROWS);
constexpr auto LEFT = for_rows<1, false>(ALL_ROWS);

// The product of x, laid out by `rows`, with a weight in `panels`, plus `added` (rows, outputs), if any -> out. A panel
// is a task. Each number is summed in one order, whatever rows it comes with.
struct Product {
  const float* x;
  const Rows& rows;
  const float* weight;
  Panels panels;
  const float* added;
  float* out;

  int64_t tasks() const { return panels.count(); }

  void operator()(int64_t task) const {
    const int64_t groups = (rows.blocks() + MOST_BLOCKS - 1) / MOST_BLOCKS;
    const int64_t some = (rows.blocks() + groups - 1) / groups * rows.size;
    for (int64_t r = 0; r < rows.count; r += some) multiply_some(task, r, std::min(some, rows.count - r));
  }

  // `count` rows from `begin` on, MOST_BLOCKS blocks at most. Several take turns: while all of them are multiplied with a
  // part of the panel, the next part comes from memory.
  void multiply_some(int64_t panel, int64_t begin, int64_t count) const {
    alignas(64) float sums[MOST_BLOCKS * ROWS * WIDE];
    const int64_t inputs = panels.inputs, outputs = panels.outputs, part = panels.part(), left = panels.left();
    const int64_t blocks = (count + rows.size - 1) / rows.size, some = blocks > 1 ? PART : part;
    const auto run = [&](auto& functions, int64_t block, int64_t k, const float* from, int64_t n, const float* soon) {
      const int64_t r = begin + block * rows.size, many = rows.of_block(r);
      functions[many - 1](x + r * inputs + k * many, part, from, panels.stream(), n, soon, (WIDE + blocks - 1) / blocks,
                          sums + (r - begin) * WIDE);
    };
    std::fill_n(sums, count * WIDE, 0.0f);
    for (int64_t k = 0; k < part; k += some)
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t n = std::min(some, part - k);
        const float* const from = weight + panels.of_part(panel) + k * WIDE;
        run(blocks > 1 ? IN_TURN : STREAMING, b, k, from, n, from + (blocks + b) * n * WIDE / blocks);
      }
    for (int64_t b = 0; left && b < blocks; b++)
      run(LEFT, b, STREAMS * part, weight + panels.of_left(panel), left, nullptr);
    for (int64_t r = 0; r < count; r++)
      for (int64_t o = panel * WIDE; o < std::min((panel + 1) * WIDE, outputs); o += LANES) {
        const int64_t at = (begin + r) * outputs + o;
        put(load<Lanes>(sums + r * WIDE + o - panel * WIDE), outputs - o, added ? added + at : nullptr, out + at);
      }
  }

  // all of it, by the threads of a parallel region
  void shared() const {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks(); task++) (*this)(task);
  }
};

} // namespace
