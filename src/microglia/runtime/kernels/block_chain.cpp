// Several convolutions in one call: what passes between them stays in lines, in a few buffers that they share.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "block_level.h"
#include "block_plan.h"
#include "block_run.h"
#include "kernels.h"

#define MG_EXPORT extern "C" __attribute__((visibility("default")))

namespace microglia::block {
namespace {

// Working memory of one pass over some images: about what the weights take, which each pass reads once, and no less than a
// level-2 cache holds.
constexpr int64_t least_pass_bytes = 1 << 20;
constexpr int64_t kept_bytes = 64 << 20;  // of working memory, after a call
constexpr int64_t small_image = 64;      // pixels, beside which any border is small
constexpr int64_t most_image_bytes = int64_t{1} << 32;  // places are 32-bit offsets into one image

thread_local Scratch chain_scratch;

// An image of float32 in lines: each group of 16 channels by itself, rows with lines of zeros `beside` them, which are also in front of
// the next row, and rows of zeros `above` and below.
struct Lines {
  int64_t channels = 0, height = 0, width = 0, above = 0, beside = 0;

  bool same_size(const Lines& o) const { return channels == o.channels && height == o.height && width == o.width; }
  bool operator==(const Lines& o) const { return same_size(o) && above == o.above && beside == o.beside; }
  int64_t groups() const { return divide_up(channels, line_floats); }
  int64_t row_lines() const { return width + beside; }
  int64_t first_line() const { return above * row_lines() + beside; }
  int64_t group_lines() const { return (height + 2 * above) * row_lines() + beside; }
  // An odd number of lines, so that the groups of one pixel do not all fall into the same set of the cache.
  int64_t group_bytes() const { return (group_lines() | 1) * line_bytes; }
  int64_t image_bytes() const { return groups() * group_bytes(); }

  // Whether so many images could be counted in NHWC, and one of them as lines by 32-bit offsets.
  bool fits(int64_t images, bool as_lines) const {
    int64_t bytes;
    if (__builtin_mul_overflow(height + 2 * above + 1, row_lines() + 1, &bytes) ||
        __builtin_mul_overflow(bytes, groups() * line_bytes, &bytes) || (as_lines && bytes >= most_image_bytes)) {
      return false;
    }
    return !__builtin_mul_overflow(bytes, images, &bytes);
  }

  Image at(char* data) const {
    return {data + first_line() * line_bytes, line_bytes, row_lines() * line_bytes, image_bytes(), group_bytes()};
  }

  void clear_border(char* data, int64_t images) const {
    const auto clear = [](char* group, int64_t from, int64_t to) {
      std::memset(group + from * line_bytes, 0, static_cast<size_t>((to - from) * line_bytes));
    };
    for (int64_t index = 0; above + beside > 0 && index < images * groups(); ++index, data += group_bytes()) {
      clear(data, 0, first_line());
      for (int64_t row = 0, end = first_line() + width; row + 1 < height; ++row, end += row_lines()) clear(data, end, end + beside);
      clear(data, first_line() + (height - 1) * row_lines() + width, group_lines());
    }
  }
};

// What the steps read: an image that was given, a result that goes out, or lines in a buffer.
struct Value {
  Lines lines;
  char* outside = nullptr;
  int64_t last_reader = -1;
  int64_t buffer = -1;
  bool cleared = false;  // the buffer holds this border already

  Image at(char* const* buffers, int64_t first_image) const {
    if (!outside) return lines.at(buffers[buffer]);
    Image image = pixels_of(outside, lines.channels, lines.height, lines.width, sizeof(float));
    image.data += first_image * image.image;
    return image;
  }
};

struct Chain {
  const mg_step* steps;
  int64_t step_count, image_count, batch, pass_images = 1;
  std::vector<Value> values;
  std::vector<char> direct;  // of each step: whether it reads lines where they are
  std::vector<int64_t> buffer_bytes;  // of one image
  mg_parallel parallel;
  std::atomic<int> status{MG_OK};

  const Value* residual(const mg_step& step) const { return step.residual < 0 ? nullptr : &values[static_cast<size_t>(step.residual)]; }
  Value& input(const mg_step& step) { return values[static_cast<size_t>(step.input)]; }
  Value& result(int64_t step) { return values[static_cast<size_t>(image_count + step)]; }

