// Cutting a convolution into chunks and tiles, and copying a chunk's input to lines.
#include "block_plan.h"

#include <algorithm>
#include <cstring>

namespace microglia::block {
namespace {

// Of a level-2 cache of 1 MiB, which holds a chunk's lines beside the weights that they meet.
constexpr int64_t near_bytes = 64 << 10, chunk_bytes = 192 << 10, deep_chunk_bytes = 512 << 10, warm_value_bytes = 512 << 10;

// Places are 32-bit offsets into a chunk's lines.
constexpr int64_t max_scratch_bytes = int64_t{1} << 32;

// The work of covering the output with tiles: pixels, but a tile of few cannot hide the latency of an addition, and each
// has its own loads of weights and places; then the lines that it reads, which is what prefers square tiles.
double cover_cost(const Plan& plan, int64_t rows, int64_t columns) {
  const Chunk& space = plan.space;
  const int64_t at_once = plan.level->columns, together = plan.rows_at_once(columns);
  const double tiles = static_cast<double>(divide_up(space.rows, rows) * divide_up(space.columns, columns));
  const int64_t whole = space.columns / columns, rest = space.columns - whole * columns;
  const auto computed_of = [&](int64_t count) { return divide_up(count, at_once) * at_once; };
  const double computed = static_cast<double>(divide_up(space.rows, together) * (whole * computed_of(columns) + computed_of(rest)));
  const double pixels = std::max(computed, tiles * static_cast<double>(plan.level->pixels) * 0.3);
  const Axis down = plan.pointwise ? Axis{1, 1, 1, 0, 1, 1, 1} : plan.rows, across = plan.pointwise ? down : plan.columns;
  return pixels + tiles * (2.0 + 0.02 * static_cast<double>(down.lines(rows) * across.lines(columns)));
}

void choose_tile(Plan& plan) {
  double least = 0;
  const int64_t together = plan.rows_at_once(plan.space.columns);
  const int64_t at_once = plan.level->columns, most = plan.level->pixels / at_once;
  for (int64_t rows = 1; rows <= std::min<int64_t>({4 * together, plan.space.rows, most * together}); ++rows) {
    for (int64_t columns = 1; columns <= std::min(plan.space.columns, most / divide_up(rows, together) * at_once); ++columns) {
      const double cost = cover_cost(plan, rows, columns);
      if (least != 0 && cost >= least) continue;
      least = cost, plan.tile_rows = rows, plan.tile_columns = columns;
    }
  }
}

int64_t even_share(int64_t total, int64_t most, int64_t multiple) {
  const int64_t pieces = divide_up(total, std::max(most, multiple));
  return std::min(total, divide_up(divide_up(total, pieces), multiple) * multiple);
}

void choose_pointwise_chunk(Plan& plan, int64_t budget, int64_t threads) {
  const int64_t fitting = budget / (plan.groups * plan.level->line), fair = divide_up(plan.space.columns, threads);
  plan.chunk = {0, 1, 0, 1, 0, even_share(plan.space.columns, std::min(fitting, fair), plan.tile_columns)};
}

void choose_image_chunk(Plan& plan, int64_t budget, int64_t threads) {
  const int64_t line = plan.row_bytes * plan.groups, lines = budget / line, whole = plan.rows.lines(plan.space.rows);
  plan.chunk = plan.space;
  if (whole <= lines && plan.space.images >= threads) {
    plan.chunk.images = std::min(divide_up(plan.space.images, threads), lines / whole);
    return;
  }
  const int64_t fitting = (lines - plan.rows.lines(1)) / plan.rows.step + 1;
  plan.chunk.images = 1;
  plan.chunk.rows = even_share(plan.space.rows, std::max<int64_t>(1, fitting), plan.tile_rows);
}

Axis make_axis(int64_t input, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t output = output_size(input, taps, stride, padding, dilation);
  if (output == 1 && taps > 1) stride = 1;  // where to go from the only output does not matter, and may be further than memory
  return {input, output, taps, padding, dilation, taps == 1 ? 1 : stride, taps == 1 ? stride : 1};
}

}  // namespace

bool reads_lines(const mg_conv2d& conv) {
  return conv.stride_height == 1 && conv.stride_width == 1;
}

namespace {

// What does not depend on where anything lies.
void begin_plan(const mg_conv2d& conv, const Level& level, int64_t channels, bool pointwise, Plan& plan) {
  plan.level = &level;
  plan.rows = make_axis(conv.height, conv.kernel_height, conv.stride_height, conv.padding_height, conv.dilation_height);
  plan.columns = make_axis(conv.width, conv.kernel_width, conv.stride_width, conv.padding_width, conv.dilation_width);
  plan.pointwise = pointwise;
  plan.channels = conv.in_channels;
  plan.groups = divide_up(channels * level.element_bytes, level.line);
  plan.pixel_bytes = level.line;
  plan.space = {0, conv.batch, 0, plan.rows.output, 0, plan.columns.output};
  if (pointwise) plan.space = {0, 1, 0, 1, 0, conv.batch * plan.rows.output * plan.columns.output};
  choose_tile(plan);
}

bool is_deep(int64_t value_bytes) { return value_bytes > warm_value_bytes; }

}  // namespace

int make_plan(const mg_conv2d& conv, const Level& level, int64_t channels, int64_t value_bytes, Order order, Plan& plan) {
  const bool one_tap = conv.kernel_height == 1 && conv.kernel_width == 1;
  begin_plan(conv, level, channels, one_tap && order == Order::follow, plan);
  plan.direct = false;
  const int64_t threads = std::max<int64_t>(1, conv.threads);
  if (plan.pointwise) {
    choose_pointwise_chunk(plan, is_deep(value_bytes) ? deep_chunk_bytes : near_bytes, threads);
    plan.row_bytes = plan.image_bytes = plan.chunk.columns * level.line;
  } else {
    const int64_t phase_lines = divide_up(plan.columns.lines(plan.space.columns), plan.columns.step);
    plan.row_bytes = phase_lines * plan.columns.step * level.line;
    int64_t least;  // what one output row needs of all channels
    if (__builtin_mul_overflow(plan.row_bytes, plan.rows.lines(1), &least) ||
        __builtin_mul_overflow(least, plan.groups, &least) || least >= max_scratch_bytes) {
      return MG_BAD_SIZE;
    }
    choose_image_chunk(plan, is_deep(value_bytes) ? deep_chunk_bytes : chunk_bytes, threads);
    plan.image_bytes = plan.rows.lines(plan.chunk.rows) * plan.row_bytes;
  }
  // An odd number of lines, so that the groups of one pixel do not all fall into the same set of the cache.
  plan.group_bytes = divide_up(plan.chunk.images * plan.image_bytes, line_bytes) * line_bytes | line_bytes;
  return plan.scratch_bytes() < max_scratch_bytes ? MG_OK : MG_BAD_SIZE;
}

int make_direct_plan(const mg_conv2d& conv, const Level& level, int64_t value_bytes, const Image& x, Plan& plan) {
  begin_plan(conv, level, conv.in_channels, false, plan);
  plan.direct = true;
  plan.x = x;
  plan.row_bytes = x.row, plan.image_bytes = x.image, plan.group_bytes = x.stripe;
  choose_image_chunk(plan, is_deep(value_bytes) ? deep_chunk_bytes : chunk_bytes, std::max<int64_t>(1, conv.threads));
  return plan.scratch_bytes() < max_scratch_bytes ? MG_OK : MG_BAD_SIZE;
}

int64_t tap_place(const Plan& plan, int64_t tap) {
  const int64_t down = tap / plan.columns.taps * plan.rows.dilation, across = tap % plan.columns.taps * plan.columns.dilation;
  const int64_t phase_bytes = plan.row_bytes / plan.columns.step;
  return down * plan.row_bytes + across % plan.columns.step * phase_bytes + across / plan.columns.step * plan.level->line;
}

int64_t Plan::rows_at_once(int64_t columns_) const {
  if (level->columns == 1 || pointwise || columns_ != space.columns) return 1;
  const int64_t pitch = rows.step * columns.step * divide_up(columns.lines(space.columns), columns.step);
  return 1 + std::max<int64_t>(0, level->columns - columns_) / pitch;
}

int64_t Plan::chunks() const {
  return divide_up(space.images, chunk.images) * divide_up(space.rows, chunk.rows) * divide_up(space.columns, chunk.columns);
}

Chunk Plan::chunk_at(int64_t index) const {
  const int64_t across = divide_up(space.columns, chunk.columns), down = divide_up(space.rows, chunk.rows);
  Chunk part;
  part.column = index % across * chunk.columns;
  part.row = index / across % down * chunk.rows;
  part.image = index / across / down * chunk.images;
  part.columns = std::min(chunk.columns, space.columns - part.column);
  part.rows = std::min(chunk.rows, space.rows - part.row);
  part.images = std::min(chunk.images, space.images - part.image);
  return part;
}

int64_t Plan::copy_units(const Chunk& part) const { return pointwise ? part.columns : part.images * rows.lines(part.rows); }

void Plan::copy(const Chunk& part, int64_t begin, int64_t end, char* scratch) const {
  if (pointwise) return copy_pixels(part, begin, end, scratch);
  const int64_t lines = rows.lines(part.rows);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = (part.row * rows.step + unit % lines) * rows.scale - rows.padding;
    copy_row(part.image + unit / lines, row, scratch + unit / lines * image_bytes + unit % lines * row_bytes);
  }
}

