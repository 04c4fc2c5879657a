// A linear layer for one input or a few, from a weight that lies input by input: y += x[j] * weight[j] for the inputs j above a
// threshold. At one input the time is that of the weight's way from memory, and rows that are not needed stay there. So there is no
// wider version than AVX2. Eight rows are read side by side, each from end to end, and added to sums that stay in the cache.
#include "thresholded.h"

#include <algorithm>
#include <cmath>
#include <immintrin.h>

#include "block_inline.h"
#include "block_run.h"

#define MG_EXPORT extern "C" __attribute__((visibility("default")))

namespace microglia::thresholded {
namespace {

constexpr int64_t at_once = 8;           // rows of the weight in one pass over the sums
constexpr int64_t together = 4;          // rows of x that share what is read
constexpr int64_t sums_held = 16384;     // of all these rows: 64 kB, in L2
constexpr int64_t least_width = 64;      // outputs of one piece of work
constexpr int64_t worthwhile = 1 << 15;  // multiplications for which a thread is woken

thread_local block::Scratch scratch;

using Bfloat16 = uint16_t;

float number(float value) { return value; }
float number(Bfloat16 bits) { return block::widened(bits); }
void store(float value, float* to) { *to = value; }
void store(float value, Bfloat16* to) { *to = block::rounded(value); }

template <class T>
struct Rows {  // of the weight, from the first output of a piece on
  const T* row[at_once];
};

// Adds factors[r][k] * row[k] to the sums of each row r of x; both of these are a fixed distance apart.
template <class T>
using Add = void (*)(const Rows<T>& rows, const float* factors, int64_t factor_stride, float* sums, int64_t sum_stride,
                     int64_t count);

template <class T, int count_of_rows, int shared>
void add_generic(const Rows<T>& rows, const float* factors, int64_t factor_stride, float* sums, int64_t sum_stride,
                 int64_t count) {
  for (int r = 0; r < shared; ++r, factors += factor_stride, sums += sum_stride) {
    for (int64_t output = 0; output < count; ++output) {
      float sum = sums[output];
      for (int k = 0; k < count_of_rows; ++k) sum += factors[k] * number(rows.row[k][output]);
      sums[output] = sum;
    }
  }
}

#if defined(__x86_64__)
#define MG_AVX2_TARGET __attribute__((target("avx2,fma")))

MG_AVX2_TARGET inline __m256 eight(const float* from) { return _mm256_loadu_ps(from); }
MG_AVX2_TARGET inline __m256 eight(const Bfloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

template <class T, int count_of_rows, int shared>
MG_AVX2_TARGET void add_avx2(const Rows<T>& rows, const float* factors, int64_t factor_stride, float* sums, int64_t sum_stride,
                             int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  __m256 wide[shared][count_of_rows];
  for (int r = 0; r < shared; ++r) {
    for (int k = 0; k < count_of_rows; ++k) wide[r][k] = _mm256_set1_ps(factors[r * factor_stride + k]);
  }
  int64_t output = 0;
  for (; output + line <= count; output += line) {
    for (int64_t part = output; part < output + line; part += 8) {
      __m256 sum[shared];
      for (int r = 0; r < shared; ++r) sum[r] = _mm256_loadu_ps(sums + r * sum_stride + part);
      for (int k = 0; k < count_of_rows; ++k) {
        const __m256 weights = eight(rows.row[k] + part);
        for (int r = 0; r < shared; ++r) sum[r] = _mm256_fmadd_ps(wide[r][k], weights, sum[r]);
      }
      for (int r = 0; r < shared; ++r) _mm256_storeu_ps(sums + r * sum_stride + part, sum[r]);
    }
  }
  for (int r = 0; r < shared; ++r) {
    for (int64_t last = output; last < count; ++last) {
      float sum = sums[r * sum_stride + last];
      for (int k = 0; k < count_of_rows; ++k) sum = std::fma(factors[r * factor_stride + k], number(rows.row[k][last]), sum);
      sums[r * sum_stride + last] = sum;
    }
  }
}
#endif

// The functions for 1 to 4 rows of x, many rows of the weight at once or one.
template <class T>
constexpr Add<T> generic[2][together] = {
    {add_generic<T, 1, 1>, add_generic<T, 1, 2>, add_generic<T, 1, 3>, add_generic<T, 1, 4>},
    {add_generic<T, at_once, 1>, add_generic<T, at_once, 2>, add_generic<T, at_once, 3>, add_generic<T, at_once, 4>}};
#if defined(__x86_64__)
template <class T>
constexpr Add<T> avx2[2][together] = {
    {add_avx2<T, 1, 1>, add_avx2<T, 1, 2>, add_avx2<T, 1, 3>, add_avx2<T, 1, 4>},
    {add_avx2<T, at_once, 1>, add_avx2<T, at_once, 2>, add_avx2<T, at_once, 3>, add_avx2<T, at_once, 4>}};
#endif

template <class T>
Add<T> add_of(bool several, int64_t rows, int level) {
#if defined(__x86_64__)
  if (level >= MG_AVX2) return avx2<T>[several][rows - 1];
#endif
  return generic<T>[several][rows - 1];
}

template <class T>
struct Work {
  const mg_thresholded* layer;
  const T *weight, *bias;
  int64_t rows, count, width;
  const int32_t* inputs;  // the inputs that some row needs
  const float* values;    // of each row, layer->inputs apart; 0 where the row does not need the input
  T* y;
  Add<T> add_several, add_one;

  Rows<T> rows_of(int64_t index, int64_t first) const {
    Rows<T> found;
    for (int64_t k = 0; k < at_once; ++k) {
      found.row[k] = weight + inputs[std::min(index + k, count - 1)] * layer->outputs + first;
    }
    return found;
  }

  void piece(int64_t first) const {
    alignas(64) float sums[sums_held];
    const int64_t length = std::min(width, layer->outputs - first);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t o = 0; o < length; ++o) sums[row * width + o] = bias ? number(bias[first + o]) : 0.0f;
    }
    for (int64_t index = 0; index < count;) {
      const bool several = index + at_once <= count;
      const Rows<T> from = rows_of(index, first);
      (several ? add_several : add_one)(from, values + index, layer->inputs, sums, width, length);
      index += several ? at_once : 1;
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t o = 0; o < length; ++o) store(sums[row * width + o], y + row * layer->outputs + first + o);
    }
  }

