// Registers the kernels of dynamic gates, as register.cpp does those of sparse weights.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "register.h"

namespace microglia {
namespace {

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

// What a gate chose of `length`: a list of int32, or a mask of bytes, of which the list is made here; a few operators in torch
// that make it take as long as a small layer.
std::vector<int32_t> chosen(const Tensor& t, int64_t length, const char* what) {
  std::vector<int32_t> entries;
  if (t.scalar_type() != ScalarType::Byte) {
    const Tensor list = plain(t, ScalarType::Int, 1, what);
    const int32_t* first = static_cast<const int32_t*>(list.const_data_ptr());
    entries.assign(first, first + list.size(0));
    return entries;
  }
  const Tensor mask = plain(t, ScalarType::Byte, 1, what);
  MG_CHECK(mask.size(0) == length, "microglia: a mask of ", what, " must have ", length, " entries, not ", mask.size(0));
  const uint8_t* kept = static_cast<const uint8_t*>(mask.const_data_ptr());
  entries.reserve(static_cast<size_t>(length));
  for (int64_t index = 0; index < length; ++index) {
    if (kept[index]) entries.push_back(static_cast<int32_t>(index));
  }
  return entries;
}

Tensor gated_conv2d(const Tensor& x_, const Tensor& values_, const Tensor& channels_, const Tensor& stripes_,
                    const std::optional<Tensor>& bias, int64_t out_channels, const Sizes kernel, const Sizes stride,
                    const Sizes padding, const Sizes dilation, int64_t activation) {
  Tensor x = channels_last(x_, "the input");
  mg_conv2d c = problem(x, out_channels, kernel, stride, padding, dilation, activation);
  Tensor values = plain(values_, ScalarType::Float, 3, "values");
  MG_CHECK(values.size(0) == (out_channels + 15) / 16 && values.size(1) == kernel[0] * kernel[1] * c.in_channels &&
               values.size(2) == 16,
           "microglia: values must be (stripes, taps * input channels, 16)");
  const std::vector<int32_t> channels = chosen(channels_, c.in_channels, "channels");
  const std::vector<int32_t> stripes = chosen(stripes_, values.size(0), "stripes");
  Optional b = optional_plain(bias, ScalarType::Float, out_channels, "bias");
  Tensor y = empty(output_shape(c), MemoryFormat::ChannelsLast);
  check(mg_gated_conv2d(&c, static_cast<const float*>(values.const_data_ptr()),
                        channels.data(), static_cast<int64_t>(channels.size()), stripes.data(),
                        static_cast<int64_t>(stripes.size()),
                        static_cast<const float*>(x.const_data_ptr()), c.in_channels, static_cast<float*>(y.mutable_data_ptr()),
                        out_channels, b.data<float>(), parallel),
        "gated_conv2d");
  return y;
}

Tensor part_conv2d(const Tensor& x_, const Tensor& values_, const std::optional<Tensor>& rows_,
                   const std::optional<Tensor>& columns_, const std::optional<Tensor>& bias, int64_t outputs, const Sizes kernel,
                   const Sizes stride, const Sizes padding, const Sizes dilation, int64_t activation) {
  Tensor x = channels_last(x_, "the input");
  MG_CHECK(!rows_ || rows_->dim() == 1, "microglia: rows must be a list");
  mg_conv2d c = problem(x, rows_ ? rows_->size(0) : outputs, kernel, stride, padding, dilation, activation);
  Tensor values = plain(values_, ScalarType::Float, 3, "values");
  const int64_t taps = kernel[0] * kernel[1];
  MG_CHECK(taps > 0 && values.size(0) == (outputs + 15) / 16 && values.size(1) % taps == 0 && values.size(2) == 16,
           "microglia: values must be (stripes, taps * input channels, 16)");
  List rows(rows_, c.out_channels, "rows"), columns(columns_, c.in_channels, "columns");
  Optional b = optional_plain(bias, ScalarType::Float, outputs, "bias");
  mg_part part{values.size(1) / taps, outputs, static_cast<const float*>(values.const_data_ptr()), rows.data(), columns.data()};
  Tensor y = empty(output_shape(c), MemoryFormat::ChannelsLast);
  check(mg_part_conv2d(&c, &part, static_cast<const float*>(x.const_data_ptr()), c.in_channels,
                       static_cast<float*>(y.mutable_data_ptr()), c.out_channels, b.data<float>(), parallel),
        "part_conv2d");
  return y;
}

Tensor gate_rows(const Tensor& x_, const std::optional<Tensor>& columns_, const Tensor& weight_, const Tensor& bias,
                 bool softmax, bool maximum, int64_t block) {
  Tensor x = channels_last(x_, "the input"), weight = plain(weight_, ScalarType::Float, 2, "weight");
  MG_CHECK(block > 0 && weight.size(0) <= INT32_MAX / block, "microglia: a block has 1 or more outputs, not ", block);
  MG_CHECK(x.size(0) == 1, "microglia: a gate chooses for one input at a time, not for ", x.size(0));
  Optional columns = optional_plain(columns_, ScalarType::Long, x.size(1), "columns");
  Optional b = optional_plain(bias, ScalarType::Float, weight.size(0), "bias");
  mg_gate gate{weight.size(1), weight.size(0), static_cast<const float*>(weight.const_data_ptr()), b.data<float>(), maximum,
               softmax};
  Sizes kept(static_cast<size_t>(gate.outputs));
  int64_t count = 0;
  check(mg_gate_rows(&gate, static_cast<const float*>(x.const_data_ptr()), x.size(2) * x.size(3), x.size(1),
                     columns.data<int64_t>(), x.size(1), kept.data(), &count),
        "gate_rows");
  Tensor rows = empty({count * block}, MemoryFormat::Contiguous, ScalarType::Long);
  int64_t* row = static_cast<int64_t*>(rows.mutable_data_ptr());
  for (int64_t index = 0; index < count; ++index) {
    for (int64_t inside = 0; inside < block; ++inside) *row++ = kept[static_cast<size_t>(index)] * block + inside;
  }
  return rows;
}

Tensor add_rows(const Tensor& x_, const Tensor& part_, const Tensor& rows_, bool relu) {
  Tensor x = channels_last(x_, "the input"), part = channels_last(part_, "the part");
  Tensor rows = plain(rows_, ScalarType::Long, 1, "rows");
  MG_CHECK(x.size(0) == part.size(0) && x.size(2) == part.size(2) && x.size(3) == part.size(3) &&
               part.size(1) == rows.size(0),
           "microglia: a part must have the images and pixels of what it is added to, and a channel for each row");
  Tensor y = empty(sizes_of(x), MemoryFormat::ChannelsLast);
  check(mg_add_rows(x.size(0) * x.size(2) * x.size(3), x.size(1), static_cast<const float*>(x.const_data_ptr()), x.size(1),
                    static_cast<const float*>(part.const_data_ptr()), part.size(1),
                    static_cast<const int64_t*>(rows.const_data_ptr()), rows.size(0), static_cast<float*>(y.mutable_data_ptr()),
                    x.size(1), relu),
        "add_rows");
  return y;
}

const Registration registered(__FILE__, {{"gated_conv2d", Operator<gated_conv2d>::call},
                                         {"part_conv2d", Operator<part_conv2d>::call},
                                         {"gate_rows", Operator<gate_rows>::call},
                                         {"add_rows", Operator<add_rows>::call}});

}  // namespace

}  // namespace microglia
