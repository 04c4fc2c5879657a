// Registers the kernels as the CPU implementation of operators that Python defines, through the LibTorch Stable ABI: one
// build serves every torch from 2.11 on.
#include "kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

void parallel(int64_t begin, int64_t end, int64_t grain, mg_body body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

void check(int code, const char* operation) {
  STD_TORCH_CHECK(code == MG_OK, "microglia::", operation, ": ", mg_error_text(code));
}

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Int: return "int32";
    case ScalarType::Byte: return "uint8";
    default: return "of another type";
  }
}

Tensor plain(const Tensor& t, ScalarType type, int64_t dimensions, const char* what) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == type && t.dim() == dimensions, "microglia: ", what, " must be a CPU tensor of ",
                  dimensions, " dimensions in ", name_of(type));
  return torch::stable::contiguous(t);
}

// The activations in NHWC order, copied only if they lie otherwise.
Tensor channels_last(const Tensor& x, const char* what, ScalarType type = ScalarType::Float) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == type && x.dim() == 4, "microglia: ", what, " must be a ", name_of(type),
                  " CPU tensor (batch, channels, height, width)");
  return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

struct Optional {  // an optional tensor, made contiguous, with the pointer the kernels take
  std::optional<Tensor> held;
  template <class T>
  const T* data() const {
    return held ? static_cast<const T*>(held->const_data_ptr()) : nullptr;
  }
};

Optional optional_plain(const std::optional<Tensor>& t, ScalarType type, int64_t length, const char* what) {
  if (!t) return {};
  Tensor held = plain(*t, type, 1, what);
  STD_TORCH_CHECK(held.size(0) == length, "microglia: ", what, " must have ", length, " entries, not ", held.size(0));
  return {held};
}

// A list of channels as torch indexes by them, int64, for kernels that take int32; what does not fit becomes -1: refused there.
struct List {
  bool given;
  std::vector<int32_t> entries;
  List(const std::optional<Tensor>& t, int64_t length, const char* what) : given(t.has_value()) {
    const Optional held = optional_plain(t, ScalarType::Long, length, what);
    for (int64_t index = 0; given && index < length; ++index) {
      const int64_t entry = held.data<int64_t>()[index];
      entries.push_back(entry == static_cast<int32_t>(entry) ? static_cast<int32_t>(entry) : -1);
    }
  }
  const int32_t* data() const { return given ? entries.data() : nullptr; }
};

int64_t outputs_of(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return stride < 1 ? 0 : (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

mg_conv2d problem(const Tensor& x, int64_t out_channels, const Sizes& kernel, const Sizes& stride, const Sizes& padding,
                  const Sizes& dilation, int64_t activation) {
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "microglia: kernel, stride, padding and dilation must be pairs");
  uint32_t threads = torch::stable::get_num_threads();
  return {x.size(0), x.size(1), x.size(2), x.size(3), out_channels, kernel[0], kernel[1], stride[0], stride[1], padding[0],
          padding[1], dilation[0], dilation[1], static_cast<int32_t>(activation), static_cast<int32_t>(threads)};
}

Tensor output_of(const mg_conv2d& c, MemoryFormat format, ScalarType type = ScalarType::Float) {
  int64_t height = outputs_of(c.height, c.kernel_height, c.stride_height, c.padding_height, c.dilation_height);
  int64_t width = outputs_of(c.width, c.kernel_width, c.stride_width, c.padding_width, c.dilation_width);
  STD_TORCH_CHECK(c.batch > 0 && c.out_channels > 0 && height > 0 && width > 0, "microglia: the output would be empty");
  return torch::stable::empty({c.batch, c.out_channels, height, width}, type, std::nullopt, std::nullopt, std::nullopt, format);
}

void check_same_shape(const Tensor& residual, const Tensor& y) {
  bool same = residual.dim() == y.dim();
  for (int64_t d = 0; same && d < y.dim(); ++d) same = residual.size(d) == y.size(d);
  STD_TORCH_CHECK(same, "microglia: the residual must have the shape of the output");
}

struct Places {  // the index arrays that block and row kernels share, checked for dtype and length and kept alive
  Tensor values, row_pointer, channel;
  Optional tap;
  Places(const Tensor& values_, const Tensor& row_pointer_, const Tensor& channel_, const std::optional<Tensor>& tap_,
         int64_t dimensions, int64_t rows, ScalarType type = ScalarType::Float)
      : values(plain(values_, type, dimensions, "values")),
        row_pointer(plain(row_pointer_, ScalarType::Int, 1, "row_pointer")),
        channel(plain(channel_, ScalarType::Int, 1, "channel")),
        tap(optional_plain(tap_, ScalarType::Byte, channel.size(0), "tap")) {
    STD_TORCH_CHECK(values.size(0) == channel.size(0), "microglia: values and channel must have the same length");
    STD_TORCH_CHECK(row_pointer.size(0) == rows + 1, "microglia: row_pointer must have ", rows + 1, " entries, not ",
                    row_pointer.size(0));
  }
  const float* value_data() const { return static_cast<const float*>(values.const_data_ptr()); }
  const int32_t* row_data() const { return static_cast<const int32_t*>(row_pointer.const_data_ptr()); }
  const int32_t* channel_data() const { return static_cast<const int32_t*>(channel.const_data_ptr()); }
};

// The type that a layer of blocks runs in: that of its input and of its values.
ScalarType block_type(const Tensor& x, const Tensor& values) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "microglia: the input of a block layer must be float32 or bfloat16");
  STD_TORCH_CHECK(values.scalar_type() == type, "microglia: the input is ", name_of(type), " and the values of the blocks are ",
                  name_of(values.scalar_type()), ": both must be of one type; convert the module or its input with .to()");
  return type;
}

