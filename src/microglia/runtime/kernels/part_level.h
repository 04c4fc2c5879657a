// Putting 16 outputs of a part together from the stripes of the whole weight in which they lie. Internal.
#ifndef MICROGLIA_PART_LEVEL_H
#define MICROGLIA_PART_LEVEL_H

#include <cstdint>

namespace microglia::part {

// One stripe of the part. Each source is a stripe of the whole weight and fills the outputs of its mask, each from its lane.
struct Sources {
  int64_t count;              // at most 16
  const char* stripe[16];     // the first line of each
  uint16_t mask[16];          // which outputs
  alignas(64) int32_t lane[16];  // of each output, in the line of its source
};

// A line of 16 weights: where it is read, in bytes from the source, and where it is written, in bytes from the values.
struct Move {
  uint32_t from, to;
};

// Moves so many lines. Outputs of no source are zero.
using Pack = void (*)(const Sources& sources, const Move* moves, int64_t count, char* values);

Pack avx512_pack();

}  // namespace microglia::part

#endif
