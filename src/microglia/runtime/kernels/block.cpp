// The block-sparse convolution: check everything, make the list of places, plan, run.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "block_level.h"
#include "block_plan.h"
#include "block_run.h"
#include "kernels.h"

#define MG_EXPORT extern "C" __attribute__((visibility("default")))

namespace microglia::block {
namespace {

constexpr int64_t cold_value_bytes = 512 << 10;  // more weights than this are prefetched
constexpr int64_t locate_grain = 16384;          // blocks

thread_local Scratch place_scratch;

}  // namespace

// A processor runs the last of these that it has: a level between two of them runs the lower one.
const Level& current_level() {
#if defined(__x86_64__)
  const int level = mg_level();
  if (level >= MG_AVX512) return avx512_level();
  if (level >= MG_AVX2) return avx2_level();
#endif
  return generic_level();
}

namespace {

const Level& current_pair_level() {
#if defined(__x86_64__)
  const int level = mg_level();
#if defined(MICROGLIA_AVX512BF16)
  if (level >= MG_AVX512BF16) return avx512bf16_pair_level();
#endif
  if (level >= MG_AVX512) return avx512_pair_level();
  if (level >= MG_AVX2) return avx2_pair_level();
#endif
  return generic_pair_level();
}

}  // namespace

// ---- Checks ----

namespace {

bool sizes_are_sane(const mg_conv2d& conv) {
  const int64_t positive[] = {conv.batch,         conv.in_channels,   conv.height,        conv.width,
                              conv.out_channels,  conv.kernel_height, conv.kernel_width,  conv.stride_height,
                              conv.stride_width,  conv.dilation_height, conv.dilation_width};
  for (int64_t size : positive) {
    if (size < 1 || size > INT32_MAX) return false;
  }
  const int64_t paddings[] = {conv.padding_height, conv.padding_width};
  for (int64_t padding : paddings) {
    if (padding < 0 || padding > INT32_MAX / 4) return false;
  }
  if (conv.kernel_height * conv.kernel_width > INT32_MAX) return false;
  return conv.height + 2 * conv.padding_height > conv.dilation_height * (conv.kernel_height - 1) &&
         conv.width + 2 * conv.padding_width > conv.dilation_width * (conv.kernel_width - 1);
}

// Whether the bytes of batch * height * width * step elements can be counted.
bool fits(int64_t batch, int64_t height, int64_t width, int64_t step) {
  int64_t product;
  return !__builtin_mul_overflow(batch, height, &product) && !__builtin_mul_overflow(product, width, &product) &&
         !__builtin_mul_overflow(product, step, &product) && product <= INT64_MAX / 256;
}

}  // namespace

int check_sizes(const mg_conv2d* conv) {
  if (!conv) return MG_BAD_POINTER;
  if (!sizes_are_sane(*conv)) return MG_BAD_SIZE;
  return conv->activation < MG_NONE || conv->activation > MG_SILU ? MG_BAD_ACTIVATION : MG_OK;
}

int check(const mg_conv2d* conv, const Activations& given) {
  if (int code = check_sizes(conv)) return code;
  if (given.x_stride < conv->in_channels || given.y_stride < conv->out_channels ||
      (given.residual && given.residual_stride < conv->out_channels)) {
    return MG_BAD_SIZE;
  }
  // An output dimension is at most the input and its padding.
  const int64_t high = conv->height + 2 * conv->padding_height, wide = conv->width + 2 * conv->padding_width;
  const int64_t longest = std::max({given.x_stride, given.y_stride, given.residual ? given.residual_stride : 0, int64_t{16}});
  if (!fits(conv->batch, high, wide, longest)) return MG_BAD_SIZE;
  return given.x && given.y ? MG_OK : MG_BAD_POINTER;
}

int check_list(const int32_t* list, int64_t count, int64_t limit) {
  if (count < 0) return MG_BAD_SIZE;
  if (count > 0 && !list) return MG_BAD_POINTER;
  for (int64_t index = 0; index < count; ++index) {
    if (list[index] < 0 || list[index] >= limit || (index > 0 && list[index] <= list[index - 1])) return MG_BAD_LIST;
  }
  return MG_OK;
}

namespace {

// Whether every pair lies in one line: of blocks that begin at an odd channel, none is in the last one.
bool pairs_are_whole(const Blocks& blocks) {
  constexpr int32_t pair_line = line_bytes / 2;
  int32_t across = 0;
  for (int64_t index = 0; index < blocks.blocks; ++index) {
    const int32_t in_line = blocks.channel[index] & (pair_line - 1);
    across |= (in_line & 1) & (in_line > pair_line - blocks.inputs);
  }
  return !across;
}

}  // namespace

int check_blocks(const mg_conv2d& conv, const Blocks& blocks) {
  if (!blocks.row_pointer) return MG_BAD_POINTER;
  const int64_t inputs = blocks.inputs, stripes = divide_up(conv.out_channels, stripe_outputs);
  if ((inputs != 1 && inputs != 2 && inputs != 4 && inputs != 8) || blocks.places < 1) return MG_BAD_BLOCK;
  if (blocks.blocks < 0 || blocks.blocks > INT32_MAX) return MG_BAD_SIZE;
  const bool one_tap = conv.kernel_height == 1 && conv.kernel_width == 1;
  if (blocks.blocks > 0 && (!blocks.values || !blocks.channel || (!blocks.tap && !one_tap))) return MG_BAD_POINTER;
  const int32_t* row_pointer = blocks.row_pointer;
  if (row_pointer[0] != 0 || row_pointer[stripes] != blocks.blocks) return MG_BAD_ROW_POINTER;
  for (int64_t stripe = 0; stripe < stripes; ++stripe) {
    if (row_pointer[stripe] > row_pointer[stripe + 1]) return MG_BAD_ROW_POINTER;
  }
  return MG_OK;
}

namespace {

// ---- Places of blocks ----

struct Locating {
  const Plan* plan;
  const Blocks* blocks;
  PlaceTable table;
  uint32_t* places;
  std::atomic<uint32_t> faults{0};
};

bool blocks_are_aligned(const Blocks& blocks) {
  int32_t bits = 0;
  for (int64_t index = 0; index < blocks.blocks; ++index) bits |= blocks.channel[index];
  return (bits & (blocks.inputs - 1)) == 0;
}

// The places of a block from its first.
void spread(const Locating& work, const uint32_t* first, int64_t begin, int64_t count) {
  const uint32_t count_each = static_cast<uint32_t>(work.blocks->places), inputs = static_cast<uint32_t>(work.blocks->inputs);
  uint32_t* places = work.places + begin * count_each;
  for (int64_t index = 0; index < count; ++index) {
    const uint32_t channel = static_cast<uint32_t>(work.blocks->channel[begin + index]);
    const uint32_t tap = first[index] - work.table.of_channel(channel);
    for (uint32_t input = 0; input < inputs; input += inputs / count_each) *places++ = tap + work.table.of_channel(channel + input);
  }
}

void locate(int64_t begin, int64_t end, void* context) {
  Locating& work = *static_cast<Locating*>(context);
  const Blocks& blocks = *work.blocks;
  const auto some = [&](int64_t from, int64_t count, uint32_t* places) {
    return work.plan->level->locate(work.table, blocks.channel + from, blocks.tap ? blocks.tap + from : nullptr, count, places);
  };
  uint32_t faults = 0, first[256];
  if (blocks.places == 1) {
    faults = some(begin, end - begin, work.places + begin);
  } else {
    for (int64_t at = begin; at < end; at += 256) {
      const int64_t count = std::min<int64_t>(256, end - at);
      faults |= some(at, count, first);
      spread(work, first, at, count);
    }
  }
  work.faults.fetch_or(faults);
}

int locate_blocks(const Plan& plan, const Blocks& blocks, mg_parallel parallel, uint32_t* places) {
  Locating work{&plan, &blocks, {}, places};
  const int64_t taps = plan.rows.taps * plan.columns.taps;
  work.table.taps = static_cast<uint32_t>(taps);
  work.table.channels = static_cast<uint32_t>(plan.channels);
  work.table.element_bytes = static_cast<uint32_t>(plan.level->element_bytes);
  work.table.group_bytes = static_cast<uint32_t>(plan.group_bytes);
  for (int64_t tap = 0; tap < std::min<int64_t>(taps, 256); ++tap) {
    work.table.tap_offset[tap] = static_cast<uint32_t>(tap_place(plan, tap));
  }
  in_parallel(blocks.blocks > 2 * locate_grain ? parallel : nullptr, blocks.blocks, locate_grain, locate, &work);
  const uint32_t faults = work.faults.load();
  return faults & channel_fault ? MG_BAD_CHANNEL : faults & tap_fault ? MG_BAD_TAP : MG_OK;
}

}  // namespace

// ---- The convolution of blocks of either type ----

int64_t reached_channels(const mg_conv2d& conv, const Blocks& blocks) {
  const bool aligned = blocks.inputs == 1 || blocks_are_aligned(blocks);
  return aligned ? divide_up(conv.in_channels, blocks.inputs) * blocks.inputs : conv.in_channels + blocks.inputs - 1;
}

int run_places(const mg_conv2d& conv, const Blocks& blocks, Run& run, mg_parallel parallel) {
  const int64_t places_count = blocks.blocks * blocks.places;
  uint32_t* places = reinterpret_cast<uint32_t*>(place_scratch.reserve((places_count + places_ahead) * 4));
  if (!places) return MG_NO_MEMORY;
  std::fill_n(places + places_count, places_ahead, 0u);
  if (int code = locate_blocks(run.plan, blocks, parallel, places)) return code;
  const Weights kind = blocks.value_bytes() > cold_value_bytes ? Weights::cold : Weights::warm;
  const int64_t stripes = divide_up(conv.out_channels, stripe_outputs);
  run.weights = {kind, blocks.values, places, nullptr, blocks.places, blocks.row_pointer, 0, 0, nullptr, stripes};
  run.parallel = parallel;
  return execute(run, std::max(1, conv.threads));
}

Output output_of(const mg_conv2d& conv, const Plan& plan, const Activations& given) {
  const auto image = [&](const void* data, int64_t stride) {
    return pixels_of(data, stride, plan.rows.output, plan.columns.output, plan.level->element_bytes);
  };
  return {image(given.y, given.y_stride), image(given.residual, given.residual_stride), given.bias, conv.out_channels,
          conv.activation};
}

namespace {

int run_blocks(const mg_conv2d* conv, const Blocks& blocks, const Level& level, const Activations& given, mg_parallel parallel) {
  if (int code = check(conv, given)) return code;
  if (int code = check_blocks(*conv, blocks)) return code;
  const bool pairs = level.element_bytes < place_bytes;
  if (pairs && !blocks_are_aligned(blocks) && !pairs_are_whole(blocks)) return MG_BAD_PAIR;
  Run run;
  const int64_t reached = reached_channels(*conv, blocks);
  if (int code = make_plan(*conv, level, reached, blocks.value_bytes(), Order::follow, run.plan)) return code;
  run.plan.read(given.x, given.x_stride);
  run.output = output_of(*conv, run.plan, given);
  return run_places(*conv, blocks, run, parallel);
}

}  // namespace
}  // namespace microglia::block

