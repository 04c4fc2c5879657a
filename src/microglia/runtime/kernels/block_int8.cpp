// In 8 bits: the block-sparse convolution (checks of its own, then what the other types run), and pooling.
#include <algorithm>
#include <cstring>

#include "block_level.h"
#include "block_plan.h"
#include "block_run.h"
#include "kernels.h"

#define MG_EXPORT extern "C" __attribute__((visibility("default")))

namespace microglia::block {
namespace {

const Level& current_quad_level() {
  const int level = mg_level();
#if defined(MICROGLIA_AVX512VNNI)
  if (level >= MG_AVX512VNNI) return avx512vnni_quad_level();
#endif
#if defined(__x86_64__)
  if (level >= MG_AVX2) return avx2_quad_level();
#endif
  return generic_quad_level();
}

// Whether a pointwise convolution can read its quads where they are: each lies within one pixel.
bool reads_in_place(const mg_conv2d& conv, const Plan& plan, const Blocks& blocks) {
  const bool follow = conv.stride_height == 1 && conv.stride_width == 1 && conv.padding_height == 0 && conv.padding_width == 0;
  if (!plan.pointwise || !follow) return false;
  int32_t last = 0;
  for (int64_t index = 0; index < blocks.blocks; ++index) last = std::max(last, blocks.channel[index]);
  return last + place_bytes <= conv.in_channels;
}

bool quads_are_whole(const Blocks& blocks) {
  constexpr int32_t last = line_bytes - place_bytes;
  int32_t across = 0;
  for (int64_t index = 0; index < blocks.blocks; ++index) across |= (blocks.channel[index] & (line_bytes - 1)) > last;
  return !across;
}

int check_rescale(const mg_rescale* rescale) {
  if (!rescale || !rescale->start || !rescale->scale || !rescale->bias) return MG_BAD_POINTER;
  const bool ordered = rescale->low <= rescale->high && rescale->zero >= 0 && rescale->zero <= 255;
  const bool bytes = rescale->low >= 0.0f && rescale->high <= 255.0f;
  return ordered && (rescale->wide || bytes) ? MG_OK : MG_BAD_SIZE;
}

// ---- Tiles ----

constexpr int64_t tile_blocks = 16;

thread_local Scratch untiled;

bool tiles_are_whole(const Blocks& blocks, int64_t stripes) {
  int32_t bits = 0;
  for (int64_t stripe = 0; stripe <= stripes; ++stripe) bits |= blocks.row_pointer[stripe];
  return bits % tile_blocks == 0;
}

// The values of tiles in the order of blocks, in memory of the calling thread; null if there is none.
const char* untile(const Blocks& blocks) {
  char* values = untiled.reserve(std::max<int64_t>(1, blocks.value_bytes()));
  for (int64_t block = 0; values && block < blocks.blocks; ++block) {
    const char* from = blocks.values + block / tile_blocks * tile_blocks * line_bytes + block % tile_blocks * place_bytes;
    char* to = values + block * line_bytes;
    for (int64_t output = 0; output < stripe_outputs; ++output) std::memcpy(to + output * place_bytes, from + output * line_bytes, place_bytes);
  }
  return values;
}

const Level* tile_level() {
#if defined(MICROGLIA_AMX)
  if (mg_level() >= MG_AMX) return &amx_tile_level();
#endif
  return nullptr;
}

// Tiles keep to no bound, so that the levels that add in 16 bits do not run them.
const Level& untiled_level() { return mg_level() >= MG_AVX512VNNI ? current_quad_level() : generic_quad_level(); }

struct Pooling {
  const mg_conv2d* conv;
  int64_t rows, columns;  // of the output
  const uint8_t* x;
  uint8_t* y;
};

// One row of the output; no window is without a pixel of the image, and 0 is the smallest.
void pool_row(const Pooling& work, int64_t index) {
  const mg_conv2d& conv = *work.conv;
  const int64_t channels = conv.in_channels, top = index % work.rows * conv.stride_height - conv.padding_height;
  const uint8_t* image = work.x + index / work.rows * conv.height * conv.width * channels;
  uint8_t* to = work.y + index * work.columns * channels;
  for (int64_t column = 0; column < work.columns; ++column, to += channels) {
    const int64_t left = column * conv.stride_width - conv.padding_width;
    std::memset(to, 0, static_cast<size_t>(channels));
    for (int64_t row = std::max<int64_t>(0, top); row < std::min(conv.height, top + conv.kernel_height); ++row) {
      for (int64_t at = std::max<int64_t>(0, left); at < std::min(conv.width, left + conv.kernel_width); ++at) {
        const uint8_t* from = image + (row * conv.width + at) * channels;
        for (int64_t channel = 0; channel < channels; ++channel) to[channel] = std::max(to[channel], from[channel]);
      }
    }
  }
}

void pool(int64_t begin, int64_t end, void* context) {
  for (int64_t index = begin; index < end; ++index) pool_row(*static_cast<Pooling*>(context), index);
}

}  // namespace
}  // namespace microglia::block

