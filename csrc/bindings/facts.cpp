// Facts about this machine, and sums over bytes.
#include <map>
#include <string>

#include "base/crc32.h"
#include "bindings/bindings.h"
#include "engine/backend.h"

namespace qwen_moe::bindings {

void register_facts(py::module_& m) {
  m.def("cuda_available", &cuda_available);
  m.def("cuda_device_info", &cuda_device_info, "device"_a);
  m.def("cuda_read_bandwidth", &cuda_read_bandwidth, "device"_a,
        py::call_guard<py::gil_scoped_release>());
  m.def("cuda_pinned_bytes", &cuda_pinned_bytes);
  m.def("cuda_loading_times", [] {
    const LoadingTimes times = cuda_loading_times();
    return std::map<std::string, double>{
        {"making", times.making}, {"filling", times.filling}, {"waiting", times.waiting}};
  });
  m.def("isa", &cpu_isa);
  m.def(
      "crc32",
      [](const py::buffer& data, uint32_t before) {
        const Span span = memory_of(data, false);
        py::gil_scoped_release release;
        return crc32(before, span.data, span.bytes);
      },
      "data"_a, "before"_a = 0);
  m.def("crc32_combine", &crc32_combine, "first"_a, "second"_a, "second_bytes"_a);
  m.def(
      "read_bandwidth",
      [](int threads, int megabytes, double seconds) {
        require(threads > 0 && megabytes > 0, "threads and megabytes must be positive, got ",
                threads, " and ", megabytes);
        return cpu_read_bandwidth(threads, static_cast<size_t>(megabytes) << 20, seconds);
      },
      "threads"_a, "megabytes"_a = 512, "seconds"_a = 0.3,
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace qwen_moe::bindings
