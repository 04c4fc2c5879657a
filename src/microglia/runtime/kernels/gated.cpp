// The gated convolution: blocks by one list for all stripes, new in every call.
#include <algorithm>
#include <cstring>

#include "block_level.h"
#include "block_plan.h"
#include "block_run.h"
#include "kernels.h"

#define MG_EXPORT extern "C" __attribute__((visibility("default")))

namespace microglia::block {
namespace {

thread_local Scratch list_scratch;

// One list for all stripes, by groups of 16 channels, so that the lines of a group stay in L1 over all taps.
void list_places(const Plan& plan, const int32_t* channels, int64_t count, uint32_t* places, uint32_t* value_offsets) {
  const int64_t taps = plan.rows.taps * plan.columns.taps;
  int64_t made = 0;
  for (int64_t begin = 0, end; begin < count; begin = end) {
    const int64_t group = channels[begin] / line_floats;
    for (end = begin; end < count && channels[end] / line_floats == group;) ++end;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t place = group * plan.group_bytes + tap_place(plan, tap);
      for (int64_t index = begin; index < end; ++index, ++made) {
        places[made] = static_cast<uint32_t>(place + channels[index] % line_floats * 4);
        value_offsets[made] = static_cast<uint32_t>((tap * plan.channels + channels[index]) * line_bytes);
      }
    }
  }
}

struct Clearing {
  const Output* output;
  const int32_t* stripes;
  int64_t stripe_count;
};

void clear_other_stripes(int64_t begin, int64_t end, void* context) {
  const Clearing& work = *static_cast<Clearing*>(context);
  const Output& output = *work.output;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    float* y = reinterpret_cast<float*>(output.y.at(0, 0, pixel));
    int64_t from = 0;
    for (int64_t index = 0; index <= work.stripe_count; ++index) {
      const int64_t to = index < work.stripe_count ? work.stripes[index] * stripe_outputs : output.channels;
      if (from < to) std::memset(y + from, 0, static_cast<size_t>(to - from) * sizeof(float));
      from = to + stripe_outputs;
    }
  }
}

}  // namespace
}  // namespace microglia::block

using namespace microglia::block;

MG_EXPORT int mg_gated_conv2d(const mg_conv2d* conv, const float* values, const int32_t* channels, int64_t channel_count,
                              const int32_t* stripes, int64_t stripe_count, const float* x, int64_t x_stride, float* y,
                              int64_t y_stride, const float* bias, mg_parallel parallel) {
  const Activations given{x, x_stride, y, y_stride, nullptr, 0, bias};
  if (int code = check(conv, given)) return code;
  if (int code = check_list(channels, channel_count, conv->in_channels)) return code;
  if (int code = check_list(stripes, stripe_count, divide_up(conv->out_channels, stripe_outputs))) return code;
  if (!values) return MG_BAD_POINTER;
  const int64_t taps = conv->kernel_height * conv->kernel_width, stripe_places = taps * conv->in_channels;
  if (taps > INT32_MAX / conv->in_channels || stripe_places > UINT32_MAX / line_bytes) return MG_BAD_SIZE;
  Run run;
  const int64_t count = taps * channel_count, value_bytes = count * stripe_count * line_bytes;
  if (int code = make_plan(*conv, current_level(), conv->in_channels, value_bytes, Order::follow, run.plan)) return code;
  run.plan.read(x, x_stride);
  uint32_t* places = reinterpret_cast<uint32_t*>(list_scratch.reserve((count + places_ahead) * 8));
  if (!places) return MG_NO_MEMORY;
  uint32_t* value_offsets = places + count + places_ahead;
  list_places(run.plan, channels, channel_count, places, value_offsets);
  std::fill_n(places + count, places_ahead, 0u);
  std::fill_n(value_offsets + count, places_ahead, 0u);
  const char* lines = reinterpret_cast<const char*>(values);
  run.weights = {Weights::listed, lines,   places,       value_offsets, 1, nullptr, count, stripe_places * line_bytes,
                 stripes,         stripe_count};
  run.output = output_of(*conv, run.plan, given), run.parallel = parallel;
  Clearing clearing{&run.output, stripes, stripe_count};
  const int64_t pixels = run.plan.space.images * run.plan.space.rows * run.plan.space.columns;
  in_parallel(parallel, pixels, 256, clear_other_stripes, &clearing);
  return execute(run, std::max(1, conv->threads));
}
