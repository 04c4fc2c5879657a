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

  void release_above(int64_t bytes) {
    if (size_ > bytes) std::free(data_), data_ = nullptr, size_ = 0;
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
  const int32_t* value_stripes = nullptr;  // where the values of each stripe lie, in stripes; null where they lie in order

  int64_t stripe(int64_t index) const { return stripes ? stripes[index] : index; }
  int64_t places_before(int64_t index) const { return row_pointer ? row_pointer[index] * inputs : index * list_count; }

  void fill(int64_t index, Tile& tile) const {
    tile.count = places_before(index + 1) - places_before(index);
    const int64_t before = row_pointer ? places_before(index) : 0;
    tile.places = places + before;
    const int64_t at = value_stripes ? value_stripes[index] : stripe(index);
    tile.values = tile.count ? values + (row_pointer ? before * line_bytes : (at - first_packed) * stripe_bytes) : values;
    tile.value_offsets = value_offsets;
  }
};

struct Output {
  Image y, residual;  // of the level's type; residual.data may be null
  const float* bias;
  int64_t channels;
  int32_t activation;
  bool whole = false;  // y has room for the whole of its last stripe, which is filled with zeros
  const Rescale* rescale = nullptr;  // of 8 bits

  int64_t element_bytes(const Level& level) const { return rescale ? rescale->element_bytes() : level.element_bytes; }
};

struct Run {
  Plan plan;
  Weighting weights;
  Output output;
  mg_parallel parallel;
  mutable std::atomic<int> status{MG_OK};
};

// What a convolution in NHWC is given, steps between pixels in elements.
struct Activations {
  const void* x;
  int64_t x_stride;
  void* y;
  int64_t y_stride;
  const void* residual;  // or null
  int64_t residual_stride;
  const float* bias;
};

// Blocks of either type.
struct Blocks {
  int64_t inputs, blocks, places;  // places to a block
  const char* values;
  const int32_t *row_pointer, *channel;
  const uint8_t* tap;

  int64_t value_bytes() const { return blocks * places * line_bytes; }
};

inline Blocks blocks_of(const mg_blocks& given) {
  return {given.block_inputs, given.blocks,  given.block_inputs, reinterpret_cast<const char*>(given.values),
          given.row_pointer,  given.channel, given.tap};
}

// ---- What the convolutions of blocks share (block.cpp) ----

const Level& current_level();  // of float32

// What is wrong with a problem, with its activations, with the lists of its blocks, and with a list that must rise below a limit.
int check_sizes(const mg_conv2d* conv);
int check(const mg_conv2d* conv, const Activations& given);
int check_blocks(const mg_conv2d& conv, const Blocks& blocks);
int check_list(const int32_t* list, int64_t count, int64_t limit);

Output output_of(const mg_conv2d& conv, const Plan& plan, const Activations& given);

// Input channels that blocks reach: the last block may reach past the last channel.
int64_t reached_channels(const mg_conv2d& conv, const Blocks& blocks);

// Runs a problem whose plan and output are known: checks its blocks' channels and taps and makes the list of their places first.
int run_places(const mg_conv2d& conv, const Blocks& blocks, Run& run, mg_parallel parallel);

void in_parallel(mg_parallel parallel, int64_t count, int64_t grain, mg_body body, void* context);

// Runs everything; MG_OK or MG_NO_MEMORY. `threads` is how many the work is cut for.
int execute(Run& run, int64_t threads);

}  // namespace microglia::block

#endif
