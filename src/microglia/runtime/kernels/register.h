// What the operators check and make of the tensors they are given. Include once in each file that registers operators.
#ifndef MICROGLIA_REGISTER_H
#define MICROGLIA_REGISTER_H

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace microglia {

using Sizes = std::vector<int64_t>;

inline void parallel(int64_t begin, int64_t end, int64_t grain, mg_body body, void* context) {
  MG_CALL(torch_parallel_for(begin, end, grain, body, context));
}

inline void check(int code, const char* operation) {
  MG_CHECK(code == MG_OK, "microglia::", operation, ": ", mg_error_text(code));
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Int: return "int32";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    default: return "of another type";
  }
}

inline Tensor plain(const Tensor& t, ScalarType type, int64_t dimensions, const char* what) {
  MG_CHECK(t.is_cpu() && t.scalar_type() == type && t.dim() == dimensions, "microglia: ", what, " must be a CPU tensor of ",
           dimensions, " dimensions in ", name_of(type));
  return t.is_contiguous() ? t : contiguous(t);  // which asks the dispatcher: a microsecond or two
}

inline Sizes strides_of(const Sizes& shape, MemoryFormat format) {
  if (format == MemoryFormat::ChannelsLast) return {shape[3] * shape[2] * shape[1], 1, shape[3] * shape[1], shape[1]};
  Sizes strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * shape[d];
  return strides;
}

inline Sizes sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// The activations in NHWC order, copied only if they lie otherwise.
inline Tensor channels_last(const Tensor& x, const char* what, ScalarType type = ScalarType::Float) {
  MG_CHECK(x.is_cpu() && x.scalar_type() == type && x.dim() == 4, "microglia: ", what, " must be a ", name_of(type),
           " CPU tensor (batch, channels, height, width)");
  const Sizes strides = strides_of(sizes_of(x), MemoryFormat::ChannelsLast);
  const bool so = std::equal(strides.begin(), strides.end(), x.strides().begin());
  return so ? x : contiguous(x, MemoryFormat::ChannelsLast);
}

struct Optional {  // an optional tensor, made contiguous, with the pointer the kernels take
  std::optional<Tensor> held;
  template <class T>
  const T* data() const {
    return held ? static_cast<const T*>(held->const_data_ptr()) : nullptr;
  }
};

inline Optional optional_plain(const std::optional<Tensor>& t, ScalarType type, int64_t length, const char* what) {
  if (!t) return {};
  Tensor held = plain(*t, type, 1, what);
  MG_CHECK(held.size(0) == length, "microglia: ", what, " must have ", length, " entries, not ", held.size(0));
  return {held};
}

inline int64_t outputs_of(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return stride < 1 ? 0 : (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

inline mg_conv2d problem(const Tensor& x, int64_t out_channels, const Sizes& kernel, const Sizes& stride, const Sizes& padding,
                  const Sizes& dilation, int64_t activation) {
  MG_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
           "microglia: kernel, stride, padding and dilation must be pairs");
  uint32_t threads = get_num_threads();
  return {x.size(0), x.size(1), x.size(2), x.size(3), out_channels, kernel[0], kernel[1], stride[0], stride[1], padding[0],
          padding[1], dilation[0], dilation[1], static_cast<int32_t>(activation), static_cast<int32_t>(threads)};
}

inline Sizes output_shape(const mg_conv2d& c) {
  int64_t height = outputs_of(c.height, c.kernel_height, c.stride_height, c.padding_height, c.dilation_height);
  int64_t width = outputs_of(c.width, c.kernel_width, c.stride_width, c.padding_width, c.dilation_width);
  MG_CHECK(c.batch > 0 && c.out_channels > 0 && height > 0 && width > 0, "microglia: the output would be empty");
  return {c.batch, c.out_channels, height, width};
}

// Not through the dispatcher, which takes longer than the smallest layers.
inline Tensor empty(const Sizes& shape, MemoryFormat format, ScalarType type = ScalarType::Float) {
  const Sizes strides = strides_of(shape, format);
  AtenTensorHandle handle = nullptr;
  MG_CALL(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype_of(type),
                                   aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline void check_shape(const Tensor& residual, const Sizes& shape) {
  bool same = residual.dim() == static_cast<int64_t>(shape.size());
  for (int64_t d = 0; same && d < residual.dim(); ++d) same = residual.size(d) == shape[static_cast<size_t>(d)];
  MG_CHECK(same, "microglia: the residual must have the shape of the output");
}

}  // namespace microglia

#endif
