// What a layer does between its two products with weights in a decoding step on a CPU, one token a row, in one pass:
// keys and queries are turned, keys and values stored, attention is taken over what each row has, SwiGLU beside it.
// The plain twin is InTorch in packed_step.py. float32; head sizes are multiples of 16.

#include "vectors.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int KEYS = 8;    // keys whose scores are computed at once
constexpr int LINE = 16;   // floats of a cache line
constexpr int TOGETHER = 16; // keys read before their values are
constexpr int BLOCK = 512; // features of SwiGLU that one task takes

struct Sizes {
  int64_t rows, heads, kv_heads, d, ff, max_len;
  int64_t turn_place, turn_head; // floats from one position's, and one head's, cosines to the next
  int64_t window;              // keys that a query sees, itself included
};

// first half x, second y -> x cos - y sin, y cos + x sin; the sine's first half comes negated
void turn(const float* x, const float* cos, const float* sin, int64_t d, float* out) {
  if (!cos) return void(std::copy_n(x, d, out));
  const int64_t half = d / 2;
  for (int64_t c = 0; c < half; c++) out[c] = x[c] * cos[c] + x[c + half] * sin[c];
  for (int64_t c = half; c < d; c++) out[c] = x[c] * cos[c] + x[c - half] * sin[c];
}

// scores (n, HEADS) of the keys, and their largest a head; there is room for KEYS - 1 more
PerHead score(const float* queries, const float* keys, int64_t stride, int64_t n, int64_t d, float* scores) {
  PerHead most = PerHead{} - INFINITY;
  for (int64_t j = 0; j < n; j += KEYS) {
    const float* key[KEYS];
    for (int i = 0; i < KEYS; i++) key[i] = keys + std::min(j + i, n - 1) * stride; // the last one stands in for none
    for (int i = 0; i < KEYS; i++) // those of the next block
      for (int64_t c = 0; c < d; c += LINE) __builtin_prefetch(key[i] + TOGETHER * stride + c, 0, 2);
    PerHead sum[KEYS] = {};
    for (int64_t c = 0; c < d; c++) {
      const PerHead q = load<PerHead>(queries + c * HEADS);
#pragma GCC unroll 8
      for (int i = 0; i < KEYS; i++) sum[i] += q * key[i][c];
    }
#pragma GCC unroll 8
    for (int i = 0; i < KEYS; i++) {
      store(scores + (j + i) * HEADS, sum[i]);
      most = sum[i] > most ? sum[i] : most;
    }
  }
  return most;
}

// WIDE features of every head: what is there (HEADS, d), times `keep`, and the values (n), weighted by (n, HEADS)
void weigh(const float* weights, const float* values, int64_t stride, int64_t n, PerHead keep, float* out, int64_t d) {
  Features sum[HEADS];
#pragma GCC unroll 8
  for (int h = 0; h < HEADS; h++) sum[h] = load<Features>(out + h * d) * keep[h];
  for (int64_t j = 0; j < n; j++) {
    const Features value = load<Features>(values + j * stride);
    __builtin_prefetch(values + (j + TOGETHER) * stride, 0, 2);
#pragma GCC unroll 8
    for (int h = 0; h < HEADS; h++) sum[h] += weights[j * HEADS + h] * value;
  }
#pragma GCC unroll 8
  for (int h = 0; h < HEADS; h++) store(out + h * d, sum[h]);
}

// What a thread works in
struct Room {
  std::vector<float> queries, sums; // (d, HEADS), turned and scaled; (HEADS, d), of weighted values
  float scores[(TOGETHER + KEYS) * HEADS];
  explicit Room(int64_t d) : queries(d * HEADS), sums(HEADS * d) {}
};

