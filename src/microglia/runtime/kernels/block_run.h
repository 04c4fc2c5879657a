// Running a planned convolution: chunk by chunk, over tiles and stripes, on the caller's threads. Internal.
#ifndef MICROGLIA_BLOCK_RUN_H
#define MICROGLIA_BLOCK_RUN_H

#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "block_level.h"
#include "block_plan.h"
#include "kernels.h"

namespace microglia::block {

// Memory of one thread that only grows and goes with the thread.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // Null if there is none.
  char* reserve(int64_t bytes) {
    if (bytes < 0) return nullptr;
    if (bytes <= size_) return static_cast<char*>(data_);
    std::free(data_);
    const size_t rounded = (static_cast<size_t>(bytes) + 4095) / 4096 * 4096;
    data_ = std::aligned_alloc(4096, rounded);
    size_ = data_ ? static_cast<int64_t>(rounded) : 0;
    return static_cast<char*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// Weights that are put together just before their use: stripe by stripe, as the kernels read them.
struct Packing {
  void (*pack)(const Packing& packing, int64_t stripe, char* values);
};

// The places of every stripe's weights: stripe by stripe (row_pointer), or one list for all of them (stripes).
struct Weighting {
  Weights kind;
  const char* values;
  const uint32_t* places;
  const uint32_t* value_offsets;
  int64_t inputs;               // places to a block
  const int32_t* row_pointer;   // in blocks; null for one list
  int64_t list_count, stripe_bytes;  // of one list, and between its stripes
  const int32_t* stripes;       // the stripes computed; null for all
  int64_t stripe_count;
  const Packing* packing = nullptr;  // null where values are there already
  int64_t first_packed = 0;          // the stripe that values begin with, of one list

  int64_t stripe(int64_t index) const { return stripes ? stripes[index] : index; }
  int64_t places_before(int64_t index) const { return row_pointer ? row_pointer[index] * inputs : index * list_count; }

  void fill(int64_t index, Tile& tile) const {
    tile.count = places_before(index + 1) - places_before(index);
    const int64_t before = row_pointer ? places_before(index) : 0;
    tile.places = places + before;
    tile.values = tile.count ? values + (row_pointer ? before * line_bytes : (stripe(index) - first_packed) * stripe_bytes) : values;
    tile.value_offsets = value_offsets;
  }
};

struct Output {  // y and residual of the level's type, strides in its elements
  char* y;
  int64_t y_stride;
  const char* residual;
  int64_t residual_stride;
  const float* bias;
  int64_t channels;
  int32_t activation;
};

struct Run {
  Plan plan;
  Weighting weights;
  Output output;
  mg_parallel parallel;
  mutable std::atomic<int> status{MG_OK};
};

// ---- What the convolutions of blocks share (block.cpp) ----

const Level& current_level();  // of float32

Output output_of(const mg_conv2d* conv, void* y, int64_t y_stride, const void* residual, int64_t residual_stride,
                 const float* bias);

// What is wrong with a problem and its activations, and with a list that must rise below a limit.
int check(const mg_conv2d* conv, const void* x, int64_t x_stride, const Output& output);
int check_list(const int32_t* list, int64_t count, int64_t limit);

void in_parallel(mg_parallel parallel, int64_t count, int64_t grain, mg_body body, void* context);

// Runs everything; MG_OK or MG_NO_MEMORY. `threads` is how many the work is cut for.
int execute(Run& run, int64_t threads);

}  // namespace microglia::block

#endif
