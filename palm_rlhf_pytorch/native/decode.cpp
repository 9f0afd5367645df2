// A decoding step on a CPU, one token a row, all layers of it: norm, queries, keys and values, these turned and stored,
// attention over what each row has and beside it the way into SwiGLU, then both ways out as one. A few tokens of a
// prompt are a step too, of as many rows, which share memory. Several steps are one call where what is drawn from one is
// the next one's. The plain twin is PackedStep, of prompts PaLM. float32; head sizes are multiples of 16.

#include "attend.h"
#include "draw.h"
#include "layout.h"
#include "panels.h"

#include <atomic>

extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();

namespace {

constexpr int SPAN = 512;  // keys of a row that one task attends to. native_step.py knows it too

// What native_step.py says of a layer, in its order
struct Layer {
  const float *gain, *qkv, *gated, *out; // of the norm; (dim, qkv), (dim, ff) twice and (attention + ff, dim) in panels,
                                         // of a layer that is computed beforehand (attention, dim) alone
  int64_t turns, window; // whether places count; keys that a query sees, itself included
  double eps;
};

// ... and of a step
struct Step {
  int64_t rows, dim, heads, kv_heads, d, ff, vocab, depth, max_len;
  int64_t layer_memory, turn_place, turn_head; // floats from one layer's memory, one position's and one head's cosines to the next
  const Layer* layers;
  float* tokens;          // (rows, dim), or with `computed` (rows, qkv + dim)
  int64_t computed;       // whether these are queries, keys and values of the first layer, and what adds up but its attention
  const int64_t* places;  // (rows), where each is in memory
  int64_t* lengths;       // (rows), what each has there before
  int64_t spans;          // of SPAN keys that the longest row has then
  const float *cos, *sin; // of every position
  float* memory;          // (depth, places, max_len, 2, kv_heads, d)
  const float *gain, *to_logits;
  double eps;
  float *room, *logits; // to work in, `room_of` numbers; (rows, vocab), null where none are wanted

