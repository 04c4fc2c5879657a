// A gate's head, and the sum that takes its channels back to full width: what stands between two parts of an input's route.
// Both wait for memory at any instruction set, so there is one version: loops over fixed counts, which every compiler vectorizes.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "block_run.h"
#include "kernels.h"

#define MG_EXPORT extern "C" __attribute__((visibility("default")))

namespace microglia::gate {
namespace {

constexpr int64_t pixels_at_once = 64;  // summed alone first: so many terms of one size lose little
constexpr int lanes = 16;

thread_local block::Scratch scratch;

int check(int64_t pixels, int64_t stride, const int64_t* list, int64_t count, int64_t width) {
  if (pixels < 1 || stride < 1 || width < 1 || count < 0 || pixels > INT64_MAX / 64 / stride) return MG_BAD_SIZE;
  if (!list) return count == width ? MG_OK : MG_BAD_SIZE;
  for (int64_t index = 0; index < count; ++index) {
    if (list[index] < 0 || list[index] >= width || (index > 0 && list[index] <= list[index - 1])) return MG_BAD_LIST;
  }
  return MG_OK;
}

void maximum(const float* x, int64_t pixels, int64_t stride, int64_t channels, float* pooled) {
  std::fill_n(pooled, channels, -std::numeric_limits<float>::infinity());
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += stride) {
    for (int64_t c = 0; c < channels; ++c) {
      const float most = pooled[c];
      pooled[c] = most >= x[c] || most != most ? most : x[c];  // NaN comes in, as it compares with nothing, and stays
    }
  }
}

void mean(const float* x, int64_t pixels, int64_t stride, int64_t channels, float* some, float* pooled) {
  if (channels < lanes && stride == channels && pixels % lanes == 0) {  // few channels fill no vector, 16 pixels of them do
    float wide_some[lanes * lanes], wide[lanes * lanes];
    mean(x, pixels / lanes, stride * lanes, channels * lanes, wide_some, wide);
    for (int64_t c = 0; c < channels; ++c) {
      pooled[c] = 0.0f;
      for (int64_t pixel = 0; pixel < lanes; ++pixel) pooled[c] += wide[pixel * channels + c] / lanes;
    }
    return;
  }
  std::fill_n(pooled, channels, 0.0f);
  for (int64_t begin = 0; begin < pixels; begin += pixels_at_once) {
    const int64_t end = std::min(begin + pixels_at_once, pixels);
    std::fill_n(some, channels, 0.0f);
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const float* from = x + pixel * stride;
      for (int64_t c = 0; c < channels; ++c) some[c] += from[c];
    }
    for (int64_t c = 0; c < channels; ++c) pooled[c] += some[c];
  }
  for (int64_t c = 0; c < channels; ++c) pooled[c] /= static_cast<float>(pixels);
}

void softmax(float* values, int64_t count) {
  float most = values[0], total = 0.0f;
  for (int64_t i = 1; i < count; ++i) most = std::max(most, values[i]);
  for (int64_t i = 0; i < count; ++i) total += values[i] = std::exp(values[i] - most);
  for (int64_t i = 0; i < count; ++i) values[i] /= total;
}

float product(const float* a, const float* b, int64_t count) {
  float sums[lanes] = {}, sum = 0.0f;
  int64_t at = 0;
  for (; at + lanes <= count; at += lanes) {
    for (int i = 0; i < lanes; ++i) sums[i] += a[at + i] * b[at + i];
  }
  for (; at < count; ++at) sum += a[at] * b[at];
  for (float each : sums) sum += each;
  return sum;
}

}  // namespace
}  // namespace microglia::gate

using namespace microglia::gate;

MG_EXPORT int mg_gate_rows(const mg_gate* gate, const float* x, int64_t pixels, int64_t x_stride, const int64_t* columns,
                           int64_t column_count, int64_t* rows, int64_t* row_count) {
  if (!gate || !gate->weight || !gate->bias || !rows || !row_count || (!x && column_count > 0)) return MG_BAD_POINTER;
  if (gate->inputs < 1 || gate->outputs < 1 || gate->inputs > INT32_MAX || column_count > x_stride) return MG_BAD_SIZE;
  if (int code = check(pixels, std::max<int64_t>(1, x_stride), columns, column_count, gate->inputs)) return code;
  float* seen = reinterpret_cast<float*>(scratch.reserve(3 * gate->inputs * static_cast<int64_t>(sizeof(float))));
  if (!seen) return MG_NO_MEMORY;
  float* pooled = columns ? seen + gate->inputs : seen;
  if (gate->maximum) {
    maximum(x, pixels, x_stride, column_count, pooled);
  } else {
    mean(x, pixels, x_stride, column_count, seen + 2 * gate->inputs, pooled);
  }
  if (columns) {
    std::fill_n(seen, gate->inputs, 0.0f);
    for (int64_t index = 0; index < column_count; ++index) seen[columns[index]] = pooled[index];
  }
  if (gate->softmax) softmax(seen, gate->inputs);
  *row_count = 0;
  for (int64_t output = 0; output < gate->outputs; ++output) {
    const float logit = gate->bias[output] + product(gate->weight + output * gate->inputs, seen, gate->inputs);
    if (logit > 0.0f) rows[(*row_count)++] = output;
  }
  return MG_OK;
}

MG_EXPORT int mg_add_rows(int64_t pixels, int64_t channels, const float* x, int64_t x_stride, const float* part,
                          int64_t part_stride, const int64_t* rows, int64_t row_count, float* y, int64_t y_stride,
                          int32_t relu) {
  if (!x || !y || ((!part || !rows) && row_count > 0)) return MG_BAD_POINTER;
  const int64_t none = 0, stride = std::max({x_stride, y_stride, part_stride, int64_t{1}});
  if (int code = check(pixels, stride, row_count ? rows : &none, row_count, channels)) return code;
  if (x_stride < channels || y_stride < channels || part_stride < row_count) return MG_BAD_SIZE;
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += x_stride, y += y_stride, part += part_stride) {
    std::memcpy(y, x, static_cast<size_t>(channels) * sizeof(float));
    for (int64_t index = 0; index < row_count; ++index) y[rows[index]] += part[index];
    for (int64_t c = 0; relu && c < channels; ++c) y[c] = y[c] < 0.0f ? 0.0f : y[c];  // NaN stays
  }
  return MG_OK;
}