using namespace microglia::block;

MG_EXPORT int mg_block_conv2d_int8(const mg_conv2d* conv, const mg_blocks_int8* blocks, const mg_rescale* rescale, const uint8_t* x,
                                   int64_t x_stride, void* y, int64_t y_stride, const void* residual, int64_t residual_stride,
                                   mg_parallel parallel) {
  if (!blocks) return MG_BAD_POINTER;
  if (int code = check_rescale(rescale)) return code;
  if (int code = check(conv, {x, x_stride, y, y_stride, residual, residual_stride, rescale->bias})) return code;
  if (conv->activation != MG_NONE) return MG_BAD_ACTIVATION;
  Blocks quads{4, blocks->blocks, 1, reinterpret_cast<const char*>(blocks->values), blocks->row_pointer, blocks->channel,
               blocks->tap};
  if (int code = check_blocks(*conv, quads)) return code;
  if (!quads_are_whole(quads)) return MG_BAD_QUAD;
  if (blocks->tiled && !tiles_are_whole(quads, divide_up(conv->out_channels, stripe_outputs))) return MG_BAD_ROW_POINTER;
  const Level* tiles = blocks->tiled ? tile_level() : nullptr;
  if (blocks->tiled && !tiles && !(quads.values = untile(quads))) return MG_NO_MEMORY;
  const Level& level = tiles ? *tiles : blocks->tiled ? untiled_level() : current_quad_level();
  Run run;
  const int64_t reached = reached_channels(*conv, quads);
  if (int code = make_plan(*conv, level, reached, quads.value_bytes(), Order::follow, run.plan)) return code;
  run.plan.fill = static_cast<uint8_t>(rescale->zero);
  run.plan.read(x, x_stride);
  if (!tiles && reads_in_place(*conv, run.plan, quads)) {
    run.plan.direct = true;
    run.plan.pixel_bytes = x_stride;
    run.plan.group_bytes = line_bytes;  // the channels of a pixel follow each other
  }
  const Rescale own{rescale->start, rescale->scale, rescale->other, rescale->low, rescale->high, rescale->wide != 0};
  const auto image = [&](const void* data, int64_t stride) {
    return pixels_of(data, stride, run.plan.rows.output, run.plan.columns.output, own.element_bytes());
  };
  run.output = {image(y, y_stride), image(residual, residual_stride), rescale->bias, conv->out_channels, MG_NONE, false, &own};
  return run_places(*conv, quads, run, parallel);
}

MG_EXPORT int mg_max_pool_int8(const mg_conv2d* conv, const uint8_t* x, uint8_t* y, mg_parallel parallel) {
  if (int code = check(conv, {x, conv ? conv->in_channels : 0, y, conv ? conv->in_channels : 0, nullptr, 0, nullptr})) return code;
  const bool plain = conv->dilation_height == 1 && conv->dilation_width == 1 && conv->out_channels == conv->in_channels;
  const bool inside = conv->padding_height * 2 <= conv->kernel_height && conv->padding_width * 2 <= conv->kernel_width;
  if (!plain || !inside) return MG_BAD_SIZE;
  Pooling work{conv, output_size(conv->height, conv->kernel_height, conv->stride_height, conv->padding_height, 1),
               output_size(conv->width, conv->kernel_width, conv->stride_width, conv->padding_width, 1), x, y};
  in_parallel(parallel, conv->batch * work.rows, 4, pool, &work);
  return MG_OK;
}
