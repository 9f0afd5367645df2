// Attention of one token, up to 8 heads of it on the same keys, with a running maximum (Milakov & Gimelshein, 1805.02867,
// algorithm 3), so that keys and values are read from memory once.

#pragma once

#include "turn.h"
#include "vectors.h"

#include <cmath>
#include <utility>
#include <vector>

namespace {

constexpr int HEADS = 8;                     // heads computed at once, all on the same keys
constexpr int KEYS = LANES == 16 ? 8 : 4;    // keys whose scores are computed at once,
constexpr int ABREAST = LANES == 16 ? 8 : 4; // and heads to which WIDE features of a value are added
constexpr int LINE = 16;                     // floats of a cache line
constexpr int TOGETHER = 16;                 // keys read before their values are
constexpr int FETCHED = 16;                  // places whose keys and values are fetched before their turn

typedef float PerHead __attribute__((vector_size(HEADS * sizeof(float))));

constexpr int PAIRS = 2 * HEADS / LANES;                   // registers that hold two features of every head,
constexpr int PARTED = LANES < HEADS ? HEADS / LANES : 1; // and one number of every head: of two keys' if it is half of one

// what belongs to the heads of a row (keys, HEADS) in its register i
inline Lanes of_heads(PerHead x, int64_t i) {
  Lanes found;
  for (int half = 0; half < LANES; half += HEADS)
    std::memcpy(reinterpret_cast<float*>(&found) + half, reinterpret_cast<float*>(&x) + i * LANES % HEADS, sizeof(float) * std::min(LANES, HEADS));
  return found;
}

// one number for every head of what registers hold
template <typename F> inline PerHead by_head(const Lanes (&x)[PARTED], F f) {
  PerHead parts[PARTED * LANES / HEADS];
  std::memcpy(parts, x, sizeof parts);
  return PARTED * LANES == HEADS ? parts[0] : f(parts[0], parts[PARTED * LANES / HEADS - 1]);
}

typedef int64_t Twos __attribute__((vector_size(sizeof(Lanes))));

// two numbers, over and over
inline Lanes both_of(const float* from) {
  int64_t bits;
  std::memcpy(&bits, from, sizeof bits);
  const Twos all = bits - Twos{};
  return load<Lanes>(reinterpret_cast<const float*>(&all));
}

template <int... I> inline Lanes picked(Lanes a, Lanes b, std::integer_sequence<int, I...>, int from) {
#ifdef __clang__
  return from ? __builtin_shufflevector(a, b, (2 * I + 1)...) : __builtin_shufflevector(a, b, (2 * I)...);
#else
  return __builtin_shuffle(a, b, Ints<Lanes>::type{(2 * I)...} + from);
#endif
}

// the sums of neighbours, a's and then b's
inline Lanes folded(Lanes a, Lanes b) {
  const auto all = std::make_integer_sequence<int, LANES>();
  return picked(a, b, all, 0) + picked(a, b, all, 1);
}

template <typename V> inline V larger(V a, V b) { return a > b ? a : b; }

// Keys and values of one head, place by place, and what of them is to come from memory soon: line by line as they lie
// there, for which memory is faster than for all keys and then all values.
struct Places {
  const float* keys;
  int64_t stride, values, d; // floats from one place to the next, and from a key to its value
  const float* soon;
  int64_t left; // lines of the key or value that `soon` is in
  bool value = false;

  Places(const float* keys, int64_t stride, int64_t values, int64_t d)
      : keys(keys), stride(stride), values(values), d(d), soon(keys), left(d / LINE) {}

