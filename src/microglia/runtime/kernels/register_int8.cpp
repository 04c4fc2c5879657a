// The operators in 8 bits: a convolution of blocks, and the rounding of activations.
#include <cstdint>
#include <optional>

#include "register.h"

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

Tensor int8_conv2d(const Tensor& x_, const Tensor& values_, const Tensor& row_pointer_, const Tensor& channel_,
                   const std::optional<Tensor>& tap_, const Tensor& start, const Tensor& scale, const Tensor& bias,
                   const std::optional<Tensor>& residual, double other, double low, double high, int64_t zero, bool wide,
                   int64_t outputs, const Sizes kernel, const Sizes stride, const Sizes padding, const Sizes dilation) {
  Tensor x = channels_last(x_, "the input", ScalarType::Byte);
  mg_conv2d c = problem(x, outputs, kernel, stride, padding, dilation, MG_NONE);
  const bool tiled = values_.dim() == 4;
  const Tensor values = plain(values_, ScalarType::Char, tiled ? 4 : 3, "values");
  const Tensor row_pointer = plain(row_pointer_, ScalarType::Int, 1, "row_pointer"), channel = plain(channel_, ScalarType::Int, 1, "channel");
  const int64_t blocks = values.size(0) * (tiled ? 16 : 1);
  const Optional tap = optional_plain(tap_, ScalarType::Byte, blocks, "tap");
  MG_CHECK(values.size(1) == 16 && (tiled ? values.size(2) == 16 && values.size(3) == 4 : values.size(2) == 4) && channel.size(0) == blocks && row_pointer.size(0) == (outputs + 15) / 16 + 1,
           "microglia: values must be (blocks, 16, 4) or, in tiles, (blocks / 16, 16, 16, 4), with a channel for each block and a row pointer for each 16 outputs and the end");
  mg_rescale rescale{of_outputs<int32_t>(start, ScalarType::Int, outputs, "start"),
                     of_outputs<float>(scale, ScalarType::Float, outputs, "scale"),
                     of_outputs<float>(bias, ScalarType::Float, outputs, "bias"),
                     static_cast<float>(other),
                     static_cast<float>(low),
                     static_cast<float>(high),
                     static_cast<int32_t>(zero),
                     wide};
  const ScalarType type = wide ? ScalarType::Float : ScalarType::Byte;
  const Sizes shape = output_shape(c);
  Optional r;
  if (residual) {
    check_shape(*residual, shape);
    r.held = channels_last(*residual, "the residual", type);
  }
  Tensor y = empty(shape, MemoryFormat::ChannelsLast, type);
  mg_blocks_int8 given{blocks, static_cast<const int8_t*>(values.const_data_ptr()),
                       static_cast<const int32_t*>(row_pointer.const_data_ptr()),
                       static_cast<const int32_t*>(channel.const_data_ptr()), tap.data<uint8_t>(), tiled};
  check(mg_block_conv2d_int8(&c, &given, &rescale, static_cast<const uint8_t*>(x.const_data_ptr()), c.in_channels,
                             y.mutable_data_ptr(), outputs, r.data<void>(), outputs, parallel),
        "int8_conv2d");
  return y;
}

Tensor quantize(const Tensor& x_, double scale, double zero) {
  const bool image = x_.dim() == 4;
  MG_CHECK(x_.is_cpu() && x_.scalar_type() == ScalarType::Float && x_.dim() >= 1, "microglia: only float32 on the CPU is quantized");
  Tensor x = image ? channels_last(x_, "the input") : x_.is_contiguous() ? x_ : contiguous(x_);
  Tensor y = empty(sizes_of(x), image ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous, ScalarType::Byte);
  check(mg_quantize(static_cast<const float*>(x.const_data_ptr()), x.numel(), static_cast<float>(scale), static_cast<float>(zero),
                    static_cast<uint8_t*>(y.mutable_data_ptr()), parallel),
        "quantize");
  return y;
}

Tensor int8_max_pool2d(const Tensor& x_, const Sizes kernel, const Sizes stride, const Sizes padding) {
  Tensor x = channels_last(x_, "the input", ScalarType::Byte);
  mg_conv2d c = problem(x, x.size(1), kernel, stride, padding, {1, 1}, MG_NONE);
  Tensor y = empty(output_shape(c), MemoryFormat::ChannelsLast, ScalarType::Byte);
  check(mg_max_pool_int8(&c, static_cast<const uint8_t*>(x.const_data_ptr()), static_cast<uint8_t*>(y.mutable_data_ptr()), parallel),
        "int8_max_pool2d");
  return y;
}

const Registration registered(__FILE__, {{"int8_conv2d", Operator<int8_conv2d>::call},
                                         {"int8_max_pool2d", Operator<int8_max_pool2d>::call},
                                         {"quantize", Operator<quantize>::call}});

}  // namespace
}  // namespace microglia