  int64_t attention() const { return heads * d; }
  int64_t slot() const { return 2 * kv_heads * d; }
  int64_t qkv() const { return attention() + slot(); }
  int64_t mixed() const { return attention() + ff; } // what a layer adds up
  int64_t group() const { return heads / kv_heads; }
  int64_t chunks() const { return (group() + HEADS - 1) / HEADS; } // of the heads that share keys
  int64_t parts() const { return rows * kv_heads * chunks() * spans; } // of attention
};

// ... and of steps one after the other, each of tokens that were drawn in the one before
struct Ahead {
  const Step* step; // whose tokens and lengths are written anew for each; it has spans enough for the last one
  const Call* draw; // from its logits; tokens and log-probs have room for (steps, rows), uniform has so many numbers
  int64_t steps;
  const float* table;        // (vocab, width), what a step is given of a token
  int64_t width;
  const int64_t *first, *ends; // tokens (rows); those after which a row is done,
  int64_t end_count;           // and how many these are
  double logit_scale;
};

// the sum of f(x) over n features
template <typename F> float sum_of(const float* x, int64_t n, F f) {
  Lanes sums = {};
  const int64_t whole = n / LANES * LANES;
  for (int64_t c = 0; c < whole; c += LANES) sums += f(load<Lanes>(x + c));
  float sum = 0.0f;
  for (int i = 0; i < LANES; i++) sum += sums[i];
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

// y (rows, qkv), `stride` floats apart: keys and values go into a layer's memory
void remember(const Step& s, const Layer& layer, const float* y, int64_t stride, float* memory) {
  const int64_t kv_width = s.kv_heads * s.d;
#pragma omp for schedule(static)
  for (int64_t r = 0; r < s.rows; r++) {
    float* kept = memory + (s.places[r] * s.max_len + s.lengths[r]) * s.slot();
    const float* k = y + r * stride + s.attention();
    for (int64_t h = 0; h < s.kv_heads; h++) {
      const int64_t shift = s.lengths[r] * s.turn_place + (s.heads + h) * s.turn_head;
      turn(k + h * s.d, layer.turns ? s.cos + shift : nullptr, layer.turns ? s.sin + shift : nullptr, s.d, kept + h * s.d);
    }
    std::copy_n(k + kv_width, kv_width, kept + kv_width);
  }
}

// A part of attention: some heads of a row, over one of its spans of keys. Spans begin where the row's window does.
struct Part {
  int64_t row, kv, first, heads, span, begin, end; // the first of the heads; keys
  Part(const Step& s, const Layer& layer, int64_t task) : row(task / s.spans / s.chunks() / s.kv_heads), span(task % s.spans) {
    const int64_t chunk = task / s.spans % s.chunks(), length = s.lengths[row] + 1;
    kv = task / s.spans / s.chunks() % s.kv_heads, first = kv * s.group() + chunk * HEADS;
    heads = std::min<int64_t>(HEADS, (kv + 1) * s.group() - first);
    begin = std::max<int64_t>(0, length - layer.window) + span * SPAN, end = std::min<int64_t>(length, begin + SPAN);
  }
};

// queries in y (rows, ...), `stride` apart -> what each part makes of its keys
void attend(const Step& s, const Layer& layer, const float* y, int64_t stride, const float* memory, int64_t task, Room& room,
            float* parts) {
  const Part part(s, layer, task);
  if (part.begin >= part.end) return;
  const int64_t shift = s.lengths[part.row] * s.turn_place + part.first * s.turn_head;
  const float* keys = memory + (s.places[part.row] * s.max_len + part.begin) * s.slot() + part.kv * s.d;
  const auto over = [&](auto places) {
    attend(y + part.row * stride + part.first * s.d, part.heads, layer.turns ? s.cos + shift : nullptr,
           layer.turns ? s.sin + shift : nullptr, s.turn_head, places, part.end - part.begin, room,
           Attended(parts + task * Attended::size(s.d), s.d));
  };
  if (s.kv_heads == 1) over(Places<false>(keys, s.slot(), s.d, s.d));
  else over(Places<true>(keys, s.slot(), s.kv_heads * s.d, s.d));
}

// what the parts of a row's attention make together -> laid out by `rows`, the first of so many features
void unite(const Step& s, const Layer& layer, float* parts, const Rows& rows, int64_t features, float* laid) {
#pragma omp for schedule(static) collapse(2)
  for (int64_t first = 0; first < rows.count; first += rows.size)
    for (int64_t head = 0; head < s.heads; head++)
      for (int64_t r = first; r < first + rows.of_block(first); r++) {
        const int64_t many = rows.of_block(first), of_keys = head / s.group(), h = head % s.group() % HEADS;
        const int64_t task = ((r * s.kv_heads + of_keys) * s.chunks() + head % s.group() / HEADS) * s.spans;
        const int64_t seen = std::min(layer.window, s.lengths[r] + 1), spans = (seen + SPAN - 1) / SPAN;
        const auto part = [&](int64_t span) { return Attended(parts + (task + span) * Attended::size(s.d), s.d); };
        float most = -INFINITY, total = 0.0f;
        for (int64_t i = 0; i < spans; i++) most = std::max(most, part(i).most[h]);
        for (int64_t i = 0; i < spans; i++) total += std::exp2(part(i).most[h] - most) * part(i).totals[h];
        float* const to = laid + first * features + head * s.d * many + r - first;
        for (int64_t i = 0; i < spans; i++) {
          const float times = std::exp2(part(i).most[h] - most) / total, *values = part(i).values + h * s.d;
          for (int64_t c = 0; c < s.d; c++) to[c * many] = (i ? to[c * many] : 0.0f) + times * values[c];
        }
      }
}

// Tasks of two kinds, by the threads of a region: those of the one compute and those of the other wait for memory, so
// half of the threads begin with each, and nobody waits for the others until all is done. A thread takes neighbours
// together, fewer and fewer of them: what prefetchers bring before its turn then seldom is another thread's.
template <typename One, typename Other>
void by_turns(std::atomic<int64_t>* next, int64_t ones, One one, int64_t others, Other other) {
  const auto take = [](std::atomic<int64_t>& next, int64_t count, const auto& run) {
    for (int64_t from = next; from < count;) {
      const int64_t some = std::max<int64_t>(1, (count - from) / (2 * omp_get_num_threads()));
      if (!next.compare_exchange_weak(from, from + some)) continue;
      for (int64_t task = from; task < from + some; task++) run(task);
      from = next;
    }
  };
  const bool begins = omp_get_thread_num() % 2;
  for (const bool second : {begins, !begins})
    if (second) take(next[1], others, other);
    else take(next[0], ones, one);
#pragma omp barrier
}

void step(const Step& s) {
  const Rows rows(s.rows);
  float *parts = s.room, *x = parts + s.parts() * Attended::size(s.d), *normed = x + s.rows * s.dim;
  float *mixed = normed + s.rows * s.dim, *y = mixed + s.rows * s.mixed();
  std::atomic<int64_t> next[2];
#pragma omp parallel
  {
    Room room(s.d);
    const auto norm = [&](const float* gain, double eps) {
#pragma omp for schedule(static)
      for (int64_t first = 0; first < s.rows; first += rows.size) // one thread writes a block's lines
        for (int64_t r = first; r < first + rows.of_block(first); r++)
          normalise(x + r * s.dim, gain, eps, s.dim, normed + rows.begin(r, s.dim), rows.of_block(first));
    };
    const int64_t given_width = s.computed ? s.qkv() + s.dim : s.dim;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < s.rows; r++)
      std::copy_n(s.tokens + (r + 1) * given_width - s.dim, s.dim, x + r * s.dim);
    for (int64_t i = 0; i < s.depth; i++) {
      const Layer& layer = s.layers[i];
      const bool computed = s.computed && i == 0;
      const float* projected = computed ? s.tokens : y;
      float* memory = s.memory + i * s.layer_memory;
      const int64_t stride = computed ? given_width : s.qkv(), ff = computed ? 0 : s.ff, features = s.attention() + ff;
      if (!computed) {
        norm(layer.gain, layer.eps);
        product({normed, rows, layer.qkv, {s.dim, panels_of(s.qkv())}}, s.qkv(), nullptr, y);
      }
#pragma omp single nowait
      next[0] = next[1] = 0;
      remember(s, layer, projected, stride, memory);
      const Multiplied into{normed, rows, layer.gated, {s.dim, 2 * panels_of(ff)}};
      by_turns(next, s.parts(), [&](int64_t task) { attend(s, layer, projected, stride, memory, task, room, parts); },
               panels_of(ff), [&](int64_t panel) { gated(into, panel, ff, mixed, features, s.attention()); });
      unite(s, layer, parts, rows, features, mixed);
      product({mixed, rows, layer.out, {features, panels_of(s.dim)}}, s.dim, x, x);
    }
    if (s.logits) {
      norm(s.gain, s.eps);
      product({normed, rows, s.to_logits, {s.dim, panels_of(s.vocab)}}, s.vocab, nullptr, s.logits);
    }
  }
}

// whether a row ends with what was drawn, or was drawn from no numbers
bool any_done(const Ahead& a, const Call& drawn) {
  for (int64_t r = 0; r < drawn.rows; r++)
    if (std::count(a.ends, a.ends + a.end_count, drawn.tokens[r]) || !std::isfinite(drawn.log_probs[r])) return true;
  return false;
}

} // namespace