struct BlockPlaces : Places {
  BlockPlaces(const Tensor& values_, const Tensor& row_pointer_, const Tensor& channel_, const std::optional<Tensor>& tap_,
              int64_t outputs, ScalarType type)
      : Places(values_, row_pointer_, channel_, tap_, type == ScalarType::Float ? 3 : 4, (outputs + 15) / 16, type) {
    STD_TORCH_CHECK(values.size(2) == 16 && (type == ScalarType::Float || values.size(3) == 2),
                    "microglia: values must be (blocks, inputs of a block, 16) in float32, (blocks, pairs of inputs, 16, 2) in "
                    "bfloat16");
  }

  void run(const mg_conv2d& c, const Tensor& x, Tensor& y, const Optional& residual, const Optional& bias,
           const char* operation) const {
    const int64_t in = c.in_channels, out = c.out_channels, blocks = values.size(0);
    if (values.scalar_type() == ScalarType::Float) {
      mg_blocks given{values.size(1), blocks, value_data(), row_data(), channel_data(), tap.data<uint8_t>()};
      check(mg_block_conv2d(&c, &given, static_cast<const float*>(x.const_data_ptr()), in,
                            static_cast<float*>(y.mutable_data_ptr()), out, residual.data<float>(), out, bias.data<float>(),
                            parallel),
            operation);
    } else {
      const uint16_t* pairs = static_cast<const uint16_t*>(values.const_data_ptr());
      mg_blocks_bf16 given{2 * values.size(1), blocks, pairs, row_data(), channel_data(), tap.data<uint8_t>()};
      check(mg_block_conv2d_bf16(&c, &given, static_cast<const uint16_t*>(x.const_data_ptr()), in,
                                 static_cast<uint16_t*>(y.mutable_data_ptr()), out, residual.data<uint16_t>(), out,
                                 bias.data<float>(), parallel),
            operation);
    }
  }
};

Tensor block_conv2d(const Tensor& x_, const Tensor& values, const Tensor& row_pointer, const Tensor& channel,
                    const std::optional<Tensor>& tap, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                    int64_t out_channels, const Sizes kernel, const Sizes stride, const Sizes padding, const Sizes dilation,
                    int64_t activation) {
  const ScalarType type = block_type(x_, values);
  Tensor x = channels_last(x_, "the input", type);
  mg_conv2d c = problem(x, out_channels, kernel, stride, padding, dilation, activation);
  BlockPlaces p(values, row_pointer, channel, tap, out_channels, type);
  Optional b = optional_plain(bias, ScalarType::Float, out_channels, "bias");
  Tensor y = output_of(c, MemoryFormat::ChannelsLast, type);
  Optional r;
  if (residual) {
    check_same_shape(*residual, y);
    r.held = channels_last(*residual, "the residual", type);
  }
  p.run(c, x, y, r, b, "block_conv2d");
  return y;
}

