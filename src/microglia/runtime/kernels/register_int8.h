// A layer, pooling and rounding in 8 bits on tensors: what the operators of one step share with the one of many.
#ifndef MICROGLIA_REGISTER_INT8_H
#define MICROGLIA_REGISTER_INT8_H

#include <cstdint>
#include <optional>

#include "register.h"

namespace microglia {

// The arguments of int8_conv2d that belong to the layer.
struct QuadLayer {
  Tensor values, row_pointer, channel;
  std::optional<Tensor> tap;
  Tensor start, scale, bias;
  double other, low, high;
  int64_t zero;
  bool wide;
  int64_t outputs;
  Sizes kernel, stride, padding, dilation;
};

Tensor int8_convolution(const Tensor& x, const QuadLayer& layer, const std::optional<Tensor>& residual);  // images
Tensor int8_linear(const Tensor& x, const QuadLayer& layer, const std::optional<Tensor>& residual);       // (..., features)
Tensor int8_max_pool2d(const Tensor& x, const Sizes kernel, const Sizes stride, const Sizes padding);
Tensor quantize(const Tensor& x, double scale, double zero);

}  // namespace microglia

#endif
