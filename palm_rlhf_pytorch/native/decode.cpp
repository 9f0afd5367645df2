// A decoding step on a CPU, one token a row, all layers of it: norm, products with weights in panels, and between them
// keys and queries turned, keys and values stored, attention over what each row has, SwiGLU beside it. The plain twin
// is PackedStep. float32; head sizes are multiples of 16.

#include "panels.h"

#include <vector>

namespace {

constexpr int KEYS = 8;      // keys whose scores are computed at once
constexpr int LINE = 16;     // floats of a cache line
constexpr int TOGETHER = 16; // keys read before their values are
constexpr int FETCHED = 32;  // keys, and values, fetched before their turn
constexpr int BLOCK = 512;   // features of SwiGLU that one task takes

// What native_step.py says of a layer, in its order
struct Layer {
  const float *gain, *into, *out; // of the norm; (dim, width) and (inner, dim) in panels
  int64_t turns, window;          // whether places count; keys that a query sees, itself included
  double eps;
};

// ... and of a step
struct Step {
  int64_t rows, dim, heads, kv_heads, d, ff, vocab, depth, max_len;
  int64_t layer_memory, turn_place, turn_head; // floats from one layer's memory, one position's and one head's cosines to the next
  const Layer* layers;
  float* tokens;          // (rows, dim), or with `computed` (rows, qkv + dim), which is worked in
  int64_t computed;       // whether these are queries, keys and values of the first layer, and what adds up but its attention
  const int64_t* lengths; // (rows), what each has in memory before
  const float *cos, *sin; // of every position
  float* memory;          // (depth, rows or more, max_len, 2, kv_heads, d)
  const float *gain, *to_logits;
  double eps;
  float *room, *logits; // to work in; (rows, vocab)

  int64_t attention() const { return heads * d; }
  int64_t slot() const { return 2 * kv_heads * d; }
  int64_t qkv() const { return attention() + slot(); }
  int64_t width() const { return qkv() + 2 * ff; }
  int64_t inner() const { return attention() + ff; }
};

// first half x, second y -> x cos - y sin, y cos + x sin; the sine's first half comes negated
void turn(const float* x, const float* cos, const float* sin, int64_t d, float* out) {
  if (!cos) return void(std::copy_n(x, d, out));
  const int64_t half = d / 2;
  for (int64_t c = 0; c < half; c++) out[c] = x[c] * cos[c] + x[c + half] * sin[c];
  for (int64_t c = half; c < d; c++) out[c] = x[c] * cos[c] + x[c - half] * sin[c];
}

// the sum of f(x) over n features
template <typename F> float sum_of(const float* x, int64_t n, F f) {
  Features sums = {};
  const int64_t whole = n / WIDE * WIDE;
  for (int64_t c = 0; c < whole; c += WIDE) sums += f(load<Features>(x + c));
  float sum = 0.0f;
  for (int i = 0; i < WIDE; i++) sum += sums[i];
  for (int64_t c = whole; c < n; c++) sum += f(x[c]);
  return sum;
}

// layer normalisation of n features, with the gain and no bias -> out, every `step` floats
void normalise(const float* x, const float* gain, double eps, int64_t n, float* out, int64_t step) {
  const float mean = sum_of(x, n, [](auto v) { return v; }) / n;
  const float variance = sum_of(x, n, [&](auto v) { return (v - mean) * (v - mean); }) / n;
  const float scale = 1.0f / std::sqrt(variance + float(eps));
  for (int64_t c = 0; c < n; c++) out[c * step] = (x[c] - mean) * scale * gain[c];
}

// scores (n, HEADS) of the keys, and their largest a head; there is room for KEYS - 1 more
PerHead score(const float* queries, const float* keys, int64_t stride, int64_t n, int64_t d, float* scores) {
  PerHead most = PerHead{} - INFINITY;
  for (int64_t j = 0; j < n; j += KEYS) {
    const float* key[KEYS];
    for (int i = 0; i < KEYS; i++) key[i] = keys + std::min(j + i, n - 1) * stride; // the last one stands in for none
    for (int i = 0; i < KEYS; i++)
      for (int64_t c = 0; c < d; c += LINE) __builtin_prefetch(key[i] + FETCHED * stride + c, 0, 2);
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
    __builtin_prefetch(values + (j + FETCHED) * stride, 0, 2);
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
void attend(const Step& s, const float* q, int64_t heads, const float* cos, const float* sin, const float* keys,
            int64_t n, float* out, Room& room) {
  const int64_t d = s.d, stride = s.slot();
  float* const sums = room.sums.data();
  std::fill(room.queries.begin(), room.queries.end(), 0.0f);
  for (int64_t h = 0; h < heads; h++) {
    const int64_t shift = h * s.turn_head;
    turn(q + h * d, cos ? cos + shift : nullptr, sin ? sin + shift : nullptr, d, sums);
    for (int64_t c = 0; c < d; c++) room.queries[c * HEADS + h] = sums[c] / std::sqrt(float(d));
  }
  std::fill_n(sums, HEADS * d, 0.0f);
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
    for (int64_t c = 0; c < d; c += WIDE) weigh(room.scores, values + c, stride, count, keep, sums + c, d);
    most = now;
  }
  for (int64_t h = 0; h < heads; h++)
    for (int64_t c = 0; c < d; c++) out[h * d + c] = sums[h * d + c] / total[h];
}

// y (rows, qkv), `stride` floats apart: keys and values go into a layer's memory
void remember(const Step& s, const Layer& layer, const float* y, int64_t stride, float* memory) {
  const int64_t kv_width = s.kv_heads * s.d;
#pragma omp for schedule(static)
  for (int64_t r = 0; r < s.rows; r++) {
    float* kept = memory + (r * s.max_len + s.lengths[r]) * s.slot();
    const float* k = y + r * stride + s.attention();
    for (int64_t h = 0; h < s.kv_heads; h++) {
      const int64_t shift = s.lengths[r] * s.turn_place + (s.heads + h) * s.turn_head;
      turn(k + h * s.d, layer.turns ? s.cos + shift : nullptr, layer.turns ? s.sin + shift : nullptr, s.d, kept + h * s.d);
    }
    std::copy_n(k + kv_width, kv_width, kept + kv_width);
  }
}

// y (rows, qkv + 2 ff): attention in the place of its queries, SwiGLU in that of its values; `ff` may be 0
void attend_and_gate(const Step& s, const Layer& layer, float* y, int64_t stride, int64_t ff, const float* memory,
                     Room& room) {
  const int64_t group = s.heads / s.kv_heads, chunks = (group + HEADS - 1) / HEADS, attends = s.kv_heads * chunks;
  const int64_t blocks = (ff + BLOCK - 1) / BLOCK;
#pragma omp for schedule(dynamic)
  for (int64_t task = 0; task < s.rows * (attends + blocks); task++) {
    // the rows' attention first: it is the longer work
    if (task < s.rows * attends) {
      const int64_t r = task / attends, kv = task % attends / chunks, first = kv * group + task % chunks * HEADS;
      const int64_t heads = std::min<int64_t>(HEADS, (kv + 1) * group - first), end = s.lengths[r] + 1;
      const int64_t begin = std::max<int64_t>(0, end - layer.window);
      const int64_t shift = s.lengths[r] * s.turn_place + first * s.turn_head;
      float* q = y + r * stride + first * s.d;
      attend(s, q, heads, layer.turns ? s.cos + shift : nullptr, layer.turns ? s.sin + shift : nullptr,
             memory + (r * s.max_len + begin) * s.slot() + kv * s.d, end - begin, q, room);
    } else {
      const int64_t rest = task - s.rows * attends, r = rest / blocks, c = rest % blocks * BLOCK;
      float* value = y + r * stride + s.qkv() + c;
      swiglu(value, value + ff, std::min<int64_t>(BLOCK, ff - c), value);
    }
  }
}

// what these left in y (rows, `stride` apart) -> inner (attention + ff), laid out by `rows`: a thread writes whole lines
void lay_out(const Step& s, const float* y, int64_t stride, int64_t ff, const Rows& rows, float* inner) {
  const int64_t features = s.attention() + ff, chunks = (features + LINE - 1) / LINE;
#pragma omp for schedule(static) collapse(2)
  for (int64_t first = 0; first < rows.count; first += rows.size)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const int64_t many = rows.of_block(first);
      for (int64_t c = chunk * LINE; c < std::min(features, (chunk + 1) * LINE); c++) {
        const float* from = y + first * stride + (c < s.attention() ? c : c + s.slot());
        for (int64_t r = 0; r < many; r++) inner[first * features + c * many + r] = from[r * stride];
      }
    }
}

} // namespace