Tensor block_linear(const Tensor& x_, const Tensor& values, const Tensor& row_pointer, const Tensor& channel,
                    const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t out_features,
                    int64_t activation) {
  const ScalarType type = block_type(x_, values);
  STD_TORCH_CHECK(x_.is_cpu() && x_.dim() >= 1, "microglia: the input must be a CPU tensor (..., features)");
  Tensor x = torch::stable::contiguous(x_);
  int64_t features = x.size(x.dim() - 1), rows = features > 0 ? x.numel() / features : 0;
  uint32_t threads = torch::stable::get_num_threads();
  mg_conv2d c{1, features, 1, rows, out_features, 1, 1, 1, 1, 0, 0, 1, 1, static_cast<int32_t>(activation),
              static_cast<int32_t>(threads)};
  BlockPlaces p(values, row_pointer, channel, std::nullopt, out_features, type);
  Optional b = optional_plain(bias, ScalarType::Float, out_features, "bias");
  Sizes shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  Tensor y = torch::stable::empty(shape, type);
  Optional r;
  if (residual) {
    check_same_shape(*residual, y);
    r.held = plain(*residual, type, x.dim(), "the residual");
  }
  p.run(c, x, y, r, b, "block_linear");
  return y;
}

Tensor row_conv2d(const Tensor& x_, const Tensor& values, const Tensor& row_pointer, const Tensor& channel,
                  const std::optional<Tensor>& tap, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                  int64_t out_channels, const Sizes kernel, const Sizes stride, const Sizes padding, const Sizes dilation,
                  int64_t activation) {
  Tensor x = plain(x_, ScalarType::Float, 4, "the input");
  mg_conv2d c = problem(x, out_channels, kernel, stride, padding, dilation, activation);
  int64_t rows = values.dim() == 2 ? values.size(1) : 0;
  STD_TORCH_CHECK(rows > 0, "microglia: values must be (entries, rows of a group)");
  Places p(values, row_pointer, channel, tap, 2, (out_channels + rows - 1) / rows);
  Optional b = optional_plain(bias, ScalarType::Float, out_channels, "bias");
  Tensor y = output_of(c, MemoryFormat::Contiguous);
  Optional r;
  if (residual) {
    check_same_shape(*residual, y);
    r.held = plain(*residual, ScalarType::Float, 4, "the residual");
  }
  mg_rows places{rows, p.values.size(0), p.value_data(), p.row_data(), p.channel_data(), p.tap.data<uint8_t>()};
  check(mg_row_conv2d(&c, &places, static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(y.mutable_data_ptr()),
                      r.data<float>(), b.data<float>(), parallel),
        "row_conv2d");
  return y;
}

Tensor gated_conv2d(const Tensor& x_, const Tensor& values_, const Tensor& channels_, const Tensor& stripes_,
                    const std::optional<Tensor>& bias, int64_t out_channels, const Sizes kernel, const Sizes stride,
                    const Sizes padding, const Sizes dilation, int64_t activation) {
  Tensor x = channels_last(x_, "the input");
  mg_conv2d c = problem(x, out_channels, kernel, stride, padding, dilation, activation);
  Tensor values = plain(values_, ScalarType::Float, 3, "values"), channels = plain(channels_, ScalarType::Int, 1, "channels");
  Tensor stripes = plain(stripes_, ScalarType::Int, 1, "stripes");
  STD_TORCH_CHECK(values.size(0) == (out_channels + 15) / 16 && values.size(1) == kernel[0] * kernel[1] * c.in_channels &&
                      values.size(2) == 16,
                  "microglia: values must be (stripes, taps * input channels, 16)");
  Optional b = optional_plain(bias, ScalarType::Float, out_channels, "bias");
  Tensor y = output_of(c, MemoryFormat::ChannelsLast);
  check(mg_gated_conv2d(&c, static_cast<const float*>(values.const_data_ptr()),
                        static_cast<const int32_t*>(channels.const_data_ptr()), channels.size(0),
                        static_cast<const int32_t*>(stripes.const_data_ptr()), stripes.size(0),
                        static_cast<const float*>(x.const_data_ptr()), c.in_channels, static_cast<float*>(y.mutable_data_ptr()),
                        out_channels, b.data<float>(), parallel),
        "gated_conv2d");
  return y;
}