// weight (outputs, own) -> inputs `begin` and on of every `step`th of the panels from `first` on, filled up with 0
extern "C" void pack(const float* weight, float* to, int64_t outputs, int64_t own, int64_t begin, int64_t inputs, int64_t first,
                     int64_t step) {
  const Panels panels{inputs, panels_of(outputs) * step};
#pragma omp parallel for schedule(static)
  for (int64_t o = 0; o < outputs; o += WIDE) {
    const int64_t panel = first + o / WIDE * step;
    lay_out<WIDE>({weight + o * own, own, 1}, std::min<int64_t>(WIDE, outputs - o), own,
                  [&](int64_t, int64_t i) { return to + panels.at(panel, begin + i); });
  }
}

extern "C" int64_t room_of(const Step* s) {
  return s->parts() * Attended::size(s->d) + s->rows * (2 * s->dim + s->mixed() + s->qkv());
}

extern "C" void step(const Step* given) { step(*given); }

// until a row is done; how many steps that were
extern "C" int64_t steps(const Ahead* given) {
  const Ahead& a = *given;
  const Step& s = *a.step;
  Call call = *a.draw;
  const int64_t* tokens = a.first;
  for (int64_t i = 0; i < a.steps; i++) {
    for (int64_t r = 0; r < s.rows; r++) std::copy_n(a.table + tokens[r] * a.width, a.width, s.tokens + r * a.width);
    step(s);
    if (a.logit_scale != 1)
#pragma omp parallel for
      for (int64_t j = 0; j < s.rows * s.vocab; j++) s.logits[j] *= float(a.logit_scale);
    draw(call);
    for (int64_t r = 0; r < s.rows; r++) s.lengths[r]++;
    tokens = call.tokens;
    if (any_done(a, call)) return i + 1;
    call.tokens += s.rows, call.log_probs += s.rows;
    if (call.uniform) call.uniform += s.rows;
  }
  return a.steps;
}

extern "C" int64_t size_of_step() { return sizeof(Step); }
extern "C" int64_t size_of_layer() { return sizeof(Layer); }
extern "C" int64_t size_of_ahead() { return sizeof(Ahead); }