  int64_t bytes_of_an_image() const {
    int64_t sum = 0;
    for (int64_t bytes : buffer_bytes) sum += bytes;
    return sum;
  }
};

// ---- Checks ----

int check_image(const mg_image& image) {
  for (int64_t size : {image.channels, image.height, image.width}) {
    if (size < 1 || size > INT32_MAX) return MG_BAD_SIZE;
  }
  return image.data ? MG_OK : MG_BAD_POINTER;
}

int check_step(const Chain& chain, const mg_step& step, int64_t known) {
  if (int code = check_sizes(&step.conv)) return code;
  if (int code = check_blocks(step.conv, blocks_of(step.blocks))) return code;
  if (step.conv.batch != chain.batch) return MG_BAD_SIZE;
  if (step.input < 0 || step.input >= known || step.residual < -1 || step.residual >= known) return MG_BAD_LIST;
  return MG_OK;
}

Lines lines_of_result(const mg_conv2d& conv) {
  return {conv.out_channels,
          output_size(conv.height, conv.kernel_height, conv.stride_height, conv.padding_height, conv.dilation_height),
          output_size(conv.width, conv.kernel_width, conv.stride_width, conv.padding_width, conv.dilation_width)};
}

// Whether a step reads lines where they are: not where the border for its padding would be as large as the image.
bool is_direct(const mg_step& step, const Value& input) {
  const mg_conv2d& conv = step.conv;
  const int64_t bordered = (conv.height + 2 * conv.padding_height) * (conv.width + conv.padding_width);
  return !input.outside && reads_lines(conv) && bordered <= 2 * conv.height * conv.width + small_image &&
         divide_up(reached_channels(conv, blocks_of(step.blocks)), line_floats) == input.lines.groups();
}

// The values of all steps and who reads them last.
int make_values(Chain& chain, const mg_image* images, float* const* results) {
  for (int64_t index = 0; index < chain.image_count; ++index) {
    if (int code = check_image(images[index])) return code;
    Value value{{images[index].channels, images[index].height, images[index].width}};
    value.outside = const_cast<char*>(reinterpret_cast<const char*>(images[index].data));
    chain.values.push_back(value);
  }
  for (int64_t index = 0; index < chain.step_count; ++index) {
    const mg_step& step = chain.steps[index];
    if (int code = check_step(chain, step, chain.image_count + index)) return code;
    Value& input = chain.input(step);
    Value made{lines_of_result(step.conv)};
    if (!input.lines.same_size({step.conv.in_channels, step.conv.height, step.conv.width})) return MG_BAD_SIZE;
    input.last_reader = index;
    chain.direct.push_back(is_direct(step, input));
    if (chain.direct.back()) {
      input.lines.above = std::max(input.lines.above, step.conv.padding_height);
      input.lines.beside = std::max(input.lines.beside, step.conv.padding_width);
    }
    if (step.residual >= 0) {
      Value& other = chain.values[static_cast<size_t>(step.residual)];
      if (!other.lines.same_size(made.lines)) return MG_BAD_SIZE;
      other.last_reader = index;
    }
    made.outside = reinterpret_cast<char*>(results[index]);
    chain.values.push_back(made);
  }
  for (const Value& value : chain.values) {
    if (!value.lines.fits(chain.batch, !value.outside)) return MG_BAD_SIZE;
  }
  return MG_OK;
}

// ---- Buffers ----

// Gives each result that stays inside a buffer: that of a residual which nobody reads again, one that was laid out the same, the
// smallest that is large enough, or the largest.
void assign_buffers(Chain& chain) {
  std::vector<Lines> laid;
  std::vector<char> taken;
  const auto release = [&](int64_t number, int64_t step) {
    const Value& value = chain.values[static_cast<size_t>(number)];
    if (value.buffer >= 0 && value.last_reader <= step) taken[static_cast<size_t>(value.buffer)] = 0;
  };
  for (int64_t index = 0; index < chain.step_count; ++index) {
    const mg_step& step = chain.steps[index];
    Value& made = chain.result(index);
    const Value* other = chain.residual(step);
    const bool over = !made.outside && other && other->buffer >= 0 && other->last_reader == index &&
                      step.residual != step.input && other->lines == made.lines;
    if (over) {
      made.buffer = other->buffer, made.cleared = true;
    } else if (!made.outside) {
      const int64_t bytes = made.lines.image_bytes();
      const auto rank = [&](size_t buffer) {  // smaller is better
        const int64_t size = chain.buffer_bytes[buffer];
        return laid[buffer] == made.lines ? int64_t{-1} : size >= bytes ? size : most_image_bytes + bytes - size;
      };
      size_t best = laid.size();
      for (size_t buffer = 0; buffer < laid.size(); ++buffer) {
        if (!taken[buffer] && (best == laid.size() || rank(buffer) < rank(best))) best = buffer;
      }
      if (best == laid.size()) laid.push_back({}), taken.push_back(0), chain.buffer_bytes.push_back(0);
      made.buffer = static_cast<int64_t>(best), made.cleared = laid[best] == made.lines;
      chain.buffer_bytes[best] = std::max(chain.buffer_bytes[best], bytes);
      laid[best] = made.lines, taken[best] = 1;
    }
    release(step.input, index);
    if (step.residual >= 0 && !over) release(step.residual, index);
    release(chain.image_count + index, index);  // that nobody reads
  }
}

// ---- Running ----

int run_step(Chain& chain, int64_t index, char* const* buffers, int64_t first, int64_t images, mg_parallel parallel) {
  const mg_step& step = chain.steps[index];
  const Blocks blocks = blocks_of(step.blocks);
  const Value &input = chain.input(step), &made = chain.result(index), *other = chain.residual(step);
  mg_conv2d conv = step.conv;
  conv.batch = images;
  conv.threads = parallel ? chain.steps->conv.threads : 1;
  Run run;
  const Image x = input.at(buffers, first);
  if (chain.direct[static_cast<size_t>(index)]) {
    if (int code = make_direct_plan(conv, current_level(), blocks.value_bytes(), x, run.plan)) return code;
  } else {
    const bool follow = input.outside && made.outside && (!other || other->outside);
    const int64_t reached = reached_channels(conv, blocks);
    const Order order = follow ? Order::follow : Order::by_rows;
    if (int code = make_plan(conv, current_level(), reached, blocks.value_bytes(), order, run.plan)) return code;
    run.plan.x = x;
  }
  if (!made.outside && !made.cleared) made.lines.clear_border(buffers[made.buffer], images);
  run.output = {made.at(buffers, first), other ? other->at(buffers, first) : Image{}, step.bias, conv.out_channels,
                conv.activation, !made.outside};
  return run_places(conv, blocks, run, parallel);
}

// All steps for some images of the batch.
int run_pass(Chain& chain, int64_t pass, mg_parallel parallel) {
  const int64_t first = pass * chain.pass_images, images = std::min(chain.pass_images, chain.batch - first);
  const int64_t bytes = chain.bytes_of_an_image() * chain.pass_images;  // 0 where all results go out
  char* memory = bytes ? chain_scratch.reserve(bytes) : nullptr;
  if (bytes && !memory) return MG_NO_MEMORY;
  std::vector<char*> buffers;
  for (int64_t each : chain.buffer_bytes) buffers.push_back(memory), memory += each * chain.pass_images;
  for (int64_t index = 0; index < chain.step_count; ++index) {
    if (int code = run_step(chain, index, buffers.data(), first, images, parallel)) return code;
  }
  return MG_OK;
}

void run_some(Chain& chain, int64_t begin, int64_t end, mg_parallel parallel) {
  try {
    for (int64_t pass = begin; pass < end && chain.status.load() == MG_OK; ++pass) {
      if (int code = run_pass(chain, pass, parallel)) chain.status.store(code);
    }
  } catch (const std::bad_alloc&) {
    chain.status.store(MG_NO_MEMORY);
  }
  chain_scratch.release_above(kept_bytes);
}

void run_passes(int64_t begin, int64_t end, void* context) { run_some(*static_cast<Chain*>(context), begin, end, nullptr); }

// Passes are shared out where they come out even for the threads, and each of them otherwise.
int run_chain(Chain& chain) {
  int64_t weights = 0;
  for (int64_t index = 0; index < chain.step_count; ++index) weights += blocks_of(chain.steps[index].blocks).value_bytes();
  const int64_t threads = chain.parallel ? std::max<int64_t>(1, chain.steps->conv.threads) : 1;
  const int64_t budget = std::max(least_pass_bytes, 2 * weights), image = std::max<int64_t>(1, chain.bytes_of_an_image());
  const int64_t near = std::clamp<int64_t>(budget / image, 1, chain.batch);
  const int64_t shared = std::min(near, divide_up(chain.batch, threads)), count = divide_up(chain.batch, shared);
  const bool even = threads > 1 && count * 8 >= divide_up(count, threads) * threads * 7;
  chain.pass_images = even ? shared : divide_up(chain.batch, divide_up(chain.batch, near));
  if (even) {
    chain.parallel(0, count, 1, run_passes, &chain);
  } else {
    run_some(chain, 0, divide_up(chain.batch, chain.pass_images), chain.parallel);
  }
  return chain.status.load();
}

}  // namespace
}  // namespace microglia::block

using namespace microglia::block;

MG_EXPORT int mg_block_chain(const mg_step* steps, int64_t step_count, const mg_image* images, int64_t image_count,
                             float* const* results, mg_parallel parallel) {
  if (step_count < 1 || image_count < 1 || step_count > INT32_MAX || image_count > INT32_MAX) return MG_BAD_SIZE;
  if (!steps || !images || !results) return MG_BAD_POINTER;
  try {
    Chain chain;
    chain.steps = steps, chain.step_count = step_count, chain.image_count = image_count;
    chain.batch = steps->conv.batch, chain.parallel = parallel;
    if (int code = make_values(chain, images, results)) return code;
    assign_buffers(chain);
    return run_chain(chain);
  } catch (const std::bad_alloc&) {
    return MG_NO_MEMORY;
  }
}
