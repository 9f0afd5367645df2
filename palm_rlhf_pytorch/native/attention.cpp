// Attention of many query heads over few key heads, and its gradients, without a matrix of scores in memory: keys come
// a block at a time, with a running maximum forward (Dao, 2307.08691, algorithm 1), and backward with the logarithm of
// what the weights were divided by (algorithm 2). float32; head sizes are multiples of 16.
// The plain twin is `formula` in fused_attention.py.

#include "vectors.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace {

constexpr int TALL = LANES == 8 ? 4 : 8; // rows of a product whose sums stay in registers, two for each
constexpr int ROWS = 32; // queries worked on at once,
constexpr int KEYS = 64; // with so many keys: what they make stays in near caches. fused_attention.py knows it too
constexpr int STEP = 16; // it divides these two, and is divided by those
constexpr float LEAST = std::numeric_limits<float>::lowest(); // only -inf is below: a hidden key

template <int BYTES> struct Half { typedef float type __attribute__((vector_size(BYTES / 2))); };

inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// (b, heads, places, d) by its distances, in numbers; those of d are neighbours
struct View {
  float* data;
  int64_t batch, head, place;
  float* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * place; }
};

struct Call {
  int64_t b, heads, kv_heads, n, j, d;
  int64_t causal;      // the queries are the last n of j places
  int64_t parts;       // of the queries in `backward`: each sums up its own gradients of keys and values
  View q, k, v, mask;  // (b, heads, n, d), (b, kv_heads, j, d) twice, and (b, 1, n, j), added to scores, or null
  View out, to_out, to_q, to_k, to_v; // as q, and the gradients
  float* logs;         // (b, heads, n): of the sums that weights were divided by
  float *turned, *sums; // room for the keys, in `backward` for values too; for both as often as there are parts

  int64_t groups() const { return b * kv_heads; } // of heads that share keys: their queries are rows side by side
  int64_t rows() const { return n * (heads / kv_heads); }
  int64_t panels() const { return up(rows(), ROWS) / ROWS; }
  int64_t size() const { return up(j, KEYS) * d; } // of one head's keys, in whole blocks
};

// out (TALL, N * LANES) = a b, or added to it; a (TALL, depth) by its distances from row to row and step to step
template <int N>
inline __attribute__((always_inline)) void tile(const float* a, int64_t row, int64_t step, const float* b,
                                                int64_t b_row, int64_t depth, float* out, int64_t out_row, bool add) {
  Lanes sum[TALL][N];
#pragma GCC unroll 8
  for (int i = 0; i < TALL; i++)
#pragma GCC unroll 8
    for (int c = 0; c < N; c++) sum[i][c] = add ? load<Lanes>(out + i * out_row + c * LANES) : Lanes{};
  for (int64_t t = 0; t < depth; t++) {
    Lanes x[N];
#pragma GCC unroll 8
    for (int c = 0; c < N; c++) hold(x[c] = load<Lanes>(b + t * b_row + c * LANES));
#pragma GCC unroll 8
    for (int i = 0; i < TALL; i++)
#pragma GCC unroll 8
      for (int c = 0; c < N; c++) sum[i][c] += a[i * row + t * step] * x[c];
  }
#pragma GCC unroll 8
  for (int i = 0; i < TALL; i++)
#pragma GCC unroll 8
    for (int c = 0; c < N; c++) store(out + i * out_row + c * LANES, sum[i][c]);
}

// out (m, n) = a (m, depth) b (depth, n), or added to it; TALL divides m, LANES n. Inlined: one of a's distances is 1
inline __attribute__((always_inline)) void multiply(const float* a, int64_t row, int64_t step, const float* b,
                                                    int64_t b_row, int64_t depth, float* out, int64_t out_row,
                                                    int64_t m, int64_t n, bool add) {
  for (int64_t c = 0; c < n; c += 2 * LANES)
    for (int64_t i = 0; i < m; i += TALL) {
      const float* from = a + i * row;
      float* to = out + i * out_row + c;
      if (n - c > LANES) tile<2>(from, row, step, b + c, b_row, depth, to, out_row, add);
      else tile<1>(from, row, step, b + c, b_row, depth, to, out_row, add);
    }
}

// what an operation makes of all lanes: of both halves, and of the halves of that
template <typename V, typename Operation> inline float fold(V x, Operation of) {
  if constexpr (sizeof(V) == 4 * sizeof(float)) return of(of(x[0], x[1]), of(x[2], x[3]));
  else {
    typename Half<sizeof(V)>::type halves[2];
    std::memcpy(halves, &x, sizeof x);
    return fold(of(halves[0], halves[1]), of);
  }
}
inline float sum(Lanes x) {
  return fold(x, [](auto a, auto b) { return a + b; });
}
inline float largest(const float* x, int64_t n) {
  const auto more = [](auto a, auto b) { return a > b ? a : b; };
  Lanes most = load<Lanes>(x);
  for (int64_t c = LANES; c < n; c += LANES) most = more(load<Lanes>(x + c), most);
  return fold(most, more);
}