  inline void fetch() {
    __builtin_prefetch(soon, 0, 3);
    soon += LINE;
    if (--left == 0) {
      soon += (value ? stride - values : values) - d;
      left = d / LINE, value = !value;
    }
  }
};

// scores (n, HEADS) of keys, and their largest a head; there is room for KEYS - 1 more. Two features at a time:
// queries (d / 2, HEADS, 2)
inline PerHead score(const float* queries, Places& places, int64_t first, int64_t n, float* scores) {
  const float* const keys = places.keys + first * places.stride;
  const int64_t stride = places.stride, d = places.d;
  Lanes most[PARTED];
  for (Lanes& part : most) part = Lanes{} - INFINITY;
  for (int64_t j = 0; j < n; j += KEYS) {
    const float* key[KEYS];
    for (int i = 0; i < KEYS; i++) key[i] = keys + std::min(j + i, n - 1) * stride; // the last one stands in for none
    Lanes sum[KEYS * PAIRS] = {};
    for (int64_t line = 0; line < d; line += LINE)
#pragma GCC unroll 8
      for (int t = 0; t < LINE; t += 2) {
        const int64_t c = line + t;
        if (t % (16 / KEYS) == 0) places.fetch(); // half of the lines that KEYS places have; `weigh` fetches the others
        Lanes q[PAIRS];
#pragma GCC unroll 4
        for (int p = 0; p < PAIRS; p++) hold(q[p] = load<Lanes>(queries + c * HEADS + p * LANES));
#pragma GCC unroll 8
        for (int i = 0; i < KEYS; i++) {
          const Lanes k = both_of(key[i] + c);
#pragma GCC unroll 4
          for (int p = 0; p < PAIRS; p++) sum[i * PAIRS + p] += q[p] * k;
        }
      }
#pragma GCC unroll 16
    for (int u = 0; u < KEYS * PAIRS; u += 2) {
      const Lanes found = folded(sum[u], sum[u + 1]);
      store(scores + j * HEADS + u / 2 * LANES, found);
      most[u / 2 % PARTED] = larger(most[u / 2 % PARTED], found);
    }
  }
  return by_head(most, larger<PerHead>);
}

// WIDE features of ABREAST heads: what is there (ABREAST, d), times `keep`, and values (n), weighted by (n, HEADS)
inline void weigh(const float* weights, const float* values, int64_t n, const float* keep, Places& places, bool fetch, float* out) {
  const int64_t stride = places.stride, d = places.d;
  Lanes sum[ABREAST][PARTS];
#pragma GCC unroll 8
  for (int h = 0; h < ABREAST; h++)
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) sum[h][p] = load<Lanes>(out + h * d + p * LANES) * keep[h];
  for (int64_t j = 0; j < n; j++) {
    if (fetch) places.fetch();
    Lanes value[PARTS];
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) hold(value[p] = load<Lanes>(values + j * stride + p * LANES));
#pragma GCC unroll 8
    for (int h = 0; h < ABREAST; h++)
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; p++) sum[h][p] += weights[j * HEADS + h] * value[p];
  }
#pragma GCC unroll 8
  for (int h = 0; h < ABREAST; h++)
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) store(out + h * d + p * LANES, sum[h][p]);
}

// What heads make of some keys: values (HEADS, d) weighted by e^(score - most), the sums of these weights, and `most`
struct Attended {
  float *values, *totals, *most;
  Attended(float* memory, int64_t d) : values(memory), totals(memory + HEADS * d), most(totals + HEADS) {}
  static int64_t size(int64_t d) { return HEADS * (d + 2); }
};

// What a thread works in
struct Room {
  std::vector<Lanes> memory; // (d / 2, HEADS, 2): queries, turned and scaled; (d)
  float *queries, *turned;
  alignas(64) float scores[(TOGETHER + KEYS) * HEADS];
  explicit Room(int64_t d) : memory((HEADS + 1) * d / LANES) {
    queries = reinterpret_cast<float*>(memory.data()), turned = queries + HEADS * d;
  }
};

// up to HEADS queries (heads, d), turned by cosines and sines `turn_head` apart, over n keys and their values
void attend(const float* q, int64_t heads, const float* cos, const float* sin, int64_t turn_head, Places places, int64_t n,
            Room& room, Attended out) {
  const int64_t d = places.d;
  for (int64_t line = 0; line < 2 * FETCHED * d / LINE; line++) places.fetch();
  std::fill_n(room.queries, HEADS * d, 0.0f);
  for (int64_t h = 0; h < heads; h++) {
    const int64_t shift = h * turn_head;
    turn(q + h * d, cos ? cos + shift : nullptr, sin ? sin + shift : nullptr, d, room.turned);
    for (int64_t c = 0; c < d; c++) room.queries[(c / 2 * HEADS + h) * 2 + c % 2] = room.turned[c] / std::sqrt(float(d));
  }
  std::fill_n(out.values, HEADS * d, 0.0f);
  PerHead most = PerHead{} - INFINITY;
  Lanes totals[PARTED] = {};
  for (int64_t begin = 0; begin < n; begin += TOGETHER) {
    const int64_t count = std::min<int64_t>(TOGETHER, n - begin);
    const PerHead now = larger(most, score(room.queries, places, begin, count, room.scores));
    const PerHead keep = exponential(most - now);
    store(room.scores + count * HEADS, PerHead{} - INFINITY); // a register may hold two keys': the last one's has none
    for (int i = 0; i < PARTED; i++) totals[i] *= of_heads(keep, i);
    for (int64_t i = 0; i * LANES < count * HEADS; i++) {
      const Lanes weight = exponential(load<Lanes>(room.scores + i * LANES) - of_heads(now, i));
      store(room.scores + i * LANES, weight);
      totals[i % PARTED] += weight;
    }
    const float* values = places.keys + begin * places.stride + places.values;
    for (int64_t c = 0; c < d; c += WIDE)
      for (int64_t h = 0; h < heads; h += ABREAST)
        weigh(room.scores + h, values + c, count, reinterpret_cast<const float*>(&keep) + h, places, h == 0,
              out.values + h * d + c);
    most = now;
  }
  store(out.totals, by_head(totals, [](PerHead a, PerHead b) { return a + b; }));
  store(out.most, most);
}

} // namespace
