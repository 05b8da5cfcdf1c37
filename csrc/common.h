// What every operator of csrc shares on the host: the description of a tensor, and errors as exceptions.
//
// csrc knows no PyTorch: operators are plain functions of a parameter struct, a device index and a stream.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

namespace univid {

enum class DType : int { kBFloat16 = 0, kFloat16 = 1 };

// A (B, T, N, H, D) tensor in device memory whose last dimension is contiguous. Strides count elements.
struct TensorView {
  void* data;  // null: this output is not asked for
  int64_t stride_b, stride_t, stride_n, stride_h;
};

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes a device current, and the former one again when it goes.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&former_), "cudaGetDevice");
    if (former_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (former_ != device_) cudaSetDevice(former_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, former_ = 0;
};

// Shared memory that one block can have on a device, in bytes.
inline int shared_memory_limit(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return bytes;
}

// Gives `kernel` all the shared memory of the current device, once per device. Each kernel has a `once` of its own.
constexpr int kMaxDevices = 64;
using OncePerDevice = std::array<std::once_flag, kMaxDevices>;

template <typename Kernel>
void prepare(OncePerDevice& once, Kernel* kernel, int device) {
  std::call_once(once.at(device), [&] {
    // A kernel's first use loads it, which a capture in its default mode forbids.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
    const void* function = reinterpret_cast<const void*>(kernel);
    cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory_limit(device));
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared);
    cudaThreadExchangeStreamCaptureMode(&mode);
    check(error, "cudaFuncSetAttribute");
  });
}

}  // namespace univid
