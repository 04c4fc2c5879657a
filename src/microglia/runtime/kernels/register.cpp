// Registers the kernels as the CPU implementation of operators that Python defines, through the LibTorch Stable ABI: one
// build serves every torch from 2.11 on.
#include "register.h"

#include <cstdint>
#include <optional>

namespace microglia {
namespace {

struct Places {  // the index arrays that block and row kernels share, checked for dtype and length and kept alive
  Tensor values, row_pointer, channel;
  Optional tap;
  Places(const Tensor& values_, const Tensor& row_pointer_, const Tensor& channel_, const std::optional<Tensor>& tap_,
         int64_t dimensions, int64_t rows, ScalarType type = ScalarType::Float)
      : values(plain(values_, type, dimensions, "values")),
        row_pointer(plain(row_pointer_, ScalarType::Int, 1, "row_pointer")),
        channel(plain(channel_, ScalarType::Int, 1, "channel")),
        tap(optional_plain(tap_, ScalarType::Byte, channel.size(0), "tap")) {
    MG_CHECK(values.size(0) == channel.size(0), "microglia: values and channel must have the same length");
    MG_CHECK(row_pointer.size(0) == rows + 1, "microglia: row_pointer must have ", rows + 1, " entries, not ",
             row_pointer.size(0));
  }
  const float* value_data() const { return static_cast<const float*>(values.const_data_ptr()); }
  const int32_t* row_data() const { return static_cast<const int32_t*>(row_pointer.const_data_ptr()); }
  const int32_t* channel_data() const { return static_cast<const int32_t*>(channel.const_data_ptr()); }
};

// The type that a layer of blocks runs in: that of its input and of its values.
ScalarType block_type(const Tensor& x, const Tensor& values) {
  const ScalarType type = x.scalar_type();
  MG_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
           "microglia: the input of a block layer must be float32 or bfloat16");
  MG_CHECK(values.scalar_type() == type, "microglia: the input is ", name_of(type), " and the values of the blocks are ",
           name_of(values.scalar_type()), ": both must be of one type; convert the module or its input with .to()");
  return type;
}

struct BlockPlaces : Places {
  BlockPlaces(const Tensor& values_, const Tensor& row_pointer_, const Tensor& channel_, const std::optional<Tensor>& tap_,
              int64_t outputs, ScalarType type)
      : Places(values_, row_pointer_, channel_, tap_, type == ScalarType::Float ? 3 : 4, (outputs + 15) / 16, type) {
    MG_CHECK(values.size(2) == 16 && (type == ScalarType::Float || values.size(3) == 2),
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

// The residual, which a layer writes over: `laid_out` is the same memory if it lies as the output would.
Tensor written_over(const Tensor& residual, const Optional& laid_out, const Tensor& x) {
  MG_CHECK(laid_out.data<char>() == residual.const_data_ptr(),
           "microglia: a residual that is written over must lie in memory as the output would");
  const char *read = static_cast<const char*>(x.const_data_ptr()), *written = static_cast<const char*>(residual.const_data_ptr());
  const int64_t element = x.scalar_type() == ScalarType::Float ? 4 : 2;
  const bool apart = written + residual.numel() * element <= read || read + x.numel() * element <= written;
  MG_CHECK(apart, "microglia: a layer cannot write over its own input");
  return residual;
}

Tensor run_block_conv2d(const Tensor& x_, const Tensor& values, const Tensor& row_pointer, const Tensor& channel,
                        const std::optional<Tensor>& tap, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& residual, int64_t out_channels, const Sizes& kernel, const Sizes& stride,
                        const Sizes& padding, const Sizes& dilation, int64_t activation, bool over) {
  const ScalarType type = block_type(x_, values);
  Tensor x = channels_last(x_, "the input", type);
  mg_conv2d c = problem(x, out_channels, kernel, stride, padding, dilation, activation);
  BlockPlaces p(values, row_pointer, channel, tap, out_channels, type);
  Optional b = optional_plain(bias, ScalarType::Float, out_channels, "bias"), r;
  const Sizes shape = output_shape(c);
  if (residual) {
    check_shape(*residual, shape);
    r.held = channels_last(*residual, "the residual", type);
  }
  Tensor y = over ? written_over(*residual, r, x) : empty(shape, MemoryFormat::ChannelsLast, type);
  p.run(c, x, y, r, b, "block_conv2d");
  return y;
}

Tensor block_conv2d(const Tensor& x, const Tensor& values, const Tensor& row_pointer, const Tensor& channel,
                    const std::optional<Tensor>& tap, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                    int64_t outputs, const Sizes kernel, const Sizes stride, const Sizes padding, const Sizes dilation,
                    int64_t activation) {
  return run_block_conv2d(x, values, row_pointer, channel, tap, bias, residual, outputs, kernel, stride, padding, dilation,
                          activation, false);
}

void block_conv2d_over(const Tensor& x, const Tensor& values, const Tensor& row_pointer, const Tensor& channel,
                       const std::optional<Tensor>& tap, const std::optional<Tensor>& bias, const Tensor& residual,
                       int64_t outputs, const Sizes kernel, const Sizes stride, const Sizes padding, const Sizes dilation,
                       int64_t activation) {
  run_block_conv2d(x, values, row_pointer, channel, tap, bias, residual, outputs, kernel, stride, padding, dilation, activation,
                   true);
}

Tensor run_block_linear(const Tensor& x_, const Tensor& values, const Tensor& row_pointer, const Tensor& channel,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t out_features,
                        int64_t activation, bool over) {
  const ScalarType type = block_type(x_, values);
  MG_CHECK(x_.is_cpu() && x_.dim() >= 1, "microglia: the input must be a CPU tensor (..., features)");
  Tensor x = x_.is_contiguous() ? x_ : contiguous(x_);
  int64_t features = x.size(x.dim() - 1), rows = features > 0 ? x.numel() / features : 0;
  uint32_t threads = get_num_threads();
  mg_conv2d c{1, features, 1, rows, out_features, 1, 1, 1, 1, 0, 0, 1, 1, static_cast<int32_t>(activation),
              static_cast<int32_t>(threads)};
  BlockPlaces p(values, row_pointer, channel, std::nullopt, out_features, type);
  Optional b = optional_plain(bias, ScalarType::Float, out_features, "bias"), r;
  Sizes shape = sizes_of(x);
  shape.back() = out_features;
  if (residual) {
    check_shape(*residual, shape);
    r.held = plain(*residual, type, x.dim(), "the residual");
  }
  Tensor y = over ? written_over(*residual, r, x) : empty(shape, MemoryFormat::Contiguous, type);
  p.run(c, x, y, r, b, "block_linear");
  return y;
}

Tensor block_linear(const Tensor& x, const Tensor& values, const Tensor& row_pointer, const Tensor& channel,
                    const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t outputs,
                    int64_t activation) {
  return run_block_linear(x, values, row_pointer, channel, bias, residual, outputs, activation, false);
}

void block_linear_over(const Tensor& x, const Tensor& values, const Tensor& row_pointer, const Tensor& channel,
                       const std::optional<Tensor>& bias, const Tensor& residual, int64_t outputs, int64_t activation) {
  run_block_linear(x, values, row_pointer, channel, bias, residual, outputs, activation, true);
}

Tensor row_conv2d(const Tensor& x_, const Tensor& values, const Tensor& row_pointer, const Tensor& channel,
                  const std::optional<Tensor>& tap, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                  int64_t out_channels, const Sizes kernel, const Sizes stride, const Sizes padding, const Sizes dilation,
                  int64_t activation) {
  Tensor x = plain(x_, ScalarType::Float, 4, "the input");
  mg_conv2d c = problem(x, out_channels, kernel, stride, padding, dilation, activation);
  int64_t rows = values.dim() == 2 ? values.size(1) : 0;
  MG_CHECK(rows > 0, "microglia: values must be (entries, rows of a group)");
  Places p(values, row_pointer, channel, tap, 2, (out_channels + rows - 1) / rows);
  Optional b = optional_plain(bias, ScalarType::Float, out_channels, "bias");
  const Sizes shape = output_shape(c);
  Tensor y = empty(shape, MemoryFormat::Contiguous);
  Optional r;
  if (residual) {
    check_shape(*residual, shape);
    r.held = plain(*residual, ScalarType::Float, 4, "the residual");
  }
  mg_rows places{rows, p.values.size(0), p.value_data(), p.row_data(), p.channel_data(), p.tap.data<uint8_t>()};
  check(mg_row_conv2d(&c, &places, static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(y.mutable_data_ptr()),
                      r.data<float>(), b.data<float>(), parallel),
        "row_conv2d");
  return y;
}

const Registration registered(__FILE__, {{"block_conv2d", Operator<block_conv2d>::call},
                                         {"block_conv2d_", Operator<block_conv2d_over>::call},
                                         {"block_linear", Operator<block_linear>::call},
                                         {"block_linear_", Operator<block_linear_over>::call},
                                         {"row_conv2d", Operator<row_conv2d>::call}});

}  // namespace

}  // namespace microglia

// Work in pieces on torch's threads, for callers of the plain functions that have torch in their process.
extern "C" __attribute__((visibility("default"))) void mg_torch_parallel(int64_t begin, int64_t end, int64_t grain, mg_body body,
                                                                         void* context) {
  microglia::parallel(begin, end, grain, body, context);
}
