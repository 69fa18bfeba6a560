// SPDX-License-Identifier: Apache-2.0
// A guard for CUDA devices on a machine without one: torch built for CPUs can then make fake tensors on them.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {

struct AbsentGPU final : DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return {DeviceType::CUDA, 0}; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, getDevice()); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};

C10_REGISTER_GUARD_IMPL(CUDA, AbsentGPU);

}  // namespace c10::impl
