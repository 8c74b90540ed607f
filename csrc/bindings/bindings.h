// What the translation units of the module share: one for each thing that Python sees. Raw names
// and plain values; python/qwen_moe/engine.py holds the human ones. Every call that computes, loads
// or waits releases the GIL.
#pragma once

#include <pybind11/pybind11.h>
// Here, so that a type converts in the same way in every unit.
#include <pybind11/stl.h>

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "model/model.h"

namespace qwen_moe::bindings {

namespace py = pybind11;
using namespace pybind11::literals;

struct Span {
  std::byte* data;
  size_t bytes;
};

// A contiguous buffer's memory.
inline Span memory_of(const py::buffer& buffer, bool writable) {
  py::buffer_info info = buffer.request(writable);
  py::ssize_t expected = info.itemsize;
  for (py::ssize_t i = info.ndim; i-- > 0;) {
    require(
        info.strides[static_cast<size_t>(i)] == expected || info.shape[static_cast<size_t>(i)] <= 1,
        "the buffer is not contiguous");
    expected *= info.shape[static_cast<size_t>(i)];
  }
  return {static_cast<std::byte*>(info.ptr), static_cast<size_t>(info.size * info.itemsize)};
}

// The weights and the threads that pack them and later compute.
struct PyModel {
  std::shared_ptr<Model> model;
  std::vector<std::string> devices;
  int threads;
  int group;  // the most input features that share a scale
};

// In this order: a signature names what was registered before it.
void register_errors(py::module_& m);
void register_facts(py::module_& m);
void register_config(py::module_& m);
void register_model(py::module_& m);
void register_engine(py::module_& m);

}  // namespace qwen_moe::bindings
