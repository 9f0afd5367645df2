// Attention of one token, up to 8 heads of it on the same keys, with a running maximum (Milakov & Gimelshein, 1805.02867,
// algorithm 3), so that keys and values are read from memory once.

#pragma once

#include "turn.h"
#include "vectors.h"

#include <cmath>
#include <utility>
#include <vector>

namespace {

constexpr int HEADS = 8;                                   // heads computed at once, all on the same keys
constexpr int KEYS = LANES == 16 ? 8 : LANES == 8 ? 6 : 4; // keys whose scores are computed at once,
constexpr int ABREAST = LANES == 16 ? 8 : 4;               // and heads to which WIDE features of a value are added
constexpr int TOGETHER = 24;                               // keys read before their values are: a multiple of KEYS
constexpr int FETCHED = 32; // places whose keys and values are fetched before their turn

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

// Where `folded` finds neighbours. In registers of 8 it is several times faster to keep to their halves.
constexpr int neighbour(int i) { return LANES == 8 ? i / 4 * 4 + i % 2 * 2 + i / 2 % 2 * LANES : 2 * i; }

// ... and where a head is put, for them to come out in order: in registers of 8 0 1 4 5, 2 3 6 7
inline int64_t seat(int64_t head) { return LANES == 8 ? head / 4 * 2 + head / 2 % 2 * 4 + head % 2 : head; }

template <int... I> inline Lanes picked(Lanes a, Lanes b, std::integer_sequence<int, I...>, int from) {
#ifdef __clang__
  return from ? __builtin_shufflevector(a, b, (neighbour(I) + 1)...) : __builtin_shufflevector(a, b, neighbour(I)...);
#else
  return __builtin_shuffle(a, b, Ints<Lanes>::type{neighbour(I)...} + from);
#endif
}

// the sums of neighbours, a's and then b's
inline Lanes folded(Lanes a, Lanes b) {
  const auto all = std::make_integer_sequence<int, LANES>();
  return picked(a, b, all, 0) + picked(a, b, all, 1);
}

// Keys and values of one head, place by place, and what of them is to come from memory soon: line by line as they lie
// there, for which memory is faster than for all keys and then all values. APART: other heads' lie between them.
template <bool APART> struct Places {
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
    if (APART && --left == 0) {
      soon += (value ? stride - values : values) - d;
      left = d / LINE, value = !value;
    }
  }
};