void Plan::copy_row(int64_t image, int64_t row, char* lines) const {
  const int64_t phase_bytes = row_bytes / columns.step, phase_lines = phase_bytes / level->line;
  if (row < 0 || row >= rows.input) return clear(lines, 0, row_bytes / level->line);
  for (int64_t phase = 0; phase < columns.step; ++phase) {
    copy_valid(x.at(image, row, 0), phase * columns.scale - columns.padding, phase_lines,
               lines + phase * phase_bytes);
  }
}

// `count` lines of one input row, from position `first` in steps of the stride; filled where that lies outside the row.
void Plan::copy_valid(const char* row, int64_t first, int64_t count, char* lines) const {
  const int64_t stride = columns.step * columns.scale;
  const int64_t begin = first < 0 ? std::min(count, divide_up(-first, stride)) : 0;
  const int64_t end = first < columns.input ? std::clamp(divide_up(columns.input - first, stride), begin, count) : begin;
  clear(lines, 0, begin);
  if (begin < end) {
    char* inside = lines + begin * level->line;
    copy_run(row + (first + begin * stride) * x.pixel, stride * x.pixel, end - begin, inside);
  }
  clear(lines + end * level->line, 0, count - end);
}

void Plan::copy_pixels(const Chunk& part, int64_t begin, int64_t end, char* scratch) const {
  const bool plain = rows.scale == 1 && columns.scale == 1 && rows.padding == 0 && columns.padding == 0;
  const int64_t width = plain ? space.columns : columns.output;
  for (int64_t pixel = begin; pixel < end;) {
    const int64_t at = part.column + pixel, column = at % width, count = std::min(end - pixel, width - column);
    char* lines = scratch + pixel * level->line;
    pixel += count;
    if (plain) {
      copy_run(x.at(0, 0, at), x.pixel, count, lines);
      continue;
    }
    const int64_t image = at / width / rows.output, row = at / width % rows.output * rows.scale - rows.padding;
    if (row < 0 || row >= rows.input) {
      clear(lines, 0, count);
    } else {
      copy_valid(x.at(image, row, 0), column * columns.scale - columns.padding, count, lines);
    }
  }
}

void Plan::copy_run(const char* source, int64_t step, int64_t pixels, char* lines) const {
  const int64_t bytes = channels * level->element_bytes;
  const int64_t stripes_to_a_line = line_bytes / (stripe_outputs * level->element_bytes);  // 64 bytes of x, whatever the copy has
  level->copy(source, step, x.stripe * stripes_to_a_line, bytes, pixels, lines, group_bytes);
  clear(lines, divide_up(bytes, level->line), pixels);
}

void Plan::clear(char* lines, int64_t first_group, int64_t pixels) const {
  for (int64_t group = first_group; group < groups && pixels > 0; ++group) {
    std::memset(lines + group * group_bytes, fill, static_cast<size_t>(pixels * level->line));
  }
}

}  // namespace microglia::block
