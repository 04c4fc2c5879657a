// What the row-sparse convolution needs of an instruction set: internal to rows*.cpp.
#ifndef MICROGLIA_ROWS_LEVEL_H
#define MICROGLIA_ROWS_LEVEL_H

#include <stdint.h>

namespace microglia {

// Where a vector of the pixel run goes in an output plane: its kept lanes are neighbours there.
struct VectorPlace {
  int32_t position;
  int32_t count;
};

// One tile of pixels for some row groups. All indices count floats.
struct RowTile {
  const float* input;          // plane 0 at the tile's first pixel
  const int32_t* offset;       // [entries]: from there to the first pixel that an entry multiplies
  const float* values;         // [entries][rows]
  const int32_t* begins;       // [groups]: the entries of a row group to go through, up to
  const int32_t* ends;         // [groups]
  const VectorPlace* places;   // one per vector, and one for the single pixel
  const int32_t* orders;       // per vector its kept lanes first; null: every lane is kept
  float* output;               // of channel 0, as residual
  const float* residual;       // or null
  const float* bias;           // or null
  int64_t plane;               // floats from one output channel to the next
  int64_t first_group, last_group, out_channels;
  int32_t last_lanes;          // how many lanes of the tile's last vector exist
  int32_t activation;
  // A tile without a single pixel may go through its entries in several turns, which keep their sums here in between:
  float* partial;              // [last_group - first_group][rows][vectors][lanes]
  bool resumes, pauses;        // whether the sums start from there, and go there rather than to the output
};

// Rows of one input plane, copied to a plane whose rows are `pitch` floats apart: `lead` zeros, `count` values, zeros.
struct PlaneCopy {
  const float* source;
  int64_t source_pitch, source_step;
  float* target;
  int64_t rows, pitch, lead, count;
  float* limit;  // what lies between the last row and here is zeroed
};

// Where entries read: the plane of (tap, channel) starts at tap_offset[tap] + channel * channel_size.
struct EntryMap {
  const int32_t* channel;
  const uint8_t* tap;  // or null
  uint32_t channels, channel_size, taps;
  const uint32_t* tap_offset;  // [256]
};

struct EntryReport {
  bool bad_channel, bad_tap;
  int64_t falls;  // how many entries have a lower channel than the one before
};

constexpr int kMostVectors = 14;

struct RowLevel {
  using Routine = void (*)(const RowTile&);
  struct Tiles {
    int widest;                            // vectors of the widest tile
    int widest_with_single;                // the same where a single pixel follows the vectors; 0: there is none such
    Routine plain[kMostVectors + 1];       // [vectors]
    Routine with_single[kMostVectors + 1];
  };
  int lanes;
  Tiles tiles[3];  // for 1, 2 and 4 rows
  void (*copy_plane)(const PlaneCopy&);
  EntryReport (*translate)(const EntryMap&, int64_t entries, int32_t* offset);
};

extern const RowLevel kRowsGeneric;
#if defined(__x86_64__)
extern const RowLevel kRowsAvx2;
extern const RowLevel kRowsAvx512;
#endif

}  // namespace microglia

#endif
