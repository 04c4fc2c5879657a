// The part of a convolution that an input needs: check everything, then run it as blocks whose weights are packed on the way.
#include "part_level.h"

#include <algorithm>

#include "block_level.h"
#include "block_plan.h"
#include "block_run.h"
#include "kernels.h"

#define MG_EXPORT extern "C" __attribute__((visibility("default")))

namespace microglia::part {
namespace {

using block::divide_up;
using block::line_bytes;
using block::line_floats;
using block::stripe_outputs;

// Up to so many, weights are read so seldom that packing them costs more than it saves (measured with AVX2, layers of ResNet-18).
constexpr int64_t few_pixels = 512;

thread_local block::Scratch list_scratch;

void pack_plainly(const Sources& sources, const Move* moves, int64_t count, char* values) {
  const char* first[line_floats] = {};  // of each output
  for (int64_t source = 0; source < sources.count; ++source) {
    for (int lane = 0; lane < line_floats; ++lane) {
      if (sources.mask[source] >> lane & 1) first[lane] = sources.stripe[source] + sources.lane[lane] * 4;
    }
  }
  for (int64_t index = 0; index < count; ++index) {
    float* line = reinterpret_cast<float*>(values + moves[index].to);
    for (int lane = 0; lane < line_floats; ++lane) {
      line[lane] = first[lane] ? *reinterpret_cast<const float*>(first[lane] + moves[index].from) : 0.0f;
    }
  }
}

Pack current_pack() {
#if defined(__x86_64__)
  if (mg_level() >= MG_AVX512) return avx512_pack();
#endif
  return pack_plainly;
}

struct PartPacking : block::Packing {
  const mg_part* part;
  int64_t outputs;           // of the part
  int64_t stripe_bytes;      // of the whole weight
  const Move* moves;         // of each place's line
  int64_t count;
  Pack kernel;

  Sources sources(int64_t stripe) const {
    Sources found{};
    int64_t last = -1;
    for (int64_t output = stripe * stripe_outputs; output < std::min(outputs, (stripe + 1) * stripe_outputs); ++output) {
      const int64_t row = part->rows ? part->rows[output] : output, from = row / stripe_outputs;
      if (from != last) found.stripe[found.count++] = reinterpret_cast<const char*>(part->values) + from * stripe_bytes;
      last = from;
      found.mask[found.count - 1] |= static_cast<uint16_t>(1u << output % stripe_outputs);
      found.lane[output % stripe_outputs] = static_cast<int32_t>(row % stripe_outputs);
    }
    return found;
  }

  static void run(const block::Packing& packing, int64_t stripe, char* values) {
    const PartPacking& self = static_cast<const PartPacking&>(packing);
    self.kernel(self.sources(stripe), self.moves, self.count, values);
  }
};

int check_part(const mg_conv2d& conv, const mg_part* part) {
  if (!part || !part->values) return MG_BAD_POINTER;
  if (part->inputs < 1 || part->inputs > INT32_MAX || part->outputs < 1 || part->outputs > INT32_MAX) return MG_BAD_SIZE;
  if (!part->rows && conv.out_channels != part->outputs) return MG_BAD_SIZE;
  if (!part->columns && conv.in_channels != part->inputs) return MG_BAD_SIZE;
  const int64_t taps = conv.kernel_height * conv.kernel_width;
  if (taps > INT32_MAX / part->inputs || taps * part->inputs > UINT32_MAX / line_bytes) return MG_BAD_SIZE;
  for (int64_t index = 0; part->columns && index < conv.in_channels; ++index) {
    if (part->columns[index] < 0 || part->columns[index] >= part->inputs) return MG_BAD_CHANNEL;
  }
  if (int code = part->columns ? block::check_list(part->columns, conv.in_channels, part->inputs) : MG_OK) return code;
  return part->rows ? block::check_list(part->rows, conv.out_channels, part->outputs) : MG_OK;
}

// Places go by groups of 16 channels of x, so that the lines of a group stay in L1 over all taps; the weights are moved in the
// order in which they lie, so that they are read in few streams.
void list_part(const block::Plan& plan, const mg_part& part, uint32_t* places, Move* moves) {
  const int64_t taps = plan.rows.taps * plan.columns.taps;
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t begin = 0; begin < plan.channels; begin += line_floats) {
      const int64_t width = std::min<int64_t>(plan.channels - begin, line_floats), first = begin * taps + tap * width;
      const int64_t place = begin / line_floats * plan.group_bytes + block::tap_place(plan, tap);
      for (int64_t channel = 0; channel < width; ++channel) {
        const int64_t input = part.columns ? part.columns[begin + channel] : begin + channel;
        places[first + channel] = static_cast<uint32_t>(place + channel * 4);
        *moves++ = {static_cast<uint32_t>((tap * part.inputs + input) * line_bytes),
                    static_cast<uint32_t>((first + channel) * line_bytes)};
      }
    }
  }
}