// e^(score - shift) in place of n scores, exactly 0 where a key is hidden -> their sums, lane by lane
inline Lanes weigh(float* scores, int64_t n, float shift) {
  Lanes total = {};
  for (int64_t c = 0; c < n; c += LANES) {
    const Lanes score = load<Lanes>(scores + c), weight = score < LEAST ? Lanes{} : exponential(score - shift);
    store(scores + c, weight);
    total += weight;
  }
  return total;
}

// ROWS queries of one group, place by place, and what a thread makes of them
struct Panel {
  struct Row {
    int64_t head, place, begin, end; // the keys it sees are among those from begin to end
    const float* mask;
  };
  const Call& call;
  const int64_t d;
  int64_t b, kv, count, tall, begin, end; // rows, as many as products take, and the keys that any of them sees
  std::vector<Lanes> memory;
  float *q, *out, *to_out, *to_q; // (ROWS, d)
  Row rows[ROWS];
  Lanes total[ROWS];
  float most[ROWS], found[ROWS] = {}, keep[ROWS], inner[ROWS];
  alignas(64) float weights[ROWS * KEYS], slopes[ROWS * KEYS];

  explicit Panel(const Call& call) : call(call), d(call.d), memory(4 * ROWS * d / LANES) {
    q = reinterpret_cast<float*>(memory.data()), out = q + ROWS * d, to_out = out + ROWS * d, to_q = to_out + ROWS * d;
  }

  void choose(int64_t group, int64_t panel) {
    const int64_t share = call.heads / call.kv_heads, first = panel * ROWS;
    b = group / call.kv_heads, kv = group % call.kv_heads;
    count = std::min(call.rows() - first, int64_t(ROWS)), tall = up(count, TALL), begin = call.j, end = 0;
    for (int64_t r = 0; r < ROWS; r++) {
      const int64_t at = first + r, place = at / share;
      Row& row = rows[r];
      if (r >= count) row = {0, 0, 0, 0, nullptr};
      else if (r > 0 && rows[r - 1].place == place) row = rows[r - 1];
      else {
        row = {0, place, 0, call.causal ? call.j - call.n + place + 1 : call.j, nullptr};
        if (call.mask.data) row.mask = call.mask.at(b, 0, place);
        while (row.mask && row.end > 0 && row.mask[row.end - 1] < LEAST) row.end--;
        while (row.mask && row.begin < row.end && row.mask[row.begin] < LEAST) row.begin++;
      }
      row.head = kv * share + at % share;
      if (row.begin < row.end) begin = std::min(begin, row.begin), end = std::max(end, row.end);
    }
    begin = begin / KEYS * KEYS;
  }

  void copy(const View& from, float* to, float times = 1.0f) const {
    for (int64_t r = 0; r < count; r++) {
      const float* x = from.at(b, rows[r].head, rows[r].place);
      for (int64_t c = 0; c < d; c++) to[r * d + c] = x[c] * times;
    }
    std::fill(to + count * d, to + ROWS * d, 0.0f);
  }
  float& log(int r) const { return call.logs[(b * call.heads + rows[r].head) * call.n + rows[r].place]; }

  // scores of n keys from `first`, the mask in them, and -inf for those that a row does not see
  void score(int64_t first, int64_t n) {
    const float* keys = call.turned + (b * call.kv_heads + kv) * call.size() + first * d;
    multiply(q, d, 1, keys, KEYS, d, weights, KEYS, tall, n, false);
    for (int64_t r = 0; r < tall; r++) {
      float* scores = weights + r * KEYS;
      const int64_t from = std::min(std::max<int64_t>(rows[r].begin - first, 0), n);
      const int64_t to = std::min(std::max<int64_t>(rows[r].end - first, from), n);
      std::fill(scores, scores + from, -INFINITY);
      std::fill(scores + to, scores + n, -INFINITY);
      if (rows[r].mask) for (int64_t j = from; j < to; j++) scores[j] += rows[r].mask[first + j];
    }
  }

  void attend() {
    copy(call.q, q, 1.0f / std::sqrt(float(d)));
    std::fill_n(out, ROWS * d, 0.0f);
    std::fill_n(most, ROWS, LEAST);
    std::fill_n(total, ROWS, Lanes{});
    for (int64_t first = begin; first < end; first += KEYS) {
      const int64_t there = std::min<int64_t>(KEYS, end - first), n = up(there, STEP);
      score(first, n);
      for (int64_t r = 0; r < tall; r++) found[r] = largest(weights + r * KEYS, n);
      for (int64_t r = 0; r < ROWS; r += LANES) {
        const Lanes before = load<Lanes>(most + r), here = load<Lanes>(found + r), now = here > before ? here : before;
        store(keep + r, exponential(before - now));
        store(most + r, now);
      }
      for (int64_t r = 0; r < tall; r++) {
        total[r] = total[r] * keep[r] + weigh(weights + r * KEYS, n, most[r]);
        if (keep[r] < 1.0f) for (int64_t c = 0; c < d; c++) out[r * d + c] *= keep[r];
      }
      multiply(weights, KEYS, 1, call.v.at(b, kv, first), call.v.place, there, out, d, tall, d, true);
    }
    for (int64_t r = 0; r < count; r++) {
      const float all = sum(total[r]), times = all > 0.0f ? 1.0f / all : 0.0f; // who sees nothing gets nothing
      float* to = call.out.at(b, rows[r].head, rows[r].place);
      for (int64_t c = 0; c < d; c++) to[c] = out[r * d + c] * times;
      log(r) = most[r] + std::log(all);
    }
  }

