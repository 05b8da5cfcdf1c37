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
    // Also where it is current: a thread's first call makes the device's context the thread's, which the driver's
    // functions need (cuTensorMapEncodeTiled).
    check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (former_ != device_) cudaSetDevice(former_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, former_ = 0;
};

inline int attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Shared memory that one block can have on a device, in bytes.
inline int shared_memory_limit(int device) { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device); }

inline int num_processors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

// What is done to kernels before their first launch on a device. Each kernel has a `once` of its own.
constexpr int kMaxDevices = 64;
using OncePerDevice = std::array<std::once_flag, kMaxDevices>;

// While it lives, this thread may load kernels during a capture, which its default mode forbids.
class RelaxedCapture {
 public:
  RelaxedCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode"); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Loads kernels on the current device, which their first launch would else do.
template <typename... Kernels>
void load(OncePerDevice& once, int device, Kernels*... kernels) {
  std::call_once(once.at(device), [&] {
    const RelaxedCapture relaxed;
    cudaFuncAttributes attributes;
    (check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernels)), "cudaFuncGetAttributes"), ...);
  });
}

// Gives `kernel` all the shared memory of the current device.
template <typename Kernel>
void prepare(OncePerDevice& once, Kernel* kernel, int device) {
  std::call_once(once.at(device), [&] {
    const RelaxedCapture relaxed;
    const void* function = reinterpret_cast<const void*>(kernel);
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory_limit(device)),
          "cudaFuncSetAttribute");
    check(
        cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "cudaFuncSetAttribute");
  });
}

}  // namespace univid
