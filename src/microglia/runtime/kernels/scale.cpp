// A weight times one factor per block, forward and backward in one pass each: the rows of a weight are read once, and the factors
// lie expanded to one row of blocks in the cache. Sums over a block run output by output, then over its inputs, in one order
// whatever the number of threads.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

#include "kernels.h"

#define MG_EXPORT extern "C" __attribute__((visibility("default")))

namespace microglia::scale {
namespace {

struct Work {
  mg_scaled blocks;
  const float *weight, *gradient, *factors;
  float *result, *sums;
  std::atomic<bool> failed{false};

  int64_t across() const { return blocks.inputs / blocks.block_inputs; }
  int64_t length() const { return blocks.inputs * blocks.taps; }

  // Calls function(first, last, step, factor) for each factor of a row of blocks and the places of its weights in a row.
  template <class Function>
  void each(Function function) const {
    for (int64_t block = 0; block < across(); ++block) {
      for (int64_t tap = 0; tap < blocks.taps; ++tap) {
        const int64_t input = block * blocks.block_inputs;
        const int64_t first = blocks.channels_last ? tap * blocks.inputs + input : input * blocks.taps + tap;
        function(first, blocks.channels_last ? 1 : blocks.taps, block * blocks.taps + tap);
      }
    }
  }

  void expand(int64_t rows_of_blocks, float* expanded) const {
    const float* own = factors + rows_of_blocks * across() * blocks.taps;
    each([&](int64_t first, int64_t step, int64_t factor) {
      for (int64_t input = 0; input < blocks.block_inputs; ++input) expanded[first + input * step] = own[factor];
    });
  }

  void collect(int64_t rows_of_blocks, const float* columns) const {
    float* own = sums + rows_of_blocks * across() * blocks.taps;
    each([&](int64_t first, int64_t step, int64_t factor) {
      float total = 0;
      for (int64_t input = 0; input < blocks.block_inputs; ++input) total += columns[first + input * step];
      own[factor] = total;
    });
  }

  void forward(int64_t rows_of_blocks, float* expanded) const {
    const int64_t count = length(), start = rows_of_blocks * blocks.block_outputs * count;
    expand(rows_of_blocks, expanded);
    for (int64_t output = 0; output < blocks.block_outputs; ++output) {
      const float* __restrict w = weight + start + output * count;
      float* __restrict y = result + start + output * count;
      for (int64_t place = 0; place < count; ++place) y[place] = w[place] * expanded[place];
    }
  }

  void backward(int64_t rows_of_blocks, float* __restrict expanded, float* __restrict columns) const {
    const int64_t count = length(), start = rows_of_blocks * blocks.block_outputs * count;
    expand(rows_of_blocks, expanded);
    std::fill_n(columns, count, 0.0f);
    for (int64_t output = 0; output < blocks.block_outputs; ++output) {
      const float* __restrict w = weight + start + output * count;
      const float* __restrict g = gradient + start + output * count;
      if (result) {
        float* __restrict y = result + start + output * count;
        for (int64_t place = 0; place < count; ++place) {
          y[place] = g[place] * expanded[place];
          columns[place] += g[place] * w[place];
        }
      } else {
        for (int64_t place = 0; place < count; ++place) columns[place] += g[place] * w[place];
      }
    }
    collect(rows_of_blocks, columns);
  }

  static void run(int64_t begin, int64_t end, void* context) {
    Work& self = *static_cast<Work*>(context);
    const std::unique_ptr<float[]> row(new (std::nothrow) float[static_cast<size_t>(2 * self.length())]);
    if (!row) self.failed = true;
    for (int64_t index = begin; row && index < end; ++index) {
      if (self.gradient) {
        self.backward(index, row.get(), row.get() + self.length());
      } else {
        self.forward(index, row.get());
      }
    }
  }
};

int run(const mg_scaled* given, const float* weight, const float* gradient, const float* factors, float* result, float* sums,
        mg_parallel parallel) {
  if (!given || !weight || !factors) return MG_BAD_POINTER;
  const mg_scaled& b = *given;
  if (b.outputs < 1 || b.inputs < 1 || b.taps < 1 || b.block_outputs < 1 || b.block_inputs < 1) return MG_BAD_SIZE;
  if (b.outputs % b.block_outputs || b.inputs % b.block_inputs) return MG_BAD_SIZE;
  Work work{b, weight, gradient, factors, result, sums};
  const int64_t grain = std::max<int64_t>(1, 65536 / (b.block_outputs * work.length()));
  const int64_t rows = b.outputs / b.block_outputs;
  parallel ? parallel(0, rows, grain, Work::run, &work) : Work::run(0, rows, &work);
  return work.failed ? MG_NO_MEMORY : MG_OK;
}

}  // namespace
}  // namespace microglia::scale

MG_EXPORT int mg_scale_blocks(const mg_scaled* blocks, const float* weight, const float* factors, float* result,
                              mg_parallel parallel) {
  return result ? microglia::scale::run(blocks, weight, nullptr, factors, result, nullptr, parallel) : MG_BAD_POINTER;
}

MG_EXPORT int mg_scale_blocks_backward(const mg_scaled* blocks, const float* weight, const float* gradient,
                                       const float* factors, float* of_weight, float* of_factors,
                                       mg_parallel parallel) {
  if (!gradient || !of_factors) return MG_BAD_POINTER;
  return microglia::scale::run(blocks, weight, gradient, factors, of_weight, of_factors, parallel);
}