// weight (outputs, inputs) -> panels (ceil(outputs / WIDE), inputs, WIDE), filled up with 0
extern "C" void pack(const float* weight, int64_t outputs, int64_t inputs, float* panels) {
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < (outputs + WIDE - 1) / WIDE; p++)
    for (int64_t k = 0; k < inputs; k++)
      for (int64_t i = 0; i < WIDE; i++) {
        const int64_t o = p * WIDE + i;
        panels[(p * inputs + k) * WIDE + i] = o < outputs ? weight[o * inputs + k] : 0.0f;
      }
}

extern "C" void step(const Step* given) {
  const Step& s = *given;
  const Rows rows(s.rows);
  float *x = s.room, *laid = x + s.rows * s.dim, *y = laid + s.rows * std::max(s.dim, s.inner());
#pragma omp parallel
  {
    Room room(s.d);
    const auto normed = [&](const float* gain, double eps) {
#pragma omp for schedule(static)
      for (int64_t first = 0; first < s.rows; first += rows.size) // one thread writes a block's lines
        for (int64_t r = first; r < first + rows.of_block(first); r++)
          normalise(x + r * s.dim, gain, eps, s.dim, laid + rows.begin(r, s.dim), rows.of_block(first));
    };
    const int64_t given_width = s.computed ? s.qkv() + s.dim : s.dim;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < s.rows; r++)
      std::copy_n(s.tokens + (r + 1) * given_width - s.dim, s.dim, x + r * s.dim);
    for (int64_t i = 0; i < s.depth; i++) {
      const Layer& layer = s.layers[i];
      const bool computed = s.computed && i == 0;
      float* projected = computed ? s.tokens : y;
      const int64_t stride = computed ? given_width : s.width(), ff = computed ? 0 : s.ff;
      float* memory = s.memory + i * s.layer_memory;
      if (!computed) {
        normed(layer.gain, layer.eps);
        product(laid, rows, layer.into, s.dim, s.width(), nullptr, y);
      }
      remember(s, layer, projected, stride, memory);
      attend_and_gate(s, layer, projected, stride, ff, memory, room);
      lay_out(s, projected, stride, ff, rows, laid);
      product(laid, rows, layer.out, s.attention() + ff, s.dim, x, x);
    }
    normed(s.gain, s.eps);
    product(laid, rows, s.to_logits, s.dim, s.vocab, nullptr, s.logits);
  }
}

extern "C" int64_t size_of_step() { return sizeof(Step); }
extern "C" int64_t size_of_layer() { return sizeof(Layer); }
