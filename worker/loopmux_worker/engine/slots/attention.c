/* Attention of single queries to KV rows, one layer of a step; called by native.py, which compiles it for a shape:

   SIZE      numbers of a head, a multiple of 16
   FOLDED    query heads for each key head
   TOGETHER  of them that are computed at once, a divisor of FOLDED
   WIDTH     vectors of a value that are summed up at once, a divisor of SIZE / 16
   BF16      1: bfloat16, 0: float

   Everything is computed in float. What a token gets depends on its own row and position alone: its keys are taken in
   blocks from the first that it sees, and never shared out between threads. */

#include <stdint.h>
#include <string.h>

#ifndef __AVX512F__
#error "the processor has no AVX-512" /* without, this took twice as long as torch */
#endif

#define LANES 16
#define PARTS (SIZE / LANES)
#define BLOCK 64    /* keys whose scores are kept: as long as the sums of values are not scaled again */
#define AHEAD 4096  /* bytes that are asked for in advance; without, memory answered at two thirds of its speed */

typedef float vector __attribute__((vector_size(64)));
typedef int32_t integers __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (integers){__VA_ARGS__})
#endif

#if BF16

typedef uint16_t number;
typedef uint16_t halves __attribute__((vector_size(32)));

static inline vector load(const number *from) {
  halves bits;
  memcpy(&bits, from, sizeof bits);
  return (vector)(__builtin_convertvector(bits, words) << 16);
}

static inline void store(number *to, vector x) { /* to the nearest, ties to even */
  words bits = (words)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (words)(x != x);
  halves short_bits = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), halves);
  memcpy(to, &short_bits, sizeof short_bits);
}

#else

typedef float number;

static inline vector load(const number *from) {
  vector x;
  memcpy(&x, from, sizeof x);
  return x;
}

static inline void store(number *to, vector x) { memcpy(to, &x, sizeof x); }

#endif

static inline void fetch(const number *from) {
  for (int byte = 0; byte < SIZE * (int)sizeof *from; byte += 64) __builtin_prefetch((const char *)from + AHEAD + byte);
}

static inline vector all(float x) { return (vector){0} + x; }

static inline vector larger(vector a, vector b) {
  integers more = a > b;
  return (vector)(((integers)a & more) | ((integers)b & ~more));
}

static inline float largest(vector x) {
  float found = x[0];
  for (int i = 1; i < LANES; i++) found = x[i] > found ? x[i] : found;
  return found;
}

static inline float sum(vector x) {
  float found = 0;
  for (int i = 0; i < LANES; i++) found += x[i];
  return found;
}

/* 2 to the x, for x <= 0: the Taylor series around the nearest integer, within 2e-7; 0 below the normal numbers. */
static inline vector exp2_of(vector x) {
  const float shift = 12582912; /* 1.5 * 2^23: the sum's last bits are the nearest integer */
  vector shifted = x + shift, rest = x - (shifted - shift);
  vector series = rest * 1.54035304e-4f + 1.33335581e-3f;
  series = series * rest + 9.61812911e-3f;
  series = series * rest + 5.55041087e-2f;
  series = series * rest + 2.40226507e-1f;
  series = series * rest + 6.93147181e-1f;
  series = series * rest + 1;
  vector power = (vector)((words)((integers)shifted << 23) + (127u << 23));
  return (vector)((integers)(series * power) & ~(x < -126));
}

