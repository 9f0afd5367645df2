// Products of few rows with a weight, as fast as memory gives the weight.

#pragma once

#include "vectors.h"

#include <algorithm>
#include <array>
#include <utility>

namespace {

constexpr int ROWS = LANES == 8 ? 6 : 16 / PARTS; // rows multiplied at once: their sums leave registers for the rest
constexpr int64_t STREAMS = 4;             // parts of a weight that memory gives side by side
constexpr int64_t PART = 32;               // inputs of each that several blocks of rows are multiplied with in turn,
constexpr int64_t MOST_BLOCKS = 48 / ROWS; // and how many blocks at most: so that much of both stays in near caches

// A weight in panels of WIDE outputs: STREAMS parts (panels, inputs / STREAMS, WIDE), which have an input each in turn,
// and the few that are left, (panels, left, WIDE). A core gets more from memory by several streams than by one, and more
// by those that go on and on, which its prefetchers see, than by fetches of ours.
struct Panels {
  int64_t inputs, count;
  int64_t part() const { return inputs / STREAMS; }
  int64_t left() const { return inputs % STREAMS; }
  int64_t stream() const { return count * part() * WIDE; } // from one stream to the next
  int64_t at(int64_t panel, int64_t input) const { // where its outputs begin
    const uint64_t i = input, streams = STREAMS, in_left = streams * part();
    if (i >= in_left) return STREAMS * stream() + (panel * left() + i - in_left) * WIDE;
    return i % streams * stream() + (panel * part() + i / streams) * WIDE;
  }
};
inline int64_t panels_of(int64_t outputs) { return (outputs + WIDE - 1) / WIDE; }

// Rows as products read them: blocks of like size, in each of them feature by feature
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

// sums (R, WIDE) += R rows x (n, S, R) times n inputs of S streams, which are so far apart
template <int R, int S>
void multiply(const float* x, const float* weight, int64_t stream, int64_t n, float* sums) {
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
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) sum[r][p] += x[(k * S + s) * R + r] * w[p];
    }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) store(sums + (r * PARTS + p) * LANES, sum[r][p]);
}

typedef void Multiply(const float*, const float*, int64_t, int64_t, float*);
template <int S, std::size_t... R> constexpr std::array<Multiply*, sizeof...(R)> for_rows(std::index_sequence<R...>) {
  return {multiply<R + 1, S>...};
}
constexpr auto ALL_STREAMS = for_rows<STREAMS>(std::make_index_sequence<ROWS>());
constexpr auto ONE_STREAM = for_rows<1>(std::make_index_sequence<ROWS>());

// x, laid out by `rows`, times panels of a weight. Each number is summed in one order, whatever rows it comes with.
struct Multiplied {
  const float* x;
  const Rows& rows;
  const float* weight;
  Panels panels;

  // f(begin, count) for all rows, MOST_BLOCKS blocks at most at a time
  template <typename F> void by_groups(F f) const {
    const int64_t groups = (rows.blocks() + MOST_BLOCKS - 1) / MOST_BLOCKS;
    const int64_t some = (rows.blocks() + groups - 1) / groups * rows.size;
    for (int64_t r = 0; r < rows.count; r += some) f(r, std::min(some, rows.count - r));
  }

  // sums (count, WIDE) of a panel, for rows from `begin` on. Several blocks take turns with a part of it.
  void sum_up(int64_t panel, int64_t begin, int64_t count, float* sums) const {
    const auto run = [&](auto& functions, int64_t input, int64_t n) {
      for (int64_t r = begin; r < begin + count; r += rows.size) {
        const int64_t many = rows.of_block(r);
        functions[many - 1](x + r * panels.inputs + input * many, weight + panels.at(panel, input), panels.stream(), n,
                            sums + (r - begin) * WIDE);
      }
    };
    std::fill_n(sums, count * WIDE, 0.0f);
    const int64_t part = panels.part(), some = count > rows.size ? PART : part;
    for (int64_t k = 0; k < part; k += some) run(ALL_STREAMS, k * STREAMS, std::min(some, part - k));
    if (panels.left()) run(ONE_STREAM, part * STREAMS, panels.left());
  }
};

constexpr int64_t MOST_SUMS = MOST_BLOCKS * ROWS * WIDE; // of a panel

// The product, plus `added` (rows, outputs), if any -> out, by the threads of a parallel region
void product(const Multiplied& by, int64_t outputs, const float* added, float* out) {
#pragma omp for schedule(static)
  for (int64_t panel = 0; panel < panels_of(outputs); panel++)
    by.by_groups([&](int64_t begin, int64_t count) {
      alignas(64) float sums[MOST_SUMS];
      by.sum_up(panel, begin, count, sums);
      for (int64_t r = 0; r < count; r++)
        for (int64_t o = panel * WIDE; o < std::min((panel + 1) * WIDE, outputs); o += LANES) {
          const int64_t at = (begin + r) * outputs + o;
          put(load<Lanes>(sums + r * WIDE + o - panel * WIDE), outputs - o, added ? added + at : nullptr, out + at);
        }
    });
}

// SwiGLU of WIDE features, of whose values and gates the weight has panels in turn -> out, laid out by `rows` among so
// many `features`, the first of these at `shift`
void gated(const Multiplied& by, int64_t panel, int64_t ff, float* out, int64_t features, int64_t shift) {
  const int64_t n = std::min<int64_t>(WIDE, ff - panel * WIDE);
  by.by_groups([&](int64_t begin, int64_t count) {
    alignas(64) float values[MOST_SUMS], gates[MOST_SUMS], some[WIDE];
    by.sum_up(2 * panel, begin, count, values);
    by.sum_up(2 * panel + 1, begin, count, gates);
    for (int64_t r = 0; r < count; r++) {
      const int64_t row = begin + r, many = by.rows.of_block(row / by.rows.size * by.rows.size);
      float* const to = out + by.rows.begin(row, features) + (shift + panel * WIDE) * many;
      swiglu(values + r * WIDE, gates + r * WIDE, n, some);
      for (int64_t i = 0; i < n; i++) to[i * many] = some[i];
    }
  });
}

} // namespace
