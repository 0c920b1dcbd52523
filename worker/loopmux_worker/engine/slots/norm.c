/* RMS norms of rows, rounded as transformers' own; called by norms.py, which compiles it.

   BF16  1: bfloat16, 0: float */

#include <stdint.h>
#include <string.h>

#define SUMS 32 /* kept at once, so that the compiler may use vectors; the order does not depend on which */

#if BF16

typedef uint16_t number;

static inline float load(number from) {
  uint32_t bits = (uint32_t)from << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static inline number rounded(float x) { /* to the nearest, ties to even */
  uint32_t bits;
  memcpy(&bits, &x, sizeof x);
  return x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

#else

typedef float number;

static inline float load(number x) { return x; }

static inline number rounded(float x) { return x; }

#endif

/* out = x / sqrt(mean of x * x + epsilon) * weight, for each row of `size` numbers. */
void norm(int threads, int64_t rows, int64_t size, float epsilon, const number *x, const number *weight, number *out) {
#pragma omp parallel for num_threads(threads) if (rows * size > 1 << 15)
  for (int64_t row = 0; row < rows; row++) {
    const number *from = x + row * size;
    number *to = out + row * size;
    float sums[SUMS] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + SUMS <= size; i += SUMS)
      for (int k = 0; k < SUMS; k++) sums[k] += load(from[i + k]) * load(from[i + k]);
    for (; i < size; i++) sum += load(from[i]) * load(from[i]);
    for (int k = 0; k < SUMS; k++) sum += sums[k];
    float scale = 1 / __builtin_sqrtf(sum / size + epsilon);
    for (i = 0; i < size; i++) to[i] = rounded(load(rounded(load(from[i]) * scale)) * load(weight[i]));
  }
}