using namespace microglia::block;

MG_EXPORT int mg_block_conv2d(const mg_conv2d* conv, const mg_blocks* blocks, const float* x, int64_t x_stride, float* y,
                              int64_t y_stride, const float* residual, int64_t residual_stride, const float* bias,
                              mg_parallel parallel) {
  if (!blocks) return MG_BAD_POINTER;
  const Activations given{x, x_stride, y, y_stride, residual, residual_stride, bias};
  return run_blocks(conv, blocks_of(*blocks), current_level(), given, parallel);
}

MG_EXPORT int mg_block_conv2d_bf16(const mg_conv2d* conv, const mg_blocks_bf16* blocks, const uint16_t* x, int64_t x_stride,
                                   uint16_t* y, int64_t y_stride, const uint16_t* residual, int64_t residual_stride,
                                   const float* bias, mg_parallel parallel) {
  if (!blocks) return MG_BAD_POINTER;
  const Activations given{x, x_stride, y, y_stride, residual, residual_stride, bias};
  const Blocks pairs{blocks->block_inputs, blocks->blocks,  blocks->block_inputs / 2, reinterpret_cast<const char*>(blocks->values),
                     blocks->row_pointer,  blocks->channel, blocks->tap};
  return run_blocks(conv, pairs, current_pair_level(), given, parallel);
}
