// Plans of weights, weights packed for a file, and the model that serves.
#include <cstdint>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "engine/backend.h"
#include "state/layout.h"

namespace qwen_moe::bindings {
namespace {

// -1 is the CPU.
int device_index(const std::string& device) {
  if (device == "cpu") return -1;
  require(device == "cuda" || device.starts_with("cuda:"), "device '", device,
          "' is not cpu, cuda or cuda:N");
  return device == "cuda" ? 0 : std::stoi(device.substr(5));
}

std::shared_ptr<WeightHome> make_home(const std::string& device, int threads) {
  const int index = device_index(device);
  auto host = make_cpu_weight_home(threads);
  return index < 0 ? host : make_cuda_weight_home(index, std::move(host));
}

struct PySlot {
  TensorSlot slot;
  std::string device;
  bool resident;
};

// What packs tensors to be written to a file.
struct PyPacker {
  std::shared_ptr<WeightHome> home;
};

// One of them; no model holds it.
struct PyPacked {
  std::shared_ptr<WeightHome> home;
  std::shared_ptr<StoredTensor> tensor;
};

StoredFormats stored_formats(const std::map<std::string, std::string>& stored, int group) {
  StoredFormats formats{.group = group};
  for (const auto& [fqn, name] : stored) {
    require(name == "int4" || name == "int8", fqn, ": stored format '", name,
            "' is not int4 or int8");
    formats.formats[fqn] = name == "int4" ? WeightFormat::int4 : WeightFormat::int8;
  }
  return formats;
}

// (descriptor of an open file, offset, bytes), one after the other.
using PyParts = std::vector<std::tuple<int, int64_t, size_t>>;

FileParts file_parts(const PyParts& parts) {
  std::vector<FilePart> out;
  for (const auto& [descriptor, offset, bytes] : parts) out.push_back({descriptor, offset, bytes});
  return FileParts(std::move(out));
}

}  // namespace

void register_model(py::module_& m) {
  py::class_<PySlot>(m, "TensorSlot")
      .def_property_readonly("fqn", [](const PySlot& s) { return s.slot.fqn; })
      .def_property_readonly("shape", [](const PySlot& s) { return s.slot.shape; })
      .def_property_readonly("format",
                             [](const PySlot& s) {
                               return std::string(s.slot.kind == TensorKind::matrix
                                                      ? format_name(s.slot.spec.format)
                                                      : "f32");
                             })
      .def_property_readonly("group", [](const PySlot& s) { return s.slot.spec.group; })
      .def_property_readonly("bytes", [](const PySlot& s) { return s.slot.bytes(); })
      .def_property_readonly("unit_bytes", [](const PySlot& s) { return s.slot.unit().bytes; })
      .def_readonly("device", &PySlot::device)
      .def_readonly("resident", &PySlot::resident);

  m.def(
      "plan",
      [](const ModelConfig& config, const std::string& recipe, const std::string& dtype,
         const std::map<std::string, std::string>& stored, int group) {
        std::vector<PySlot> slots;
        for (TensorSlot& slot : plan_tensors(config, parse_recipe(recipe), parse_dtype(dtype),
                                             stored_formats(stored, group)))
          slots.push_back({std::move(slot), "", false});
        return slots;
      },
      "config"_a, "recipe"_a, "dtype"_a, py::kw_only(),
      "stored"_a = std::map<std::string, std::string>{}, "group"_a = 128);

  m.def(
      "session_bytes",
      [](const ModelConfig& config, const std::string& kv_dtype) {
        StateLayout layout =
            declare_state(config, {0, config.num_hidden_layers}, true, parse_dtype(kv_dtype));
        return std::pair(layout.fixed_bytes(), layout.bytes_per_token());
      },
      "config"_a, "kv_dtype"_a);

  m.def(
      "state_buffers",
      [](const ModelConfig& config, const std::string& kv_dtype) {
        py::list out;
        for (const StateBuffer& b :
             declare_state(config, {0, config.num_hidden_layers}, true, parse_dtype(kv_dtype))
                 .buffers)
          out.append(py::make_tuple(b.fqn, dtype_name(b.dtype), b.shape,
                                    b.kind == BufferKind::per_token ? "per_token" : "fixed"));
        return out;
      },
      "config"_a, "kv_dtype"_a);

  py::class_<PyPacker>(m, "Packer")
      .def(py::init([](int threads, const std::string& device) {
             const int index = device_index(device);
             auto host = make_cpu_weight_home(threads);
             return PyPacker{index < 0 ? host : make_cuda_packer(index, std::move(host))};
           }),
           py::kw_only(), "threads"_a, "device"_a = "cpu");
  py::class_<PyPacked>(m, "PackedTensor", py::buffer_protocol())
      .def(py::init([](const PySlot& slot, const PyPacker& packer) {
             auto memory = packer.home->allocate(slot.slot.bytes());
             return PyPacked{packer.home,
                             std::make_shared<StoredTensor>(slot.slot, std::move(memory))};
           }),
           "slot"_a, "packer"_a)
      .def(
          "put",
          [](PyPacked& self, const py::buffer& data, const std::string& dtype, int64_t first) {
            Span span = memory_of(data, false);
            py::gil_scoped_release release;
            self.tensor->put(*self.home,
                             self.tensor->slot().entries(span.data, span.bytes, parse_dtype(dtype)),
                             first);
          },
          "data"_a, "dtype"_a, "first"_a = 0)
      .def(
          "read",
          [](PyPacked& self, const PyParts& parts, const std::string& dtype, int64_t first) {
            const FileParts files = file_parts(parts);
            self.tensor->put(*self.home, self.tensor->slot().entries(files, parse_dtype(dtype)),
                             first);
          },
          "parts"_a, "dtype"_a, "first"_a = 0, py::call_guard<py::gil_scoped_release>())
      .def(
          "fill_random",
          [](PyPacked& self, uint64_t seed) { self.tensor->fill_random(*self.home, seed); },
          "seed"_a, py::call_guard<py::gil_scoped_release>())
      .def_buffer([](PyPacked& self) {
        const TensorSlot& slot = self.tensor->slot();
        require<Format>(self.tensor->complete(), slot.describe(), " was not packed completely");
        return py::buffer_info(reinterpret_cast<const uint8_t*>(self.tensor->data()),
                               static_cast<py::ssize_t>(slot.bytes()));
      });

  py::class_<PyModel>(m, "Model")
      .def(py::init([](const ModelConfig& config, const std::string& recipe,
                       const std::string& dtype, const std::string& checkpoint,
                       const std::vector<std::string>& devices, const std::vector<int>& split,
                       int threads, const std::map<std::string, std::string>& stored, int group) {
             require(threads > 0 && threads <= 1024, "threads must be in [1, 1024], got ", threads);
             std::vector<std::shared_ptr<WeightHome>> homes;
             DType dense = parse_dtype(dtype);
             for (const std::string& device : devices) {
               homes.push_back(make_home(device, threads));
               // The kernels of a GPU take bf16; one plan holds for all devices of a model.
               if (device != "cpu") dense = DType::bf16;
             }
             return PyModel{
                 std::make_shared<Model>(config, parse_recipe(recipe), dense, checkpoint,
                                         std::move(homes), split, stored_formats(stored, group)),
                 devices, threads, group};
           }),
           "config"_a, py::kw_only(), "recipe"_a, "dtype"_a, "checkpoint"_a, "devices"_a, "split"_a,
           "threads"_a, "stored"_a = std::map<std::string, std::string>{}, "group"_a = 128,
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("config", [](const PyModel& self) { return self.model->config(); })
      .def_property_readonly(
          "recipe",
          [](const PyModel& self) { return std::string(recipe_name(self.model->recipe())); })
      .def_property_readonly(
          "slots",
          [](const PyModel& self) {
            std::vector<PySlot> slots;
            for (const Model::Entry& e : self.model->entries())
              slots.push_back({e.tensor->slot(), self.devices[static_cast<size_t>(e.shard)],
                               e.tensor->complete()});
            return slots;
          })
      .def_property_readonly("bytes", [](const PyModel& self) { return self.model->bytes(); })
      .def_readonly("group", &PyModel::group)
      .def(
          "put",
          [](PyModel& self, const std::string& fqn, const py::buffer& data,
             const std::string& dtype, int64_t first) {
            Span span = memory_of(data, false);
            py::gil_scoped_release release;
            self.model->put(fqn, span.data, span.bytes, parse_dtype(dtype), first);
          },
          "fqn"_a, "data"_a, "dtype"_a, "first"_a = 0)
      .def(
          "read",
          [](PyModel& self, const std::string& fqn, const PyParts& parts, const std::string& dtype,
             int64_t first) {
            self.model->read(fqn, file_parts(parts), parse_dtype(dtype), first);
          },
          "fqn"_a, "parts"_a, "dtype"_a, "first"_a = 0, py::call_guard<py::gil_scoped_release>())
      .def(
          "read_packed",
          [](PyModel& self, const std::string& fqn, int file, int64_t offset, size_t bytes,
             size_t at) { return self.model->read_packed(fqn, file, offset, bytes, at); },
          "fqn"_a, "file"_a, "offset"_a, "bytes"_a, "at"_a = 0,
          py::call_guard<py::gil_scoped_release>())
      .def(
          "accept", [](PyModel& self, const std::string& fqn) { self.model->accept(fqn); }, "fqn"_a)
      .def(
          "fill_random",
          [](PyModel& self, const std::string& fqn, uint64_t seed) {
            self.model->fill_random(fqn, seed);
          },
          "fqn"_a, "seed"_a, py::call_guard<py::gil_scoped_release>())
      .def("finish", [](PyModel& self) { self.model->finish(); });
}

}  // namespace qwen_moe::bindings
