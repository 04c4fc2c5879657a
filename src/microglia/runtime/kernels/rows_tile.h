// The tile routines of the row-sparse convolution over a vector type, `Lanes`, which the including file defines before in
// an unnamed namespace, after it has chosen its instruction set. Everything here is local to that file: were it shared,
// the linker could keep a copy that not every processor can run.
#ifndef MICROGLIA_ROWS_TILE_H
#define MICROGLIA_ROWS_TILE_H

#include "kernels.h"
#include "rows_level.h"

namespace {

using microglia::EntryMap;
using microglia::PlaneCopy;
using microglia::RowLevel;
using microglia::RowTile;
using Value = Lanes::Value;
using Mask = Lanes::Mask;

// exp(x) = power * 2 ** exponent for x <= 0, with the scaling left out so that tiny results keep their digits.
[[gnu::always_inline]] inline void split_exponential(Value x, Value& power, Value& exponent) {
  exponent = Lanes::round(Lanes::multiply(x, Lanes::set(1.44269504088896341f)));
  Value rest = Lanes::fma(exponent, Lanes::set(-0.693359375f), x);
  rest = Lanes::fma(exponent, Lanes::set(2.12194440e-4f), rest);
  constexpr float kTerms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  power = Lanes::set(1.0f / 5040);
  for (float term : kTerms) power = Lanes::fma(power, rest, Lanes::set(term));
}

// x * sigmoid(x), as x / (1 + e) for x >= 0 and x * e / (1 + e) below, where e = exp(-|x|) cannot overflow.
[[gnu::always_inline]] inline Value silu(Value x) {
  // Zero, but NaN for -infinity, which the bound below would hide: PyTorch divides -infinity by infinity.
  const Value hidden = Lanes::multiply(Lanes::at_most(x, Lanes::set(0.0f)), Lanes::set(0.0f));
  x = Lanes::at_least(x, Lanes::set(-120.0f));  // the result is zero from about -108 on
  Value power, exponent;
  split_exponential(Lanes::at_least(Lanes::minus_magnitude(x), Lanes::set(-120.0f)), power, exponent);
  const Value small = Lanes::scale(power, exponent);
  const Value quotient = Lanes::divide(x, Lanes::add(Lanes::set(1.0f), small));
  const Value below = Lanes::scale(Lanes::multiply(quotient, power), exponent);
  return Lanes::add(Lanes::where_negative(x, below, quotient), hidden);
}

// What is left to do with the sums of one output channel. All activations but SiLU keep a value within bounds.
struct Finish {
  Value bias, least, most;
  int64_t position;  // of the channel's plane

  Finish(const RowTile& tile, int64_t channel) {
    const float infinity = __builtin_inff();
    const bool bounded = tile.activation == MG_RELU || tile.activation == MG_RELU6;
    bias = Lanes::set(tile.bias ? tile.bias[channel] : 0.0f);
    least = Lanes::set(bounded ? 0.0f : -infinity);
    most = Lanes::set(tile.activation == MG_RELU6 ? 6.0f : infinity);
    position = channel * tile.plane;
  }

  template <bool Silu>
  [[gnu::always_inline]] inline void store(const RowTile& tile, int vector, Value sum) const {
    const microglia::VectorPlace place = tile.places[vector];
    const Mask kept = Lanes::first(place.count);
    if (tile.orders) sum = Lanes::permute(sum, tile.orders + vector * Lanes::kCount);
    sum = Lanes::add(sum, bias);
    if (tile.residual) sum = Lanes::add(sum, Lanes::load(tile.residual + position + place.position, kept));
    sum = Silu ? silu(sum) : Lanes::at_most(Lanes::at_least(sum, least), most);
    Lanes::store(tile.output + position + place.position, kept, sum);
  }
};

// Finishes the sums of one output channel for the vectors from `first` on and writes them.
[[gnu::noinline]] void finish(const RowTile& tile, int64_t channel, int first, int vectors, const Value* sums) {
  const Finish finish(tile, channel);
  if (tile.activation == MG_SILU)
    for (int i = 0; i < vectors; i++) finish.store<true>(tile, first + i, sums[i]);
  else
    for (int i = 0; i < vectors; i++) finish.store<false>(tile, first + i, sums[i]);
}

// The sums of one row group. A single pixel that follows the vectors has its rows, not its neighbours, in its lanes.
template <int Vectors, int Rows, bool Single>
struct Sums {
  Value of[Rows][Vectors];
  Lanes::Quad single;

