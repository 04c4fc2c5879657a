// Tensors, and functions of tensors as operators, over the C functions of libtorch.h.
#ifndef MICROGLIA_TENSORS_H
#define MICROGLIA_TENSORS_H

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "libtorch.h"

// The error of an operator: its parts one behind the other. torch turns it into a RuntimeError.
#define MG_CHECK(condition, ...)                   \
  if (__builtin_expect(bool(condition), 1)) {      \
  } else                                           \
    microglia::fail(__VA_ARGS__)
#define MG_CALL(call) MG_CHECK((call) == 0, "microglia: torch refused ", #call)

namespace microglia {

template <class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

constexpr uint64_t kTorchVersion = uint64_t{2} << 56 | uint64_t{11} << 48;  // the calling convention: that of torch 2.11

enum class ScalarType { Float, BFloat16, Int, Long, Byte, Char, Other };
enum class MemoryFormat { Contiguous, ChannelsLast };

inline int32_t dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Int: return aoti_torch_dtype_int32();
    case ScalarType::Long: return aoti_torch_dtype_int64();
    case ScalarType::Byte: return aoti_torch_dtype_uint8();
    case ScalarType::Char: return aoti_torch_dtype_int8();
    default: fail("microglia: there is no tensor of another type");
  }
}

struct Span {  // sizes or strides: as long as the tensor lives
  const int64_t *first, *last;
  const int64_t* begin() const { return first; }
  const int64_t* end() const { return last; }
};

// A tensor that is owned; copies share the handle.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle owned) : handle_(owned, aoti_torch_delete_tensor_object) {}

  AtenTensorHandle get() const { return handle_.get(); }
  int64_t dim() const { return ask<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return ask<int64_t>(aoti_torch_get_numel); }
  bool is_contiguous() const { return ask<bool>(aoti_torch_is_contiguous); }
  bool is_cpu() const { return ask<int32_t>(aoti_torch_get_device_type) == aoti_torch_device_type_cpu(); }
  const void* const_data_ptr() const { return ask<const void*>(torch_get_const_data_ptr); }
  void* mutable_data_ptr() const { return ask<void*>(torch_get_mutable_data_ptr); }
  Span sizes() const { return span(ask<int64_t*>(aoti_torch_get_sizes)); }
  Span strides() const { return span(ask<int64_t*>(aoti_torch_get_strides)); }

  int64_t size(int64_t dimension) const {
    int64_t size = 0;
    MG_CALL(aoti_torch_get_size(get(), dimension, &size));
    return size;
  }

  ScalarType scalar_type() const {
    const int32_t dtype = ask<int32_t>(aoti_torch_get_dtype);
    for (ScalarType type : {ScalarType::Float, ScalarType::BFloat16, ScalarType::Int, ScalarType::Long, ScalarType::Byte, ScalarType::Char}) {
      if (dtype_of(type) == dtype) return type;
    }
    return ScalarType::Other;
  }

 private:
  template <class T>
  T ask(AOTITorchError (*question)(AtenTensorHandle, T*)) const {
    T answer{};
    MG_CHECK(question(get(), &answer) == 0, "microglia: torch does not say what a tensor is like");
    return answer;
  }
  Span span(const int64_t* first) const { return {first, first + dim()}; }

  std::shared_ptr<AtenTensorOpaque> handle_;
};

inline uint32_t get_num_threads() {
  uint32_t threads = 1;
  MG_CALL(torch_get_num_threads(&threads));
  return threads;
}

// ------------------------------------------------------------------------------------------------- arguments and results
// A kernel is called with a stack of 64-bit words. It takes over what its arguments own, and leaves its result in their place.
template <class T>
struct Word;

template <>
struct Word<int64_t> {
  static int64_t take(StableIValue word) { return static_cast<int64_t>(word); }
};

template <>
struct Word<double> {
  static double take(StableIValue word) {
    double value;
    __builtin_memcpy(&value, &word, sizeof value);
    return value;
  }
};

template <>
struct Word<bool> {
  static bool take(StableIValue word) { return word & 0xff; }
};