  static void run(int64_t begin, int64_t end, void* context) {
    const Work& work = *static_cast<const Work*>(context);
    for (int64_t index = begin; index < end; ++index) work.piece(index * work.width);
  }
};

// Lists the inputs above the threshold, and their values; returns how many there are.
template <class T>
int64_t choose(const mg_thresholded& layer, const T* x, int64_t rows, int32_t* inputs, float* values) {
  const float threshold = number(*static_cast<const T*>(layer.threshold));
  int64_t count = 0;
  for (int64_t input = 0; input < layer.inputs; ++input) {
    bool needed = false;
    for (int64_t row = 0; row < rows; ++row) {
      const float value = number(x[row * layer.inputs + input]);
      const bool above = !(std::fabs(value) <= threshold);
      values[row * layer.inputs + count] = above ? value : 0.0f;
      needed |= above;
    }
    inputs[count] = static_cast<int32_t>(input);
    count += needed;
  }
  return count;
}

template <class T>
int layer_of(const mg_thresholded& layer, const T* x, T* y, mg_parallel parallel) {
  const int level = std::min(layer.level, mg_level());
  char* held = scratch.reserve(std::max<int64_t>(1, layer.inputs) * (together + 1) * static_cast<int64_t>(sizeof(float)));
  if (!held) return MG_NO_MEMORY;
  float* values = reinterpret_cast<float*>(held);
  int32_t* inputs = reinterpret_cast<int32_t*>(values + together * layer.inputs);
  const int64_t each = (layer.outputs + layer.threads - 1) / layer.threads;
  const int64_t whole = (each + least_width - 1) / least_width * least_width;
  for (int64_t first = 0; first < layer.rows; first += together) {
    const int64_t rows = std::min(together, layer.rows - first);
    const int64_t count = choose(layer, x + first * layer.inputs, rows, inputs, values);
    const int64_t width = std::min(whole, sums_held / rows / least_width * least_width);
    Work<T> work{&layer, static_cast<const T*>(layer.weight), static_cast<const T*>(layer.bias), rows, count, width, inputs,
                 values, y + first * layer.outputs, add_of<T>(true, rows, level), add_of<T>(false, rows, level)};
    const int64_t pieces = (layer.outputs + width - 1) / width;
    if (!parallel || pieces == 1) {
      Work<T>::run(0, pieces, &work);
    } else {
      parallel(0, pieces, 1 + worthwhile / std::max<int64_t>(1, count * width * rows), Work<T>::run, &work);
    }
  }
  return MG_OK;
}

}  // namespace
}  // namespace microglia::thresholded

MG_EXPORT int mg_thresholded_linear(const mg_thresholded* layer, const void* x, void* y, mg_parallel parallel) {
  using namespace microglia::thresholded;
  if (!layer) return MG_BAD_POINTER;
  const int64_t rows = layer->rows, inputs = layer->inputs, outputs = layer->outputs;
  int64_t product = 0;
  const bool large = __builtin_mul_overflow(inputs, outputs, &product) || __builtin_mul_overflow(rows, inputs, &product) ||
                     __builtin_mul_overflow(rows, outputs, &product);
  if (rows < 0 || inputs < 0 || outputs < 0 || inputs > INT32_MAX || large || layer->threads < 1) {
    return MG_BAD_SIZE;
  }
  if (rows == 0 || outputs == 0) return MG_OK;
  if (!y || !layer->threshold || (inputs && (!x || !layer->weight))) return MG_BAD_POINTER;
  if (layer->bfloat16) return layer_of(*layer, static_cast<const Bfloat16*>(x), static_cast<Bfloat16*>(y), parallel);
  return layer_of(*layer, static_cast<const float*>(x), static_cast<float*>(y), parallel);
}