/* The sum of each of 16 vectors, in place i that of x[i]. */
static inline vector sums(vector *x) {
  for (int i = 0; i < 8; i++)
    x[i] = PICK(x[i], x[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           PICK(x[i], x[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; i++)
    x[i] = PICK(x[i], x[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           PICK(x[i], x[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 2; i++)
    x[i] = PICK(x[i], x[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           PICK(x[i], x[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return PICK(x[0], x[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         PICK(x[0], x[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

/* TOGETHER queries to the keys first to end of a row. */
static void attend(const number *query, int64_t apart, const number *keys, const number *values, int64_t first,
                   int64_t end, float scale, number *out) {
  vector asked[TOGETHER][PARTS], found[TOGETHER][PARTS];
  float top[TOGETHER], total[TOGETHER];
  for (int g = 0; g < TOGETHER; g++) {
    for (int p = 0; p < PARTS; p++) {
      asked[g][p] = load(query + g * apart + p * LANES) * (scale * 1.44269504f); /* so that powers are those of 2 */
      found[g][p] = all(0);
    }
    top[g] = -__builtin_inff(), total[g] = 0;
  }
  for (int64_t at = first; at < end; at += BLOCK) {
    int count = end - at < BLOCK ? (int)(end - at) : BLOCK;
    union { vector v[BLOCK / LANES]; float f[BLOCK]; } scores[TOGETHER];
    for (int j = 0; j < count; j += LANES) {
      vector products[TOGETHER][LANES];
      for (int k = 0; k < LANES; k++) {
        const number *key = keys + (at + (j + k < count ? j + k : count - 1)) * SIZE; /* the row's end is not passed */
        fetch(key);
        for (int p = 0; p < PARTS; p++) {
          vector part = load(key + p * LANES);
          for (int g = 0; g < TOGETHER; g++)
            products[g][k] = p ? products[g][k] + part * asked[g][p] : part * asked[g][p];
        }
      }
      for (int g = 0; g < TOGETHER; g++) scores[g].v[j / LANES] = sums(products[g]);
    }
    for (int g = 0; g < TOGETHER; g++) {
      int vectors = (count + LANES - 1) / LANES;
      vector most = all(top[g]), summed = all(0);
      for (int j = count; j < vectors * LANES; j++) scores[g].f[j] = -__builtin_inff();
      for (int j = 0; j < vectors; j++) most = larger(scores[g].v[j], most);
      float before = top[g];
      top[g] = largest(most);
      for (int j = 0; j < vectors; j++) summed += scores[g].v[j] = exp2_of(scores[g].v[j] - top[g]);
      float fade = exp2_of(all(before - top[g]))[0];
      total[g] = total[g] * fade + sum(summed);
      for (int p = 0; p < PARTS; p++) found[g][p] *= fade;
    }
    for (int w = 0; w < PARTS; w += WIDTH)
      for (int j = 0; j < count; j++) {
        const number *value = values + (at + j) * SIZE;
        if (!w) fetch(value);
        for (int p = w; p < w + WIDTH; p++) {
          vector part = load(value + p * LANES);
          for (int g = 0; g < TOGETHER; g++) found[g][p] += part * scores[g].f[j];
        }
      }
  }
  for (int g = 0; g < TOGETHER; g++)
    for (int p = 0; p < PARTS; p++) store(out + g * SIZE + p * LANES, found[g][p] / total[g]);
}

/* Store the keys and values of all tokens of a step, then compute those of `places`; out is (tokens, heads, SIZE).
   Of query, key and value the numbers from head to head and from token to token are given. */
void attention(int threads, const int64_t *rows, const int64_t *positions, int64_t tokens, const int64_t *places,
               int64_t placed, int64_t kv_heads, int64_t context, int64_t window, float scale, const number *query,
               int64_t query_head, int64_t query_token, const number *key, int64_t key_head, int64_t key_token,
               const number *value, int64_t value_head, int64_t value_token, number *keys, number *values,
               number *out) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t h = 0; h < kv_heads; h++) {
        int64_t to = ((rows[t] * kv_heads + h) * context + positions[t]) * SIZE;
        memcpy(keys + to, key + h * key_head + t * key_token, SIZE * sizeof *keys);
        memcpy(values + to, value + h * value_head + t * value_token, SIZE * sizeof *values);
      }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < placed * kv_heads; i++) {
      int64_t t = places[i / kv_heads], h = i % kv_heads, end = positions[t] + 1;
      int64_t row = (rows[t] * kv_heads + h) * context * SIZE;
      for (int g = 0; g < FOLDED; g += TOGETHER) {
        int64_t head = h * FOLDED + g;
        attend(query + head * query_head + t * query_token, query_head, keys + row, values + row,
               window && window < end ? end - window : 0, end, scale, out + (t * kv_heads * FOLDED + head) * SIZE);
      }
    }
  }
}