template <>
struct Word<Tensor> {
  static Tensor take(StableIValue word) { return Tensor(reinterpret_cast<AtenTensorHandle>(word)); }
  static StableIValue give(const Tensor& t) {
    AtenTensorHandle another = nullptr;
    MG_CALL(aoti_torch_new_tensor_handle(t.get(), &another));
    return reinterpret_cast<StableIValue>(another);
  }
};

template <class T>
struct Word<std::optional<T>> {
  static std::optional<T> take(StableIValue word) {
    const std::unique_ptr<StableIValue> held(reinterpret_cast<StableIValue*>(word));
    return held ? std::optional<T>(Word<T>::take(*held)) : std::nullopt;
  }
};

struct ListDeleter {
  void operator()(StableListOpaque* list) const { torch_delete_list(list); }
};
using OwnedList = std::unique_ptr<StableListOpaque, ListDeleter>;

template <class T>
struct Word<std::vector<T>> {
  static std::vector<T> take(StableIValue word) {
    const OwnedList list(reinterpret_cast<StableListHandle>(word));
    size_t size = 0;
    MG_CALL(torch_list_size(list.get(), &size));
    std::vector<T> items;
    items.reserve(size);
    for (size_t index = 0; index < size; ++index) {
      StableIValue item = 0;
      MG_CALL(torch_list_get_item(list.get(), index, &item));
      items.push_back(Word<T>::take(item));
    }
    return items;
  }
  static StableIValue give(const std::vector<T>& items) {
    StableListHandle made = nullptr;
    MG_CALL(torch_new_list_reserve_size(items.size(), &made));
    OwnedList list(made);
    for (const T& item : items) MG_CALL(torch_list_push_back(list.get(), Word<T>::give(item)));
    return reinterpret_cast<StableIValue>(list.release());
  }
};

inline Tensor contiguous(const Tensor& t, MemoryFormat format = MemoryFormat::Contiguous) {
  const int32_t number = format == MemoryFormat::ChannelsLast ? aoti_torch_memory_format_channels_last()
                                                              : aoti_torch_memory_format_contiguous_format();
  StableIValue stack[2] = {Word<Tensor>::give(t), static_cast<StableIValue>(static_cast<uint32_t>(number))};
  MG_CALL(torch_call_dispatcher("aten::contiguous", "", stack, kTorchVersion));
  return Word<Tensor>::take(stack[0]);
}

// ------------------------------------------------------------------------------------------------------------- operators
using Kernel = void (*)(StableIValue* stack, uint64_t inputs, uint64_t outputs);

template <auto function>
struct Operator;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Operator<function> {
  static void call(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
    constexpr uint64_t results = std::is_void_v<Result> ? 0 : 1;
    MG_CHECK(inputs == sizeof...(Arguments) && outputs == results, "microglia: the schema has ", inputs, " arguments and ",
             outputs, " results, the kernel ", sizeof...(Arguments), " and ", results);
    call(stack, std::index_sequence_for<Arguments...>());
  }

 private:
  template <size_t... index>
  static void call(StableIValue* stack, std::index_sequence<index...>) {
    std::tuple<std::decay_t<Arguments>...> arguments{Word<std::decay_t<Arguments>>::take(stack[index])...};
    if constexpr (std::is_void_v<Result>) {
      std::apply(function, arguments);
    } else {
      stack[0] = Word<Result>::give(std::apply(function, arguments));
    }
  }
};

// The CPU kernels of operators that Python defined, registered as long as it lives.
class Registration {
 public:
  Registration(const char* file, std::initializer_list<std::pair<const char*, Kernel>> kernels) {
    MG_CALL(aoti_torch_library_init_impl("microglia", "CPU", file, 0, &library_));
    for (const auto& [name, kernel] : kernels) MG_CALL(torch_library_impl(library_, name, kernel, kTorchVersion));
  }
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;
  ~Registration() { aoti_torch_delete_library_object(library_); }

 private:
  TorchLibraryHandle library_ = nullptr;
};

}  // namespace microglia

#endif