  // the gradients of these queries, and to the sums (up(j, KEYS), d) those of keys and values
  void differentiate(float* k_sums, float* v_sums) {
    const float scale = 1.0f / std::sqrt(float(d));
    copy(call.q, q, scale);
    copy(call.out, out);
    copy(call.to_out, to_out);
    std::fill_n(to_q, ROWS * d, 0.0f);
    for (int64_t r = 0; r < tall; r++) {
      Lanes products = {};
      for (int64_t c = r * d; c < (r + 1) * d; c += LANES) products += load<Lanes>(out + c) * load<Lanes>(to_out + c);
      inner[r] = sum(products);
    }
    for (int64_t first = begin; first < end; first += KEYS) {
      const int64_t there = std::min<int64_t>(KEYS, end - first), n = up(there, STEP), m = up(there, TALL);
      const float* values = call.turned + (call.groups() + b * call.kv_heads + kv) * call.size() + first * d;
      score(first, n);
      multiply(to_out, d, 1, values, KEYS, d, slopes, KEYS, tall, n, false);
      for (int64_t r = 0; r < tall; r++) {
        weigh(weights + r * KEYS, n, r < count ? log(r) : 0.0f);
        for (int64_t c = r * KEYS; c < r * KEYS + n; c += LANES)
          store(slopes + c, load<Lanes>(weights + c) * (load<Lanes>(slopes + c) - inner[r]));
      }
      multiply(weights, 1, KEYS, to_out, d, tall, v_sums + first * d, d, m, d, true);
      multiply(slopes, 1, KEYS, q, d, tall, k_sums + first * d, d, m, d, true);
      multiply(slopes, KEYS, 1, call.k.at(b, kv, first), call.k.place, there, to_q, d, tall, d, true);
    }
    for (int64_t r = 0; r < count; r++) {
      float* to = call.to_q.at(b, rows[r].head, rows[r].place);
      for (int64_t c = 0; c < d; c++) to[c] = to_q[r * d + c] * scale;
    }
  }
};

// every block of keys (KEYS, d) -> (d, KEYS), with 0 for those that are none
void turn(const Call& call, const View& keys, float* out) {
  const int64_t blocks = up(call.j, KEYS) / KEYS, d = call.d;
#pragma omp for schedule(static)
  for (int64_t block = 0; block < call.groups() * blocks; block++) {
    const int64_t group = block / blocks, first = block % blocks * KEYS;
    for (int64_t j = 0; j < KEYS; j++) {
      const bool there = first + j < call.j;
      const float* key = keys.at(group / call.kv_heads, group % call.kv_heads, there ? first + j : 0);
      for (int64_t c = 0; c < d; c++) out[(block * d + c) * KEYS + j] = there ? key[c] : 0.0f;
    }
  }
}

} // namespace

extern "C" void forward(const Call* given) {
  const Call& call = *given;
#pragma omp parallel
  {
    Panel panel(call);
    turn(call, call.k, call.turned);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < call.groups() * call.panels(); task++) { // late queries first: they see more
      panel.choose(task % call.groups(), call.panels() - 1 - task / call.groups());
      panel.attend();
    }
  }
}

// The sums of a part, and they themselves, are added up in one order, however many threads there are.
extern "C" void backward(const Call* given) {
  const Call& call = *given;
  const int64_t d = call.d, size = call.size(), groups = call.groups();
#pragma omp parallel
  {
    Panel panel(call);
    turn(call, call.k, call.turned);
    turn(call, call.v, call.turned + groups * size);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < groups * call.parts; task++) {
      float* sums = call.sums + task * 2 * size;
      std::fill_n(sums, 2 * size, 0.0f);
      for (int64_t p = task / groups; p < call.panels(); p += call.parts) { // each has early queries and late ones
        panel.choose(task % groups, p);
        panel.differentiate(sums, sums + size);
      }
    }
#pragma omp for schedule(static)
    for (int64_t key = 0; key < groups * call.j; key++) {
      const int64_t group = key / call.j, j = key % call.j;
      const float* first = call.sums + group * 2 * size + j * d;
      float* to_k = call.to_k.at(group / call.kv_heads, group % call.kv_heads, j);
      float* to_v = call.to_v.at(group / call.kv_heads, group % call.kv_heads, j);
      std::copy_n(first, d, to_k);
      std::copy_n(first + size, d, to_v);
      for (int64_t part = 1; part < call.parts; part++) {
        const float* more = first + part * groups * 2 * size;
        for (int64_t c = 0; c < d; c++) to_k[c] += more[c], to_v[c] += more[size + c];
      }
    }
  }
}
