// Row-sparse convolution (NCHW): checks, the padded copy of the input and the split of the work over threads.
#include <stdlib.h>

#include <algorithm>

#include "kernels.h"
#include "rows_layout.h"
#include "rows_level.h"
#include "rows_panels.h"

namespace microglia {
namespace {

constexpr size_t kAlignment = 64;

// Memory of one thread: grows only, and is freed at the thread's exit.
class Scratch {
 public:
  ~Scratch() { free(memory_); }

  // Null where there is no memory.
  char* reserve(size_t bytes) {
    if (bytes > size_) {
      free(memory_);
      memory_ = static_cast<char*>(aligned_alloc(kAlignment, bytes));
      size_ = memory_ ? bytes : 0;
    }
    return memory_;
  }

 private:
  char* memory_ = nullptr;
  size_t size_ = 0;
};

thread_local Scratch scratch;
thread_local Scratch partial_scratch;  // for the sums of a tile between two turns

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

const RowLevel& row_level() {
#if defined(__x86_64__)
  const int level = mg_level();
  if (level >= MG_AVX512) return kRowsAvx512;
  if (level == MG_AVX2) return kRowsAvx2;
#endif
  return kRowsGeneric;
}

// How the run of pixels is cut into vectors and these into tiles.
struct Cut {
  const RowLevel::Tiles* routines;
  int64_t vectors, tiles;
  int last_lanes;  // of the last vector
  bool single;     // one more pixel behind the last vector
};

Cut cut_run(const RowLevel& level, int64_t rows, int64_t run) {
  Cut cut;
  cut.routines = &level.tiles[rows == 1 ? 0 : rows == 2 ? 1 : 2];
  cut.vectors = run / level.lanes;
  const int rest = int(run % level.lanes);
  int widest = cut.routines->widest;
  const int64_t narrowest_single = 8 / rows;
  cut.single = rest == 1 && cut.routines->widest_with_single > 0 && cut.vectors >= narrowest_single;
  if (rest > 0 && !cut.single) cut.vectors++;
  cut.last_lanes = rest > 0 && !cut.single ? rest : level.lanes;
  if (cut.single) widest = cut.routines->widest_with_single;
  cut.tiles = (cut.vectors + widest - 1) / widest;
  return cut;
}

struct Call {
  const mg_conv2d* conv;
  const mg_rows* rows;
  const Layout* layout;
  const RowLevel* level;
  Cut cut;
  int64_t groups, parts;  // parts: how many the row groups of a tile are cut into
  Panels panels;
  int32_t* panel_bounds;  // [panels + 1][groups]: where the entries of a panel begin in each group
  const float* image;     // of the batch's current one
  float* planes;
  const float* input;     // the image or its planes
  const int32_t* offset;
  VectorPlace* places;
  int32_t* orders;
  float* output;
  const float* residual;
  const float* bias;
};

// The row group where a part begins: parts are about equal in entries plus what a group costs by itself.
int64_t part_begin(const Call& call, int64_t part) {
  constexpr int64_t kGroupCost = 4;
  const int32_t* pointer = call.rows->row_pointer;
  const int64_t wanted = (call.rows->entries + kGroupCost * call.groups) * part / call.parts;
  int64_t low = 0, high = call.groups;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (pointer[middle] + kGroupCost * middle < wanted)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Goes through a tile's entries panel by panel, or in one go where there is no memory for the sums in between.
void run_turns(const Call& call, RowTile& tile, RowLevel::Routine routine, int64_t pixels) {
  const size_t partial = size_t((tile.last_group - tile.first_group) * call.rows->rows * pixels) * sizeof(float);
  int64_t turns = call.panels.count;
  if (turns > 1) tile.partial = reinterpret_cast<float*>(partial_scratch.reserve(aligned(partial)));
  if (!tile.partial) turns = 1;
  const int32_t* bounds = call.panel_bounds;
  for (int64_t turn = 0; turn < turns; turn++) {
    tile.begins = bounds + turn * call.groups;
    tile.ends = bounds + (turn + 1) * call.groups;
    if (turns == 1) tile.ends = bounds + call.panels.count * call.groups;
    tile.resumes = turn > 0;
    tile.pauses = turn < turns - 1;
    routine(tile);
  }
}

void run_piece(const Call& call, int64_t piece) {
  const Cut& cut = call.cut;
  const int64_t index = piece / call.parts, part = piece % call.parts;
  const int64_t begin = cut.vectors * index / cut.tiles, end = cut.vectors * (index + 1) / cut.tiles;
  const int lanes = call.level->lanes;
  const bool last = index == cut.tiles - 1;
  RowTile tile{};
  tile.input = call.input + begin * lanes;
  tile.offset = call.offset;
  tile.values = call.rows->values;
  tile.places = call.places + begin;
  tile.orders = call.orders ? call.orders + begin * lanes : nullptr;
  tile.output = call.output;
  tile.residual = call.residual;
  tile.bias = call.bias;
  tile.plane = call.layout->out_height * call.layout->out_width;
  tile.first_group = part_begin(call, part);
  tile.last_group = part_begin(call, part + 1);
  tile.out_channels = call.conv->out_channels;
  tile.last_lanes = last ? cut.last_lanes : lanes;
  tile.activation = call.conv->activation;
  const bool single = last && cut.single;
  run_turns(call, tile, (single ? cut.routines->with_single : cut.routines->plain)[end - begin], (end - begin) * lanes);
}

void run_pieces(int64_t begin, int64_t end, void* context) {
  for (int64_t piece = begin; piece < end; piece++) run_piece(*static_cast<const Call*>(context), piece);
}

void copy_channels(int64_t begin, int64_t end, void* context) {
  const Call& call = *static_cast<const Call*>(context);
  copy_planes(*call.conv, *call.layout, *call.level, call.image, call.planes, begin, end);
}

void in_parallel(mg_parallel parallel, int64_t count, int64_t grain, mg_body body, Call& call) {
  if (parallel)
    parallel(0, count, grain, body, &call);
  else
    body(0, count, &call);
}

// Fills in where the lanes of each vector of the run go; a single pixel counts as a vector.
void place_vectors(const Call& call) {
  const Layout& layout = *call.layout;
  const int lanes = call.level->lanes;
  const int64_t vectors = call.cut.vectors + call.cut.single;
  int64_t pixel = 0, column = 0, position = 0;
  for (int64_t vector = 0; vector < vectors; vector++) {
    VectorPlace& place = call.places[vector];
    place.position = int32_t(position);
    if (!call.orders) {
      place.count = int32_t(std::min<int64_t>(lanes, layout.run - position));
      position += place.count;
      continue;
    }
    int32_t* order = call.orders + vector * lanes;
    std::fill(order, order + lanes, 0);
    place.count = 0;
    for (int lane = 0; lane < lanes && pixel < layout.run; lane++, pixel++) {
      if (column < layout.out_width) order[place.count++] = lane;
      if (++column == layout.pitch) column = 0;
    }
    position += place.count;
  }
}

// Gives the call its scratch memory; false where there is none.
bool take_scratch(Call& call, int32_t*& offset) {
  const Layout& layout = *call.layout;
  const size_t vectors = size_t(call.cut.vectors + 1);
  // What a tile loads past its last plane is not used, but must be there.
  const size_t slack = size_t(kMostVectors * call.level->lanes);
  const size_t planes = layout.direct ? 0 : aligned((size_t(layout.floats) + slack) * sizeof(float));
  const size_t offsets = aligned(size_t(call.rows->entries) * sizeof(int32_t));
  const size_t places = aligned(vectors * sizeof(VectorPlace));
  const bool gaps = layout.pitch != layout.out_width;
  const size_t orders = gaps ? aligned(vectors * size_t(call.level->lanes) * sizeof(int32_t)) : 0;
  const size_t bounds = aligned(size_t((call.panels.count + 1) * call.groups) * sizeof(int32_t));
  char* memory = scratch.reserve(planes + offsets + places + orders + bounds);
  if (!memory) return false;
  call.planes = reinterpret_cast<float*>(memory);
  offset = reinterpret_cast<int32_t*>(memory + planes);
  call.offset = offset;
  call.places = reinterpret_cast<VectorPlace*>(memory + planes + offsets);
  call.orders = gaps ? reinterpret_cast<int32_t*>(memory + planes + offsets + places) : nullptr;
  call.panel_bounds = reinterpret_cast<int32_t*>(memory + planes + offsets + places + orders);
  return true;
}

int check(const mg_conv2d& conv, const mg_rows& rows) {
  if (rows.rows != 1 && rows.rows != 2 && rows.rows != 4) return MG_BAD_BLOCK;
  if (conv.activation < MG_NONE || conv.activation > MG_SILU) return MG_BAD_ACTIVATION;
  if (rows.entries < 0 || rows.entries > INT32_MAX) return MG_BAD_SIZE;
  if (!rows.row_pointer || (rows.entries > 0 && (!rows.values || !rows.channel))) return MG_BAD_POINTER;
  if (rows.entries > 0 && !rows.tap && conv.kernel_height * conv.kernel_width != 1) return MG_BAD_POINTER;
  return MG_OK;
}

int check_row_pointer(const mg_rows& rows, int64_t groups) {
  bool falling = false;
  for (int64_t group = 0; group < groups; group++) falling |= rows.row_pointer[group + 1] < rows.row_pointer[group];
  return falling || rows.row_pointer[0] != 0 || rows.row_pointer[groups] != rows.entries ? MG_BAD_ROW_POINTER : MG_OK;
}

int translate_entries(const Call& call, int32_t* offset, int64_t& falls) {
  const mg_conv2d& conv = *call.conv;
  const EntryMap map{call.rows->channel,
                     call.rows->tap,
                     uint32_t(conv.in_channels),
                     uint32_t(call.layout->channel_size),
                     uint32_t(conv.kernel_height * conv.kernel_width),
                     call.layout->tap_offset};
  const EntryReport report = call.level->translate(map, call.rows->entries, offset);
  falls = report.falls;
  return report.bad_channel ? MG_BAD_CHANNEL : report.bad_tap ? MG_BAD_TAP : MG_OK;
}

// Enough parts that every thread gets several pieces; one where the tiles alone are enough.
int64_t parts_of_tile(const Call& call) {
  const int64_t threads = std::max<int64_t>(1, call.conv->threads);
  if (threads == 1) return 1;
  const int64_t pieces = std::min<int64_t>(4 * threads, INT32_MAX);
  return std::min(call.groups, (pieces + call.cut.tiles - 1) / call.cut.tiles);
}

void convolve(Call& call, const float* x, float* y, const float* residual, mg_parallel parallel) {
  const mg_conv2d& conv = *call.conv;
  const int64_t image_size = conv.in_channels * conv.height * conv.width;
  const int64_t output_size = conv.out_channels * call.layout->out_height * call.layout->out_width;
  constexpr int64_t kCopyGrain = 16;
  for (int64_t image = 0; image < conv.batch; image++) {
    call.image = x + image * image_size;
    call.output = y + image * output_size;
    call.residual = residual ? residual + image * output_size : nullptr;
    call.input = call.layout->direct ? call.image : call.planes;
    if (!call.layout->direct) in_parallel(parallel, conv.in_channels, kCopyGrain, copy_channels, call);
    in_parallel(parallel, call.cut.tiles * call.parts, 1, run_pieces, call);
  }
}

// Checks the rest of the problem, which needs the layout, and fills in the call.
int prepare(Call& call) {
  const mg_conv2d& conv = *call.conv;
  const mg_rows& rows = *call.rows;
  call.level = &row_level();
  call.groups = (conv.out_channels + rows.rows - 1) / rows.rows;
  int code = check_row_pointer(rows, call.groups);
  if (code != MG_OK) return code;
  call.cut = cut_run(*call.level, rows.rows, call.layout->run);
  call.parts = parts_of_tile(call);
  const int64_t widest_tile = (call.cut.vectors + call.cut.tiles - 1) / call.cut.tiles;
  call.panels = call.cut.single ? Panels{1, conv.in_channels}
                                : choose_panels(conv, rows, *call.layout, widest_tile * call.level->lanes);
  int32_t* offset;
  if (!take_scratch(call, offset)) return MG_NO_MEMORY;
  int64_t falls;
  code = translate_entries(call, offset, falls);
  if (code != MG_OK) return code;
  place_vectors(call);
  bound_panels(rows, call.groups, falls, call.panels, call.panel_bounds);
  return MG_OK;
}

}  // namespace
}  // namespace microglia

extern "C" __attribute__((visibility("default")))
int mg_row_conv2d(const mg_conv2d* conv, const mg_rows* rows, const float* x, float* y, const float* residual,
                  const float* bias, mg_parallel parallel) {
  using namespace microglia;
  if (!conv || !rows || !x || !y) return MG_BAD_POINTER;
  mg_conv2d flat = *conv;
  flatten(flat);
  // Single rows are bound by loads, and one that crosses a cache line counts twice: a copy pays from a few entries on.
  constexpr int64_t kFewEntries = 24;
  const bool aligned = rows->rows == 1 && rows->entries / kFewEntries >= flat.in_channels;
  Layout layout;
  int code = make_layout(flat, aligned, layout);
  if (code == MG_OK) code = check(flat, *rows);
  if (code != MG_OK) return code;
  Call call{};
  call.conv = &flat;
  call.rows = rows;
  call.layout = &layout;
  call.bias = bias;
  code = prepare(call);
  if (code == MG_OK) convolve(call, x, y, residual, parallel);
  return code;
}