  [[gnu::always_inline]] inline void clear() {
#pragma GCC unroll 4
    for (int row = 0; row < Rows; row++)
#pragma GCC unroll 16
      for (int vector = 0; vector < Vectors; vector++) of[row][vector] = Lanes::set(0.0f);
    if constexpr (Single) single = Lanes::quad(0.0f);
  }

  [[gnu::always_inline]] inline void multiply_add(const float* input, const float* weights, Mask last) {
    Value pixels[Vectors];
#pragma GCC unroll 16
    for (int vector = 0; vector < Vectors - 1; vector++) pixels[vector] = Lanes::load(input + vector * Lanes::kCount);
    pixels[Vectors - 1] = Single ? Lanes::load(input + (Vectors - 1) * Lanes::kCount)
                                 : Lanes::load(input + (Vectors - 1) * Lanes::kCount, last);
#pragma GCC unroll 4
    for (int row = 0; row < Rows; row++) {
      const Value weight = Lanes::set(weights[row]);
#pragma GCC unroll 16
      for (int vector = 0; vector < Vectors; vector++) of[row][vector] = Lanes::fma(pixels[vector], weight, of[row][vector]);
    }
    if constexpr (Single) single = Lanes::quad_fma(weights, input[Vectors * Lanes::kCount], single);
  }

  [[gnu::always_inline]] inline void add(const Sums& other) {
#pragma GCC unroll 4
    for (int row = 0; row < Rows; row++)
#pragma GCC unroll 16
      for (int vector = 0; vector < Vectors; vector++) of[row][vector] = Lanes::add(of[row][vector], other.of[row][vector]);
    static_assert(!Single || Vectors * Rows >= 8, "narrow tiles with a single pixel do not need two sets of sums");
  }

  [[gnu::always_inline]] inline void resume(const float* partial) {
#pragma GCC unroll 4
    for (int row = 0; row < Rows; row++)
#pragma GCC unroll 16
      for (int vector = 0; vector < Vectors; vector++)
        of[row][vector] = Lanes::load(partial + (row * Vectors + vector) * Lanes::kCount);
  }

  [[gnu::always_inline]] inline void pause(float* partial) const {
#pragma GCC unroll 4
    for (int row = 0; row < Rows; row++)
#pragma GCC unroll 16
      for (int vector = 0; vector < Vectors; vector++)
        Lanes::store(partial + (row * Vectors + vector) * Lanes::kCount, of[row][vector]);
  }

