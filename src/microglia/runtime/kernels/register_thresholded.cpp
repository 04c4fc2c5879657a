// Registers the layer of a thresholded input, as register.cpp does those of sparse weights.
#include "register.h"
#include "thresholded.h"

namespace microglia {
namespace {

Tensor thresholded_linear(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_, const Tensor& threshold) {
  const ScalarType type = x_.scalar_type();
  MG_CHECK(x_.is_cpu() && x_.dim() > 0 && (type == ScalarType::Float || type == ScalarType::BFloat16),
           "microglia: the input of a thresholded layer must be a CPU tensor in float32 or bfloat16");
  const Tensor x = x_.is_contiguous() ? x_ : contiguous(x_), weight = plain(weight_, type, 2, "weight");
  MG_CHECK(threshold.is_cpu() && threshold.scalar_type() == type && threshold.numel() == 1,
           "microglia: the threshold must be one number of the input's type");
  Sizes shape = sizes_of(x);
  MG_CHECK(shape.back() == weight.size(0), "microglia: the weight takes ", weight.size(0), " inputs, not ", shape.back());
  const Optional bias = optional_plain(bias_, type, weight.size(1), "bias");
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < shape.size(); ++d) rows *= shape[d];
  shape.back() = weight.size(1);
  const mg_thresholded layer{rows, weight.size(0), weight.size(1), weight.const_data_ptr(), bias.data<void>(),
                             threshold.const_data_ptr(), type == ScalarType::BFloat16, mg_level(),
                             static_cast<int32_t>(get_num_threads())};
  Tensor y = empty(shape, MemoryFormat::Contiguous, type);
  check(mg_thresholded_linear(&layer, x.const_data_ptr(), y.mutable_data_ptr(), parallel), "thresholded_linear");
  return y;
}

const Registration registered(__FILE__, {{"thresholded_linear", Operator<thresholded_linear>::call}});

}  // namespace

}  // namespace microglia
