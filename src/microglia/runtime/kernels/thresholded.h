// The plain C interface of a linear layer that reads only those rows of its weight that an input needs; rules as in kernels.h.
#ifndef MICROGLIA_THRESHOLDED_H
#define MICROGLIA_THRESHOLDED_H

#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

// y[row] = bias + the sum of x[row][j] * weight[j] over the inputs j with |x[row][j]| > threshold. NaN counts as above every
// threshold. Rows share what is read: a row of the weight that one of them needs meets the others as 0 * weight, so the weight
// must be finite.
typedef struct {
  int64_t rows, inputs, outputs;
  const void* weight;  // [inputs][outputs]
  const void* bias;    // [outputs], or null
  const void* threshold;
  int32_t bfloat16;    // all these, x and y are bfloat16, not float32; sums are float32, rounded once, to the nearest even
  int32_t level;       // at most mg_level()
  int32_t threads;     // how many the parallel function has; only a hint for cutting the work
} mg_thresholded;

// x is [rows][inputs], y [rows][outputs]; they do not overlap.
int mg_thresholded_linear(const mg_thresholded* layer, const void* x, void* y, mg_parallel parallel);

#ifdef __cplusplus
}
#endif
#endif
