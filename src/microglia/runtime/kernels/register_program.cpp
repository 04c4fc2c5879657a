// Consecutive steps in 8 bits as one operator, each of which is checked and run as the operator of its own.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "register_int8.h"

namespace microglia {
namespace {

// How a step is written in the list: microglia.runtime.int8.program.Step.
enum Field {
  kind, input, residual, goes_out, given, wide, zero, outputs, kernel_height, kernel_width, stride_height, stride_width,
  padding_height, padding_width, dilation_height, dilation_width, fields
};
enum Kind { convolution, linear, pooling, rounding, back, kinds };

constexpr int64_t numbers_of_step = 3;

// The tensors of all layers, one behind the other. Bit i of a step's `given` says whether its layer has the i-th one.
class Constants {
 public:
  explicit Constants(const std::vector<Tensor>& tensors) : next_(tensors.data()), end_(next_ + tensors.size()) {}

  QuadLayer layer(const int64_t* s, const double* n) {
    const int64_t known = s[given];
    const auto optional = [&](int bit) { return known >> bit & 1 ? std::optional<Tensor>(take()) : std::nullopt; };
    const auto needed = [&](int bit) {
      MG_CHECK(known >> bit & 1, "microglia::int8_program: a layer lacks a tensor");
      return take();
    };
    MG_CHECK(known >> 7 == 0, "microglia::int8_program: a layer has tensors that are not known");
    return {needed(0), needed(1), needed(2), optional(3), needed(4), needed(5), needed(6), n[0], n[1], n[2], s[zero], s[wide] != 0,
            s[outputs], {s[kernel_height], s[kernel_width]}, {s[stride_height], s[stride_width]},
            {s[padding_height], s[padding_width]}, {s[dilation_height], s[dilation_width]}};
  }
  void finish() const { MG_CHECK(next_ == end_, "microglia::int8_program: the steps leave ", end_ - next_, " tensors"); }

 private:
  const Tensor& take() {
    MG_CHECK(next_ < end_, "microglia::int8_program: the steps ask for more tensors than there are");
    return *next_++;
  }

  const Tensor *next_, *end_;
};

// The values of a program: first its inputs, then the result of each step, as long as later steps read it.
class Values {
 public:
  Values(const std::vector<Tensor>& inputs, const Sizes& steps) : held_(inputs.begin(), inputs.end()), inputs_(held_.size()) {
    const int64_t first = static_cast<int64_t>(held_.size());
    last_.resize(held_.size() + steps.size() / fields, -1);
    for (int64_t at = 0; at < static_cast<int64_t>(steps.size() / fields); ++at) {
      const int64_t* s = steps.data() + at * fields;
      MG_CHECK(s[input] >= 0 && s[input] < first + at && s[residual] >= -1 && s[residual] < first + at,
               "microglia::int8_program: step ", at, " reads a value that is not there");
      last_[static_cast<size_t>(s[input])] = at;
      if (s[residual] >= 0) last_[static_cast<size_t>(s[residual])] = at;
    }
  }

  const Tensor& at(int64_t value) const { return *held_[static_cast<size_t>(value)]; }
  std::optional<Tensor> added(int64_t value) const { return value < 0 ? std::nullopt : held_[static_cast<size_t>(value)]; }

  void add(Tensor made, const int64_t* s) {
    held_.emplace_back(std::move(made));
    const int64_t step = static_cast<int64_t>(held_.size() - inputs_) - 1;
    for (int64_t value : {s[input], s[residual]}) {
      if (value >= 0 && last_[static_cast<size_t>(value)] == step) held_[static_cast<size_t>(value)].reset();
    }
    if (last_[held_.size() - 1] < 0) held_.back().reset();  // no step reads it
  }

 private:
  std::vector<std::optional<Tensor>> held_;
  size_t inputs_;
  std::vector<int64_t> last_;  // the step that reads a value last
};

Tensor dequantize(const Tensor& x_, double unit, double zero) {
  const bool image = x_.dim() == 4;
  MG_CHECK(x_.is_cpu() && x_.scalar_type() == ScalarType::Byte && x_.dim() >= 1,
           "microglia::int8_program: only uint8 on the CPU returns to float32");
  const Tensor x = image ? channels_last(x_, "the input", ScalarType::Byte) : x_.is_contiguous() ? x_ : contiguous(x_);
  Tensor y = empty(sizes_of(x), image ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  check(mg_dequantize(static_cast<const uint8_t*>(x.const_data_ptr()), x.numel(), static_cast<float>(unit), static_cast<float>(zero),
                      static_cast<float*>(y.mutable_data_ptr()), parallel),
        "int8_program");
  return y;
}

Tensor run(const int64_t* s, const double* n, const Values& values, Constants& constants) {
  const Tensor& x = values.at(s[input]);
  switch (s[kind]) {
    case convolution: return int8_convolution(x, constants.layer(s, n), values.added(s[residual]));
    case linear: return int8_linear(x, constants.layer(s, n), values.added(s[residual]));
    case pooling:
      return int8_max_pool2d(x, {s[kernel_height], s[kernel_width]}, {s[stride_height], s[stride_width]},
                             {s[padding_height], s[padding_width]});
    case rounding: return quantize(x, n[0], n[1]);
    case back: return dequantize(x, n[0], n[1]);
    default: fail("microglia::int8_program: there are ", static_cast<int>(kinds), " kinds of steps and no kind ", s[kind]);
  }
}

std::vector<Tensor> int8_program(const std::vector<Tensor> inputs, const std::vector<Tensor> tensors, const Sizes steps,
                                 const std::vector<double> numbers) {
  const int64_t count = static_cast<int64_t>(steps.size() / fields);
  MG_CHECK(!inputs.empty() && count > 0 && steps.size() % fields == 0 && static_cast<int64_t>(numbers.size()) == count * numbers_of_step,
           "microglia::int8_program: there must be an input, and whole steps with ", numbers_of_step, " numbers each");
  Constants constants(tensors);
  Values values(inputs, steps);
  std::vector<Tensor> out;
  for (int64_t at = 0; at < count; ++at) {
    const int64_t* s = steps.data() + at * fields;
    Tensor made = run(s, numbers.data() + at * numbers_of_step, values, constants);
    if (s[goes_out]) out.push_back(made);
    values.add(made, s);
  }
  constants.finish();
  return out;
}

const Registration registered(__FILE__, {{"int8_program", Operator<int8_program>::call}});

}  // namespace
}  // namespace microglia
