// The operators in 8 bits: a convolution of blocks, pooling, and the rounding of activations.
#include "register_int8.h"

#include <cstdint>
#include <optional>

namespace microglia {
namespace {

// Numbers for each output, up to a whole stripe.
template <class T>
const T* of_outputs(const Tensor& t, ScalarType type, int64_t outputs, const char* what) {
  const int64_t padded = (outputs + 15) / 16 * 16;
  MG_CHECK(t.is_cpu() && t.scalar_type() == type && t.dim() == 1 && t.size(0) == padded && t.is_contiguous(), "microglia: ", what,
           " must be a contiguous CPU tensor of ", padded, " entries in ", name_of(type));
  return static_cast<const T*>(t.const_data_ptr());
}

// Runs a layer on x, which lies as the kernels read it; the output is laid out in this format.
Tensor run(const mg_conv2d& c, const QuadLayer& layer, const Tensor& x, const std::optional<Tensor>& residual, const Sizes& shape,
           MemoryFormat format) {
  const int64_t outputs = layer.outputs;
  const bool tiled = layer.values.dim() == 4;
  const Tensor values = plain(layer.values, ScalarType::Char, tiled ? 4 : 3, "values");
  const Tensor row_pointer = plain(layer.row_pointer, ScalarType::Int, 1, "row_pointer");
  const Tensor channel = plain(layer.channel, ScalarType::Int, 1, "channel");
  const int64_t blocks = values.size(0) * (tiled ? 16 : 1);
  const Optional tap = optional_plain(layer.tap, ScalarType::Byte, blocks, "tap");
  const bool shaped = values.size(1) == 16 && (tiled ? values.size(2) == 16 && values.size(3) == 4 : values.size(2) == 4);
  MG_CHECK(shaped && channel.size(0) == blocks && row_pointer.size(0) == (outputs + 15) / 16 + 1,
           "microglia: values must be (blocks, 16, 4) or, in tiles, (blocks / 16, 16, 16, 4), with a channel for each block and a row pointer for each 16 outputs and the end");
  mg_rescale rescale{of_outputs<int32_t>(layer.start, ScalarType::Int, outputs, "start"),
                     of_outputs<float>(layer.scale, ScalarType::Float, outputs, "scale"),
                     of_outputs<float>(layer.bias, ScalarType::Float, outputs, "bias"),
                     static_cast<float>(layer.other),
                     static_cast<float>(layer.low),
                     static_cast<float>(layer.high),
                     static_cast<int32_t>(layer.zero),
                     layer.wide};
  const ScalarType type = layer.wide ? ScalarType::Float : ScalarType::Byte;
  Optional r;
  if (residual) {
    check_shape(*residual, shape);
    r.held = format == MemoryFormat::ChannelsLast ? channels_last(*residual, "the residual", type)
                                                  : plain(*residual, type, residual->dim(), "the residual");
  }
  Tensor y = empty(shape, format, type);
  mg_blocks_int8 given{blocks, static_cast<const int8_t*>(values.const_data_ptr()),
                       static_cast<const int32_t*>(row_pointer.const_data_ptr()),
                       static_cast<const int32_t*>(channel.const_data_ptr()), tap.data<uint8_t>(), tiled};
  check(mg_block_conv2d_int8(&c, &given, &rescale, static_cast<const uint8_t*>(x.const_data_ptr()), c.in_channels,
                             y.mutable_data_ptr(), outputs, r.data<void>(), outputs, parallel),
        "int8_conv2d");
  return y;
}

Tensor int8_conv2d(const Tensor& x, const Tensor& values, const Tensor& row_pointer, const Tensor& channel,
                   const std::optional<Tensor>& tap, const Tensor& start, const Tensor& scale, const Tensor& bias,
                   const std::optional<Tensor>& residual, double other, double low, double high, int64_t zero, bool wide,
                   int64_t outputs, const Sizes kernel, const Sizes stride, const Sizes padding, const Sizes dilation) {
  return int8_convolution(x, {values, row_pointer, channel, tap, start, scale, bias, other, low, high, zero, wide, outputs, kernel,
                              stride, padding, dilation},
                          residual);
}

}  // namespace

Tensor int8_convolution(const Tensor& x_, const QuadLayer& layer, const std::optional<Tensor>& residual) {
  Tensor x = channels_last(x_, "the input", ScalarType::Byte);
  mg_conv2d c = problem(x, layer.outputs, layer.kernel, layer.stride, layer.padding, layer.dilation, MG_NONE);
  return run(c, layer, x, residual, output_shape(c), MemoryFormat::ChannelsLast);
}

// One row of pixels, each with its features.
Tensor int8_linear(const Tensor& x_, const QuadLayer& layer, const std::optional<Tensor>& residual) {
  MG_CHECK(x_.is_cpu() && x_.scalar_type() == ScalarType::Byte && x_.dim() >= 1,
           "microglia: the input must be a uint8 CPU tensor (..., features)");
  Tensor x = x_.is_contiguous() ? x_ : contiguous(x_);
  Sizes shape = sizes_of(x);
  const int64_t features = shape.back(), rows = features > 0 ? x.numel() / features : 0;
  mg_conv2d c{1, features, 1, rows, layer.outputs, 1, 1, 1, 1, 0, 0, 1, 1, MG_NONE, static_cast<int32_t>(get_num_threads())};
  output_shape(c);  // which is not empty
  shape.back() = layer.outputs;
  return run(c, layer, x, residual, shape, MemoryFormat::Contiguous);
}

Tensor int8_max_pool2d(const Tensor& x_, const Sizes kernel, const Sizes stride, const Sizes padding) {
  Tensor x = channels_last(x_, "the input", ScalarType::Byte);
  mg_conv2d c = problem(x, x.size(1), kernel, stride, padding, {1, 1}, MG_NONE);
  Tensor y = empty(output_shape(c), MemoryFormat::ChannelsLast, ScalarType::Byte);
  check(mg_max_pool_int8(&c, static_cast<const uint8_t*>(x.const_data_ptr()), static_cast<uint8_t*>(y.mutable_data_ptr()), parallel),
        "int8_max_pool2d");
  return y;
}

Tensor quantize(const Tensor& x_, double scale_, double zero_) {
  const bool image = x_.dim() == 4;
  MG_CHECK(x_.is_cpu() && x_.scalar_type() == ScalarType::Float && x_.dim() >= 1, "microglia: only float32 on the CPU is quantized");
  const float scale = static_cast<float>(scale_), zero = static_cast<float>(zero_);
  const Sizes shape = sizes_of(x_);
  Tensor y = empty(shape, image ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous, ScalarType::Byte);
  uint8_t* to = static_cast<uint8_t*>(y.mutable_data_ptr());
  if (image && shape[1] >= 1 && shape[1] <= 4 && x_.is_contiguous()) {
    check(mg_quantize_planes(static_cast<const float*>(x_.const_data_ptr()), shape[0], shape[1], shape[2] * shape[3], scale, zero, to,
                             parallel),
          "quantize");
    return y;
  }
  Tensor x = image ? channels_last(x_, "the input") : x_.is_contiguous() ? x_ : contiguous(x_);
  check(mg_quantize(static_cast<const float*>(x.const_data_ptr()), x.numel(), scale, zero, to, parallel), "quantize");
  return y;
}

namespace {

const Registration registered(__FILE__, {{"int8_conv2d", Operator<int8_conv2d>::call},
                                         {"int8_max_pool2d", Operator<int8_max_pool2d>::call},
                                         {"quantize", Operator<quantize>::call}});

}  // namespace
}  // namespace microglia
