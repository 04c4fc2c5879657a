// The functions of the LibTorch Stable ABI that the kernels call: plain C, in libtorch_cpu.so of every torch from 2.11 on.
//
// Only these declarations are needed to build, so that a build needs a compiler and no torch. setup.py makes a library of the
// same name out of them to link against; at run time the true one is there, for Python imported torch before. A test compares
// the declarations with the headers of the torch that is installed: two that differ do not compile together.
//
// Source: https://docs.pytorch.org/cppdocs/stable.html and https://docs.pytorch.org/docs/stable/notes/libtorch_stable_abi.html
#ifndef MICROGLIA_LIBTORCH_H
#define MICROGLIA_LIBTORCH_H

#include <stddef.h>
#include <stdint.h>

struct AtenTensorOpaque;
struct StableListOpaque;
class TorchLibraryOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
using StableListHandle = StableListOpaque*;
using TorchLibraryHandle = TorchLibraryOpaque*;
using AOTITorchError = int32_t;  // 0 is success
using StableIValue = uint64_t;   // an argument or a result: a number, a handle, or the address of an optional one

extern "C" {

int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_int8();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_memory_format_channels_last();
int32_t aoti_torch_memory_format_contiguous_format();

AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* type);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* dimensions);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* dtype);
AOTITorchError aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* elements);
AOTITorchError aoti_torch_get_size(AtenTensorHandle tensor, int64_t dimension, int64_t* size);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** sizes);      // borrowed
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** strides);  // borrowed
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle tensor, bool* contiguous);
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data);
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data);

AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle tensor, AtenTensorHandle* another);
AOTITorchError aoti_torch_empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle* made);

AOTITorchError torch_new_list_reserve_size(size_t size, StableListHandle* made);
AOTITorchError torch_list_size(StableListHandle list, size_t* size);
AOTITorchError torch_list_get_item(StableListHandle list, size_t index, StableIValue* item);
AOTITorchError torch_list_push_back(StableListHandle list, StableIValue item);
AOTITorchError torch_delete_list(StableListHandle list);

AOTITorchError torch_get_num_threads(uint32_t* threads);
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
AOTITorchError torch_call_dispatcher(const char* name, const char* overload, StableIValue* stack, uint64_t version);

AOTITorchError aoti_torch_library_init_impl(const char* space, const char* key, const char* file, uint32_t line,
                                            TorchLibraryHandle* made);
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle library);
AOTITorchError torch_library_impl(TorchLibraryHandle library, const char* name,
                                  void (*kernel)(StableIValue* stack, uint64_t inputs, uint64_t outputs), uint64_t version);

}  // extern "C"

#endif