// up to HEADS heads of one row over the keys (n) and values of one of its key heads: softmax(q k / sqrt(d)) v, with a
// running maximum (Milakov & Gimelshein, 1805.02867, algorithm 3), so that keys and values are read from memory once
void attend(const Sizes& s, const float* q, int heads, const float* cos, const float* sin, const float* keys, int64_t n,
            float* out, Room& room) {
  const int64_t d = s.d, stride = 2 * s.kv_heads * d;
  std::fill(room.queries.begin(), room.queries.end(), 0.0f);
  std::fill(room.sums.begin(), room.sums.end(), 0.0f);
  for (int h = 0; h < heads; h++) {
    const int64_t shift = h * s.turn_head;
    turn(q + h * d, cos ? cos + shift : nullptr, sin ? sin + shift : nullptr, d, out + h * d);
    for (int64_t c = 0; c < d; c++) room.queries[c * HEADS + h] = out[h * d + c] / std::sqrt(float(d));
  }
  PerHead most = PerHead{} - INFINITY, total = {};
  for (int64_t begin = 0; begin < n; begin += TOGETHER) {
    const int64_t count = std::min<int64_t>(TOGETHER, n - begin);
    const float* block = keys + begin * stride;
    const PerHead found = score(room.queries.data(), block, stride, count, d, room.scores);
    const PerHead now = found > most ? found : most, keep = exponential(most - now);
    total *= keep;
    for (int64_t j = 0; j < count; j++) {
      const PerHead weight = exponential(load<PerHead>(room.scores + j * HEADS) - now);
      store(room.scores + j * HEADS, weight);
      total += weight;
    }
    const float* values = block + s.kv_heads * d;
    for (int64_t c = 0; c < d; c += WIDE) weigh(room.scores, values + c, stride, count, keep, room.sums.data() + c, d);
    most = now;
  }
  for (int h = 0; h < heads; h++)
    for (int64_t c = 0; c < d; c++) out[h * d + c] = room.sums[h * d + c] / total[h];
}

} // namespace

// y (rows, (heads + 2 kv_heads) d + 2 ff) -> inner (rows, heads d + ff); memory (rows, max_len, 2, kv_heads, d);
// cos and sin of every position, both null where nothing is turned; lengths (rows): what each has in memory before
extern "C" void attend_and_gate(const Sizes* sizes, const float* y, const float* cos, const float* sin,
                                const int64_t* lengths, float* memory, float* inner) {
  const Sizes& s = *sizes;
  const int64_t d = s.d, q_width = s.heads * d, kv_width = s.kv_heads * d, slot = 2 * kv_width;
  const int64_t width = q_width + slot + 2 * s.ff, inner_width = q_width + s.ff;
  const int64_t group = s.heads / s.kv_heads, chunks = (group + HEADS - 1) / HEADS;
  const int64_t blocks = (s.ff + BLOCK - 1) / BLOCK, attends = s.kv_heads * chunks;
#pragma omp parallel
  {
    Room room(d);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < s.rows; r++) {
      float* kept = memory + (r * s.max_len + lengths[r]) * slot;
      const float* k = y + r * width + q_width;
      for (int64_t h = 0; h < s.kv_heads; h++) {
        const int64_t shift = lengths[r] * s.turn_place + (s.heads + h) * s.turn_head;
        turn(k + h * d, cos ? cos + shift : nullptr, sin ? sin + shift : nullptr, d, kept + h * d);
      }
      std::memcpy(kept + kv_width, k + kv_width, kv_width * sizeof(float));
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < s.rows * (attends + blocks); task++) {
      // the rows' attention first: it is the longer work
      if (task < s.rows * attends) {
        const int64_t r = task / attends, kv = task % attends / chunks, first = kv * group + task % chunks * HEADS;
        const int64_t heads = std::min<int64_t>(HEADS, (kv + 1) * group - first), end = lengths[r] + 1;
        const int64_t begin = std::max<int64_t>(0, end - s.window), shift = lengths[r] * s.turn_place + first * s.turn_head;
        attend(s, y + r * width + first * d, heads, cos ? cos + shift : nullptr, sin ? sin + shift : nullptr,
               memory + (r * s.max_len + begin) * slot + kv * d, end - begin, inner + r * inner_width + first * d, room);
      } else {
        const int64_t rest = task - s.rows * attends, r = rest / blocks, c = rest % blocks * BLOCK;
        const float* value = y + r * width + q_width + slot + c;
        swiglu(value, value + s.ff, std::min<int64_t>(BLOCK, s.ff - c), inner + r * inner_width + q_width + c);
      }
    }
  }
}