Tensor part_conv2d(const Tensor& x_, const Tensor& values_, const std::optional<Tensor>& rows_,
                   const std::optional<Tensor>& columns_, const std::optional<Tensor>& bias, int64_t outputs, const Sizes kernel,
                   const Sizes stride, const Sizes padding, const Sizes dilation, int64_t activation) {
  Tensor x = channels_last(x_, "the input");
  STD_TORCH_CHECK(!rows_ || rows_->dim() == 1, "microglia: rows must be a list");
  mg_conv2d c = problem(x, rows_ ? rows_->size(0) : outputs, kernel, stride, padding, dilation, activation);
  Tensor values = plain(values_, ScalarType::Float, 3, "values");
  const int64_t taps = kernel[0] * kernel[1];
  STD_TORCH_CHECK(taps > 0 && values.size(0) == (outputs + 15) / 16 && values.size(1) % taps == 0 && values.size(2) == 16,
                  "microglia: values must be (stripes, taps * input channels, 16)");
  List rows(rows_, c.out_channels, "rows"), columns(columns_, c.in_channels, "columns");
  Optional b = optional_plain(bias, ScalarType::Float, outputs, "bias");
  mg_part part{values.size(1) / taps, outputs, static_cast<const float*>(values.const_data_ptr()), rows.data(), columns.data()};
  Tensor y = output_of(c, MemoryFormat::ChannelsLast);
  check(mg_part_conv2d(&c, &part, static_cast<const float*>(x.const_data_ptr()), c.in_channels,
                       static_cast<float*>(y.mutable_data_ptr()), c.out_channels, b.data<float>(), parallel),
        "part_conv2d");
  return y;
}

Tensor gate_rows(const Tensor& x_, const std::optional<Tensor>& columns_, const Tensor& weight_, const Tensor& bias,
                 bool softmax, bool maximum) {
  Tensor x = channels_last(x_, "the input"), weight = plain(weight_, ScalarType::Float, 2, "weight");
  STD_TORCH_CHECK(x.size(0) == 1, "microglia: a gate chooses for one input at a time, not for ", x.size(0));
  Optional columns = optional_plain(columns_, ScalarType::Long, x.size(1), "columns");
  Optional b = optional_plain(bias, ScalarType::Float, weight.size(0), "bias");
  mg_gate gate{weight.size(1), weight.size(0), static_cast<const float*>(weight.const_data_ptr()), b.data<float>(), maximum,
               softmax};
  Sizes kept(static_cast<size_t>(gate.outputs));
  int64_t count = 0;
  check(mg_gate_rows(&gate, static_cast<const float*>(x.const_data_ptr()), x.size(2) * x.size(3), x.size(1),
                     columns.data<int64_t>(), x.size(1), kept.data(), &count),
        "gate_rows");
  Tensor rows = torch::stable::empty({count}, ScalarType::Long);
  std::copy_n(kept.data(), count, static_cast<int64_t*>(rows.mutable_data_ptr()));
  return rows;
}

Tensor add_rows(const Tensor& x_, const Tensor& part_, const Tensor& rows_) {
  Tensor x = channels_last(x_, "the input"), part = channels_last(part_, "the part");
  Tensor rows = plain(rows_, ScalarType::Long, 1, "rows");
  STD_TORCH_CHECK(x.size(0) == part.size(0) && x.size(2) == part.size(2) && x.size(3) == part.size(3) &&
                      part.size(1) == rows.size(0),
                  "microglia: a part must have the images and pixels of what it is added to, and a channel for each row");
  Tensor y = torch::stable::empty({x.size(0), x.size(1), x.size(2), x.size(3)}, ScalarType::Float, std::nullopt, std::nullopt,
                                  std::nullopt, MemoryFormat::ChannelsLast);
  check(mg_add_rows(x.size(0) * x.size(2) * x.size(3), x.size(1), static_cast<const float*>(x.const_data_ptr()), x.size(1),
                    static_cast<const float*>(part.const_data_ptr()), part.size(1),
                    static_cast<const int64_t*>(rows.const_data_ptr()), rows.size(0), static_cast<float*>(y.mutable_data_ptr()),
                    x.size(1)),
        "add_rows");
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(microglia, CPU, m) {
  m.impl("block_conv2d", TORCH_BOX(&block_conv2d));
  m.impl("block_linear", TORCH_BOX(&block_linear));
  m.impl("row_conv2d", TORCH_BOX(&row_conv2d));
  m.impl("gated_conv2d", TORCH_BOX(&gated_conv2d));
  m.impl("part_conv2d", TORCH_BOX(&part_conv2d));
  m.impl("gate_rows", TORCH_BOX(&gate_rows));
  m.impl("add_rows", TORCH_BOX(&add_rows));
}