// The stripes in which a part's outputs lie if they are whole stripes in order, which is how gates of 16 filters choose them.
bool whole_stripes(const mg_part& part, int64_t outputs, int32_t* stripes) {
  if (!part.rows) {
    for (int64_t stripe = 0; stripe < divide_up(outputs, stripe_outputs); ++stripe) stripes[stripe] = static_cast<int32_t>(stripe);
    return true;
  }
  if (outputs % stripe_outputs) return false;
  for (int64_t output = 0; output < outputs; ++output) {
    const int64_t first = part.rows[output - output % stripe_outputs];
    if (first % stripe_outputs || part.rows[output] != first + output % stripe_outputs) return false;
    if (output % stripe_outputs == 0) stripes[output / stripe_outputs] = static_cast<int32_t>(first / stripe_outputs);
  }
  return true;
}

// Whether the inputs come in whole groups of 16 neighbours: the weights of a group then lie side by side, at each tap.
bool whole_groups(const mg_part& part, int64_t inputs) {
  if (!part.columns) return true;
  if (inputs % line_floats) return false;
  for (int64_t input = 0; input < inputs; ++input) {
    if (part.columns[input] != part.columns[input - input % line_floats] + input % line_floats) return false;
  }
  return true;
}

}  // namespace
}  // namespace microglia::part

using namespace microglia;
using namespace microglia::part;

MG_EXPORT int mg_part_conv2d(const mg_conv2d* conv, const mg_part* part, const float* x, int64_t x_stride, float* y,
                             int64_t y_stride, const float* bias, mg_parallel parallel) {
  const block::Activations given{x, x_stride, y, y_stride, nullptr, 0, nullptr};
  if (int code = block::check(conv, given)) return code;
  if (int code = check_part(*conv, part)) return code;
  const int64_t taps = conv->kernel_height * conv->kernel_width, count = taps * conv->in_channels;
  const int64_t stripes = divide_up(conv->out_channels, stripe_outputs), value_bytes = stripes * count * line_bytes;
  block::Run run;
  if (int code = block::make_plan(*conv, block::current_level(), conv->in_channels, value_bytes, block::Order::follow, run.plan)) {
    return code;
  }
  run.plan.read(x, x_stride);
  run.output = block::output_of(*conv, run.plan, given);
  const int64_t listed = count + block::places_ahead;
  char* lists = list_scratch.reserve(count * 8 + (2 * listed + conv->out_channels + stripes) * 4);
  if (!lists) return MG_NO_MEMORY;
  Move* moves = reinterpret_cast<Move*>(lists);
  uint32_t *places = reinterpret_cast<uint32_t*>(moves + count), *value_offsets = places + listed;
  float* own = reinterpret_cast<float*>(value_offsets + listed);
  int32_t* from = reinterpret_cast<int32_t*>(own + conv->out_channels);
  std::fill_n(places + count, block::places_ahead, 0u);
  list_part(run.plan, *part, places, moves);
  if (bias) {
    for (int64_t index = 0; index < conv->out_channels; ++index) own[index] = bias[part->rows ? part->rows[index] : index];
    run.output.bias = own;
  }
  run.parallel = parallel;
  const block::Chunk& all = run.plan.space;
  const bool few = all.images * all.rows * all.columns <= few_pixels;
  if (few && whole_stripes(*part, conv->out_channels, from) && whole_groups(*part, conv->in_channels)) {  // read where they lie
    for (int64_t index = 0; index < count; ++index) value_offsets[moves[index].to / line_bytes] = moves[index].from;
    std::fill_n(value_offsets + count, block::places_ahead, 0u);
    const char* values = reinterpret_cast<const char*>(part->values);
    run.weights = {block::Weights::listed, values, places, value_offsets, 1, nullptr, count, taps * part->inputs * line_bytes,
                   nullptr, stripes};
    run.weights.value_stripes = from;
    return block::execute(run, std::max(1, conv->threads));
  }
  PartPacking packing;
  packing.pack = &PartPacking::run;
  packing.part = part, packing.outputs = conv->out_channels, packing.stripe_bytes = taps * part->inputs * line_bytes;
  packing.moves = moves, packing.count = count, packing.kernel = current_pack();
  run.weights = {block::Weights::warm, nullptr, places, nullptr, 1, nullptr, count, count * line_bytes, nullptr, stripes};
  run.weights.packing = &packing;
  return block::execute(run, std::max(1, conv->threads));
}