// scores (n, HEADS) of keys, filled up to a multiple of KEYS, and the largest of a head. Two features at a time:
// queries (d / 2, HEADS in their seats, 2). Inlined, GCC would put sums of it and of `weigh` into memory.
template <bool APART>
__attribute__((noinline)) void score(const float* queries, Places<APART>& places, int64_t first, int64_t n, float* scores,
                                     PerHead& largest) {
  const int64_t stride = places.stride, d = places.d;
  Places<APART> fetching = places; // in registers
  for (int64_t j = 0; j < n; j += KEYS) {
    const float* key[KEYS] = {places.keys + (first + j) * stride};
    for (int i = 1; i < KEYS; i++) key[i] = key[i - 1] + (j + i < n ? stride : 0); // the last one stands in for none
    Lanes sum[KEYS * PAIRS] = {};
    for (int64_t line = 0; line < d; line += LINE)
#pragma GCC unroll 8
      for (int t = 0; t < LINE / 2; t++) {
        const int64_t c = line + 2 * t;
        // half of the lines that KEYS places have; `weigh` fetches the others
        if ((t + 1) * KEYS / (LINE / 2) > t * KEYS / (LINE / 2)) fetching.fetch();
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
    for (int u = 0; u < KEYS * PAIRS; u += 2) store(scores + j * HEADS + u / 2 * LANES, folded(sum[u], sum[u + 1]));
  }
  places = fetching;
  Lanes most[PARTED];
  for (Lanes& part : most) part = Lanes{} - INFINITY;
  for (int64_t j = 0; j < n; j += KEYS)
#pragma GCC unroll 8
    for (int i = 0; i < KEYS * HEADS / LANES; i++)
      most[i % PARTED] = larger(most[i % PARTED], load<Lanes>(scores + j * HEADS + i * LANES));
  largest = by_head(most, larger<PerHead>);
}

// scores (n, HEADS), filled up as above -> 2^(score - most); their sums a head are added to `totals`
inline void to_weights(float* scores, int64_t n, PerHead most, Lanes (&totals)[PARTED]) {
  constexpr int MANY = KEYS * HEADS / LANES;
  for (int64_t j = n; j % KEYS; j++) store(scores + j * HEADS, PerHead{} - INFINITY);
  for (int64_t j = 0; j < n; j += KEYS) {
    float* const from = scores + j * HEADS;
    Lanes weight[MANY];
#pragma GCC unroll 8
    for (int i = 0; i < MANY; i++) weight[i] = load<Lanes>(from + i * LANES) - of_heads(most, i % PARTED);
    powers_of_two(weight);
#pragma GCC unroll 8
    for (int i = 0; i < MANY; i++) {
      store(from + i * LANES, weight[i]);
      totals[i % PARTED] += weight[i];
    }
  }
}

// WIDE features of ABREAST heads: what is there (ABREAST, d), times `keep`, and values (n), weighted by (n, HEADS)
template <bool FETCH, bool APART>
__attribute__((noinline)) void weigh(const float* weights, const float* values, int64_t n, const float* keep,
                                     Places<APART>& places, float* out) {
  const int64_t stride = places.stride, d = places.d;
  Places<APART> fetching = places;
  Lanes sum[ABREAST][PARTS];
#pragma GCC unroll 8
  for (int h = 0; h < ABREAST; h++)
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) sum[h][p] = load<Lanes>(out + h * d + p * LANES) * keep[h];
#pragma GCC unroll 2
  for (int64_t j = 0; j < n; j++) {
    if (FETCH) fetching.fetch();
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
  if (FETCH) places = fetching;
}

// What heads make of some keys: values (HEADS, d) weighted by 2^(score - most), the sums of these weights, and `most`
struct Attended {
  float *values, *totals, *most;
  Attended(float* memory, int64_t d) : values(memory), totals(memory + HEADS * d), most(totals + HEADS) {}
  static int64_t size(int64_t d) { return HEADS * (d + 2); }
};

// What a thread works in
struct Room {
  std::vector<Lanes> memory; // (d / 2, HEADS, 2): queries, turned and scaled, for scores to base 2; (d)
  float *queries, *turned;
  alignas(64) float scores[TOGETHER * HEADS];
  explicit Room(int64_t d) : memory((HEADS + 1) * d / LANES) {
    queries = reinterpret_cast<float*>(memory.data()), turned = queries + HEADS * d;
  }
};

// up to HEADS queries (heads, d), turned by cosines and sines `turn_head` apart, over n keys and their values
template <bool APART>
void attend(const float* q, int64_t heads, const float* cos, const float* sin, int64_t turn_head, Places<APART> places,
            int64_t n, Room& room, Attended out) {
  const int64_t d = places.d;
  const float scale = 1.44269504088896341f / std::sqrt(float(d)); // log2(e)
  for (int64_t line = 0; line < 2 * std::min<int64_t>(FETCHED, n) * d / LINE; line++) places.fetch();
  std::fill_n(room.queries, HEADS * d, 0.0f);
  for (int64_t h = 0; h < heads; h++) {
    const int64_t shift = h * turn_head;
    turn(q + h * d, cos ? cos + shift : nullptr, sin ? sin + shift : nullptr, d, room.turned);
    for (int64_t c = 0; c < d; c++) room.queries[(c / 2 * HEADS + seat(h)) * 2 + c % 2] = room.turned[c] * scale;
  }
  std::fill_n(out.values, HEADS * d, 0.0f);
  PerHead most = PerHead{} - INFINITY;
  Lanes totals[PARTED] = {};
  for (int64_t begin = 0; begin < n; begin += TOGETHER) {
    const int64_t count = std::min<int64_t>(TOGETHER, n - begin);
    PerHead now;
    score(room.queries, places, begin, count, room.scores, now);
    now = larger(most, now);
    PerHead keep[1] = {most - now};
    powers_of_two(keep);
    for (int i = 0; i < PARTED; i++) totals[i] *= of_heads(keep[0], i);
    to_weights(room.scores, count, now, totals);
    const float* const values = places.keys + begin * places.stride + places.values;
    const float* const kept = reinterpret_cast<const float*>(keep);
    for (int64_t c = 0; c < d; c += WIDE) {
      weigh<true>(room.scores, values + c, count, kept, places, out.values + c);
      for (int64_t h = ABREAST; h < heads; h += ABREAST)
        weigh<false>(room.scores + h, values + c, count, kept + h, places, out.values + h * d + c);
    }
    most = now;
  }
  store(out.totals, by_head(totals, [](PerHead a, PerHead b) { return a + b; }));
  store(out.most, most);
}

} // namespace