  [[gnu::always_inline]] inline void store(const RowTile& tile, int64_t channel) const {
    float singles[4];
    if constexpr (Single) Lanes::quad_store(singles, single);
#pragma GCC unroll 4
    for (int row = 0; row < Rows; row++) {
      if (channel + row >= tile.out_channels) return;
      Value finished[Vectors];  // a copy, since sums whose address is taken would not stay in registers
#pragma GCC unroll 16
      for (int vector = 0; vector < Vectors; vector++) finished[vector] = of[row][vector];
      finish(tile, channel + row, 0, Vectors, finished);
      if constexpr (Single) {
        const Value pixel = Lanes::set(singles[row]);
        finish(tile, channel + row, Vectors, 1, &pixel);
      }
    }
  }
};

template <int Vectors, int Rows, bool Single>
void row_tile(const RowTile& tile) {
  const Mask last = Lanes::first(tile.last_lanes);
  for (int64_t group = tile.first_group; group < tile.last_group; group++) {
    Sums<Vectors, Rows, Single> sums;
    float* partial = tile.partial + (group - tile.first_group) * Rows * Vectors * Lanes::kCount;
    sums.clear();
    if (!Single && tile.resumes) sums.resume(partial);
    const int64_t end = tile.ends[group];
    int64_t entry = tile.begins[group];
    if constexpr (Vectors * Rows < 8 && !Single) {  // two sets of sums, to hide the latency of the additions
      Sums<Vectors, Rows, Single> others;
      others.clear();
      for (; entry + 2 <= end; entry += 2) {
        sums.multiply_add(tile.input + tile.offset[entry], tile.values + entry * Rows, last);
        others.multiply_add(tile.input + tile.offset[entry + 1], tile.values + (entry + 1) * Rows, last);
      }
      sums.add(others);
    }
    for (; entry < end; entry++) sums.multiply_add(tile.input + tile.offset[entry], tile.values + entry * Rows, last);
    if (!Single && tile.pauses)
      sums.pause(partial);
    else
      sums.store(tile, group * Rows);
  }
}

int clip(int64_t count) { return count > Lanes::kCount ? Lanes::kCount : count < 0 ? 0 : int(count); }

void copy_strided_rows(const PlaneCopy& copy) {
  for (int64_t row = 0; row < copy.rows; row++) {
    const float* source = copy.source + row * copy.source_pitch;
    float* target = copy.target + row * copy.pitch;
    for (int64_t i = 0; i < copy.lead; i++) target[i] = 0.0f;
    for (int64_t i = 0; i < copy.count; i++) target[copy.lead + i] = source[i * copy.source_step];
    for (int64_t i = copy.lead + copy.count; i < copy.pitch; i++) target[i] = 0.0f;
  }
}

// Column of vectors by column of vectors, since rows are often no longer than one.
void copy_rows(const PlaneCopy& copy) {
  for (int64_t i = 0; i < copy.pitch; i += Lanes::kCount) {
    const Mask valid = Lanes::between(clip(copy.lead - i), clip(copy.lead + copy.count - i));
    const Mask kept = Lanes::first(clip(copy.pitch - i));
    const float* source = copy.source - copy.lead + i;
    float* target = copy.target + i;
    for (int64_t row = 0; row < copy.rows; row++, source += copy.source_pitch, target += copy.pitch)
      Lanes::store(target, kept, Lanes::load(source, valid));
  }
}

void copy_plane(const PlaneCopy& copy) {
  if (copy.source_step == 1)
    copy_rows(copy);
  else
    copy_strided_rows(copy);
  for (float* rest = copy.target + copy.rows * copy.pitch; rest < copy.limit; rest++) *rest = 0.0f;
}

// Loops for the compiler to vectorize, over the entries begin .. end: it goes over every entry on every call.
void translate_some(const EntryMap& map, int64_t begin, int64_t end, int32_t* offset, microglia::EntryReport& report) {
  const uint32_t channels = map.channels, size = map.channel_size, taps = map.taps;
  const uint32_t* tap_offset = map.tap_offset;
  const int32_t* channel = map.channel;
  const uint8_t* tap = map.tap;
  uint32_t bad_channel = 0, bad_tap = 0, falls = 0;
  for (int64_t i = begin; i < end; i++) {
    bad_channel |= uint32_t(channel[i]) >= channels;
    offset[i] = int32_t(uint32_t(channel[i]) * size);
  }
  for (int64_t i = begin > 0 ? begin : 1; i < end; i++) falls += channel[i] < channel[i - 1];
  for (int64_t i = begin; tap && i < end; i++) {
    bad_tap |= tap[i] >= taps;
    offset[i] = int32_t(uint32_t(offset[i]) + tap_offset[tap[i]]);
  }
  report.bad_channel |= bad_channel != 0;
  report.bad_tap |= bad_tap != 0;
  report.falls += falls;
}

microglia::EntryReport translate(const EntryMap& map, int64_t entries, int32_t* offset) {
  constexpr int64_t kSome = 2048;  // stay in the first cache from loop to loop
  microglia::EntryReport report{};
  for (int64_t begin = 0; begin < entries; begin += kSome)
    translate_some(map, begin, begin + kSome < entries ? begin + kSome : entries, offset, report);
  return report;
}

template <int Rows, int Widest, int WidestWithSingle, int Vectors = Widest>
constexpr void fill_tiles(RowLevel::Tiles& tiles) {
  tiles.plain[Vectors] = row_tile<Vectors, Rows, false>;
  if constexpr (Vectors <= WidestWithSingle && Vectors * Rows >= 8) tiles.with_single[Vectors] = row_tile<Vectors, Rows, true>;
  if constexpr (Vectors > 1) fill_tiles<Rows, Widest, WidestWithSingle, Vectors - 1>(tiles);
}

template <int Rows, int Widest, int WidestWithSingle>
constexpr RowLevel::Tiles make_tiles() {
  RowLevel::Tiles tiles{Widest, WidestWithSingle, {}, {}};
  fill_tiles<Rows, Widest, WidestWithSingle>(tiles);
  return tiles;
}

}  // namespace

#endif
