// The chain of convolutions as an operator: its steps come as tensors one behind the other and one list of numbers.
#include "register.h"

#include <cstdint>
#include <vector>

namespace microglia {
namespace {

// How a step is written in the list: microglia.runtime.steps.Step.
enum Field {
  out_channels, kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width, dilation_height,
  dilation_width, activation, block_inputs, blocks, has_bias, input, residual, goes_out, fields
};

// A flat tensor that steps take their parts from, one after the other.
template <class T>
class Parts {
 public:
  Parts(const Tensor& t, ScalarType type, const char* what) : held_(plain(t, type, 1, what)), what_(what), left_(held_.size(0)) {}

  const T* take(int64_t count) {
    MG_CHECK(count >= 0 && count <= left_, "microglia::block_chain: the steps ask for more of ", what_, " than there is");
    const T* part = static_cast<const T*>(held_.const_data_ptr()) + (held_.size(0) - left_);
    left_ -= count;
    return part;
  }
  void finish() const { MG_CHECK(left_ == 0, "microglia::block_chain: the steps leave ", left_, " of ", what_); }

 private:
  Tensor held_;
  const char* what_;
  int64_t left_;
};

struct Steps {
  Parts<float> values, bias;
  Parts<int32_t> row_pointer, channel;
  Parts<uint8_t> tap;
  std::vector<mg_step> steps;

  void add(const int64_t* s, const Sizes& shape) {
    const int64_t count = s[blocks], inputs = s[block_inputs], outputs = s[out_channels];
    MG_CHECK(count >= 0 && inputs >= 1 && inputs <= 8 && outputs >= 1,
             "microglia::block_chain: a step has an impossible number of blocks, inputs of a block or outputs");
    const mg_conv2d conv{shape[0], shape[1], shape[2], shape[3], outputs, s[kernel_height], s[kernel_width], s[stride_height],
                         s[stride_width], s[padding_height], s[padding_width], s[dilation_height], s[dilation_width],
                         static_cast<int32_t>(s[activation]), static_cast<int32_t>(get_num_threads())};
    const float* weights = values.take(count * inputs * 16);
    const int32_t* pointer = row_pointer.take((outputs + 15) / 16 + 1);
    const mg_blocks places{inputs, count, weights, pointer, channel.take(count), tap.take(count)};
    steps.push_back({conv, places, s[has_bias] ? bias.take(outputs) : nullptr, s[input], s[residual]});
  }
};

std::vector<Tensor> block_chain(const std::vector<Tensor> images_, const Tensor& values, const Tensor& row_pointer,
                                const Tensor& channel, const Tensor& tap, const Tensor& bias, const Sizes program) {
  MG_CHECK(!images_.empty() && !program.empty() && program.size() % fields == 0,
           "microglia::block_chain: there must be an image and whole steps");
  for (int64_t number : program) MG_CHECK(number >= -1 && number <= INT32_MAX, "microglia::block_chain: ", number, " in a step");
  std::vector<Tensor> held, out;
  std::vector<Sizes> shapes;  // of all values
  std::vector<mg_image> images;
  for (const Tensor& image : images_) {
    held.push_back(channels_last(image, "the input"));
    const Tensor& x = held.back();
    MG_CHECK(x.size(0) == held[0].size(0), "microglia::block_chain: the images must be of one batch");
    shapes.push_back({x.size(0), x.size(1), x.size(2), x.size(3)});
    images.push_back({static_cast<const float*>(x.const_data_ptr()), x.size(1), x.size(2), x.size(3)});
  }
  Steps made{{values, ScalarType::Float, "values"},     {bias, ScalarType::Float, "bias"}, {row_pointer, ScalarType::Int, "row_pointer"},
             {channel, ScalarType::Int, "channel"}, {tap, ScalarType::Byte, "tap"},    {}};
  std::vector<float*> results;
  for (const int64_t* s = program.data(); s < program.data() + program.size(); s += fields) {
    MG_CHECK(s[input] >= 0 && s[input] < static_cast<int64_t>(shapes.size()),
             "microglia::block_chain: a step reads a value that is not there");
    MG_CHECK(s[residual] < static_cast<int64_t>(shapes.size()),
             "microglia::block_chain: a step adds a value that is not there");
    made.add(s, shapes[static_cast<size_t>(s[input])]);
    const Sizes shape = output_shape(made.steps.back().conv);
    MG_CHECK(s[residual] < 0 || shapes[static_cast<size_t>(s[residual])] == shape,
             "microglia::block_chain: the residual must have the shape of the output");
    shapes.push_back(shape);
    if (s[goes_out]) out.push_back(empty(shapes.back(), MemoryFormat::ChannelsLast));
    results.push_back(s[goes_out] ? static_cast<float*>(out.back().mutable_data_ptr()) : nullptr);
  }
  made.values.finish(), made.bias.finish(), made.row_pointer.finish(), made.channel.finish(), made.tap.finish();
  check(mg_block_chain(made.steps.data(), static_cast<int64_t>(made.steps.size()), images.data(),
                       static_cast<int64_t>(images.size()), results.data(), parallel),
        "block_chain");
  return out;
}

const Registration registered(__FILE__, {{"block_chain", Operator<block_chain>::call}});

}  // namespace

}  // namespace microglia
