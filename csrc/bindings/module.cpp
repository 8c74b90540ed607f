// All of pybind11. Raw names and plain values; python/qwen_moe/engine.py holds the human ones.
// Every call that computes, loads or waits releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <map>
#include <string>

#include "base/crc32.h"
#include "engine/engine.h"

namespace py = pybind11;
using namespace qwen_moe;
using namespace pybind11::literals;

namespace {

// While it lives on the main thread, Ctrl-C also raises a flag that the running call looks at
// between steps; Python's own handler runs as well, and raises KeyboardInterrupt once the call
// returns.
class InterruptGuard {
 public:
  InterruptGuard() : outer_(active_.exchange(this)) {
    struct sigaction mine{};
    mine.sa_handler = &InterruptGuard::handle;
    sigaction(SIGINT, nullptr, &before_);
    // Only the thread that runs Python's handlers may wait for it, and only a real handler is
    // chained.
    installed_ = outer_ == nullptr && (before_.sa_flags & SA_SIGINFO) == 0 &&
                 before_.sa_handler != SIG_IGN && before_.sa_handler != SIG_DFL;
    if (installed_) {
      chained_ = before_.sa_handler;
      sigaction(SIGINT, &mine, nullptr);
    } else {
      active_ = outer_;
    }
  }
  ~InterruptGuard() {
    if (!installed_) return;
    sigaction(SIGINT, &before_, nullptr);
    active_ = nullptr;
  }
  const std::atomic<bool>* flag() const { return &raised_; }

 private:
  static void handle(int signal) {
    if (InterruptGuard* guard = active_.load()) guard->raised_ = true;
    if (chained_) chained_(signal);
  }
  static inline std::atomic<InterruptGuard*> active_{nullptr};
  static inline void (*chained_)(int) = nullptr;
  struct sigaction before_{};
  InterruptGuard* outer_;
  bool installed_ = false;
  std::atomic<bool> raised_{false};
};

bool on_main_thread() {
  py::module_ threading = py::module_::import("threading");
  return threading.attr("current_thread")().is(threading.attr("main_thread")());
}

struct Span {
  std::byte* data;
  size_t bytes;
};

// A contiguous buffer's memory.
Span memory_of(const py::buffer& buffer, bool writable) {
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

LayerType parse_layer_type(const std::string& name) {
  if (name == "linear_attention") return LayerType::linear_attention;
  require(name == "full_attention", "layer_types holds '", name,
          "'; this core runs linear_attention and full_attention");
  return LayerType::full_attention;
}

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

// The weights and the threads that pack them and later compute.
struct PyModel {
  std::shared_ptr<Model> model;
  std::vector<std::string> devices;
  int threads;
  int group;  // the most input features that share a scale
};

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

std::vector<std::string> layer_type_names(const ModelConfig& c) {
  std::vector<std::string> names;
  for (LayerType t : c.layer_types)
    names.emplace_back(t == LayerType::linear_attention ? "linear_attention" : "full_attention");
  return names;
}

void register_errors(py::module_& m) {
  // The classes live in errors.py; the order matters, the base comes last.
  static py::object base, invalid, capacity, format, device;
  py::module_ errors = py::module_::import("qwen_moe.errors");
  base = errors.attr("Error");
  invalid = errors.attr("InvalidArgument");
  capacity = errors.attr("CapacityError");
  format = errors.attr("FormatError");
  device = errors.attr("DeviceError");
  py::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const InvalidArgument& e) {
      py::set_error(invalid, e.what());
    } catch (const Capacity& e) {
      py::set_error(capacity, e.what());
    } catch (const Format& e) {
      py::set_error(format, e.what());
    } catch (const Device& e) {
      py::set_error(device, e.what());
    } catch (const Error& e) {
      py::set_error(base, e.what());
    }
  });
  // Python objects must not outlive the interpreter.
  m.add_object("_errors", py::capsule(&base, [](void*) {
                 for (py::object* o : {&base, &invalid, &capacity, &format, &device})
                   o->release().dec_ref();
               }));
}

void register_config(py::module_& m) {
  py::class_<ModelConfig>(m, "ModelConfig")
      .def(py::init([](int vocab_size, int hidden_size, int num_hidden_layers,
                       const std::vector<std::string>& layer_types, int num_attention_heads,
                       int num_key_value_heads, int head_dim, double rope_theta,
                       double partial_rotary_factor, int linear_num_key_heads,
                       int linear_num_value_heads, int linear_key_head_dim,
                       int linear_value_head_dim, int linear_conv_kernel_dim, int num_experts,
                       int num_experts_per_tok, int moe_intermediate_size,
                       int shared_expert_intermediate_size, double rms_norm_eps,
                       bool tie_word_embeddings, int max_position_embeddings) {
             ModelConfig c{.vocab_size = vocab_size,
                           .hidden_size = hidden_size,
                           .num_hidden_layers = num_hidden_layers,
                           .layer_types = {},
                           .num_attention_heads = num_attention_heads,
                           .num_key_value_heads = num_key_value_heads,
                           .head_dim = head_dim,
                           .rope_theta = rope_theta,
                           .partial_rotary_factor = partial_rotary_factor,
                           .linear_num_key_heads = linear_num_key_heads,
                           .linear_num_value_heads = linear_num_value_heads,
                           .linear_key_head_dim = linear_key_head_dim,
                           .linear_value_head_dim = linear_value_head_dim,
                           .linear_conv_kernel_dim = linear_conv_kernel_dim,
                           .num_experts = num_experts,
                           .num_experts_per_tok = num_experts_per_tok,
                           .moe_intermediate_size = moe_intermediate_size,
                           .shared_expert_intermediate_size = shared_expert_intermediate_size,
                           .rms_norm_eps = rms_norm_eps,
                           .tie_word_embeddings = tie_word_embeddings,
                           .max_position_embeddings = max_position_embeddings};
             for (const std::string& name : layer_types)
               c.layer_types.push_back(parse_layer_type(name));
             c.validate();
             return c;
           }),
           py::kw_only(), "vocab_size"_a, "hidden_size"_a, "num_hidden_layers"_a, "layer_types"_a,
           "num_attention_heads"_a, "num_key_value_heads"_a, "head_dim"_a, "rope_theta"_a,
           "partial_rotary_factor"_a, "linear_num_key_heads"_a, "linear_num_value_heads"_a,
           "linear_key_head_dim"_a, "linear_value_head_dim"_a, "linear_conv_kernel_dim"_a,
           "num_experts"_a, "num_experts_per_tok"_a, "moe_intermediate_size"_a,
           "shared_expert_intermediate_size"_a, "rms_norm_eps"_a, "tie_word_embeddings"_a,
           "max_position_embeddings"_a)
      .def_readonly("vocab_size", &ModelConfig::vocab_size)
      .def_readonly("hidden_size", &ModelConfig::hidden_size)
      .def_readonly("num_hidden_layers", &ModelConfig::num_hidden_layers)
      .def_property_readonly("layer_types", &layer_type_names)
      .def_readonly("num_attention_heads", &ModelConfig::num_attention_heads)
      .def_readonly("num_key_value_heads", &ModelConfig::num_key_value_heads)
      .def_readonly("head_dim", &ModelConfig::head_dim)
      .def_readonly("rope_theta", &ModelConfig::rope_theta)
      .def_readonly("partial_rotary_factor", &ModelConfig::partial_rotary_factor)
      .def_readonly("linear_num_key_heads", &ModelConfig::linear_num_key_heads)
      .def_readonly("linear_num_value_heads", &ModelConfig::linear_num_value_heads)
      .def_readonly("linear_key_head_dim", &ModelConfig::linear_key_head_dim)
      .def_readonly("linear_value_head_dim", &ModelConfig::linear_value_head_dim)
      .def_readonly("linear_conv_kernel_dim", &ModelConfig::linear_conv_kernel_dim)
      .def_readonly("num_experts", &ModelConfig::num_experts)
      .def_readonly("num_experts_per_tok", &ModelConfig::num_experts_per_tok)
      .def_readonly("moe_intermediate_size", &ModelConfig::moe_intermediate_size)
      .def_readonly("shared_expert_intermediate_size",
                    &ModelConfig::shared_expert_intermediate_size)
      .def_readonly("rms_norm_eps", &ModelConfig::rms_norm_eps)
      .def_readonly("tie_word_embeddings", &ModelConfig::tie_word_embeddings)
      .def_readonly("max_position_embeddings", &ModelConfig::max_position_embeddings)
      .def_property_readonly("hash", &ModelConfig::hash);
}

StoredFormats stored_formats(const std::map<std::string, std::string>& stored, int group) {
  StoredFormats formats{.group = group};
  for (const auto& [fqn, name] : stored) {
    require(name == "int4" || name == "int8", fqn, ": stored format '", name,
            "' is not int4 or int8");
    formats.formats[fqn] = name == "int4" ? WeightFormat::int4 : WeightFormat::int8;
  }
  return formats;
}

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

void register_engine(py::module_& m) {
  py::class_<Sampling>(m, "Sampling")
      .def(py::init([](double temperature, int top_k, double top_p, double min_p,
                       double repetition_penalty, double presence_penalty, double frequency_penalty,
                       uint64_t seed, int logprobs) {
             Sampling s{.temperature = temperature,
                        .top_k = top_k,
                        .top_p = top_p,
                        .min_p = min_p,
                        .repetition_penalty = repetition_penalty,
                        .presence_penalty = presence_penalty,
                        .frequency_penalty = frequency_penalty,
                        .seed = seed,
                        .logprobs = logprobs};
             s.validate();
             return s;
           }),
           py::kw_only(), "temperature"_a = 0.0, "top_k"_a = 0, "top_p"_a = 1.0, "min_p"_a = 0.0,
           "repetition_penalty"_a = 1.0, "presence_penalty"_a = 0.0, "frequency_penalty"_a = 0.0,
           "seed"_a = 0, "logprobs"_a = -1);

  py::class_<KernelImage>(m, "KernelImage")
      .def(py::init([](std::string name, std::string symbol, const py::bytes& code, int shared,
                       int warps, std::vector<std::pair<std::string, std::string>> params,
                       std::vector<std::pair<std::string, int>> constants, int scratch,
                       bool overlaps) {
             return KernelImage{std::move(name), std::move(symbol), std::string(code),    shared,
                                warps,           std::move(params), std::move(constants), scratch,
                                overlaps};
           }),
           py::kw_only(), "name"_a, "symbol"_a, "code"_a, "shared"_a, "warps"_a, "params"_a,
           "constants"_a, "scratch"_a, "overlaps"_a)
      .def_readonly("name", &KernelImage::name);

  py::class_<Progress>(m, "Progress")
      .def_readonly("token_ids", &Progress::tokens)
      .def_readonly("logprobs", &Progress::logprobs)
      .def_readonly("top_logprobs", &Progress::top_logprobs)
      .def_readonly("finished", &Progress::finished)
      .def_property_readonly("finish_reason",
                             [](const Progress& p) { return finish_name(p.finish); })
      .def_readonly("error", &Progress::error);

  auto nogil = py::call_guard<py::gil_scoped_release>();
  py::class_<Engine, std::unique_ptr<Engine>>(m, "Engine",
                                              py::release_gil_before_calling_cpp_dtor())
      .def(py::init([](const PyModel& model, int max_sessions, int max_context,
                       const std::string& kv_dtype, const std::vector<int32_t>& eos_token_ids,
                       bool poison, bool cuda_graph,
                       const std::vector<KernelImage>& prefill_kernels) {
             const ModelConfig& config = model.model->config();
             DType kv = parse_dtype(kv_dtype);
             std::vector<std::unique_ptr<Backend>> shards;
             for (int i = 0; i < model.model->shards(); ++i) {
               BackendOptions options{.model = model.model.get(),
                                      .shard = i,
                                      .kv_dtype = kv,
                                      .threads = model.threads,
                                      .cuda_graph = cuda_graph,
                                      .max_rows = std::min(max_sessions, kMaxRows),
                                      .prefill_kernels = prefill_kernels};
               bool cpu = model.devices[static_cast<size_t>(i)] == "cpu";
               shards.push_back(cpu ? make_cpu_backend(options) : make_cuda_backend(options));
             }
             return std::make_unique<Engine>(
                 model.model, declare_state(config, {0, config.num_hidden_layers}, true, kv),
                 config.vocab_size, std::move(shards),
                 EngineOptions{.max_sessions = max_sessions,
                               .max_context = max_context,
                               .eos_token_ids = eos_token_ids,
                               .poison = poison});
           }),
           "model"_a, py::kw_only(), "max_sessions"_a, "max_context"_a, "kv_dtype"_a,
           "eos_token_ids"_a, "poison"_a = false, "cuda_graph"_a = true,
           "prefill_kernels"_a = std::vector<KernelImage>{}, nogil)
      .def_property_readonly("max_sessions",
                             [](const Engine& e) { return e.capacity().max_sessions; })
      .def_property_readonly("max_context", [](const Engine& e) { return e.options().max_context; })
      .def_property_readonly("bytes_per_session",
                             [](const Engine& e) { return e.capacity().bytes_per_session; })
      .def_property_readonly("capacity_reason", [](const Engine& e) { return e.capacity().reason; })
      .def_property_readonly("memory", &Engine::memory)
      .def_property_readonly(
          "stats",
          [](const Engine& e) {
            EngineStats s;
            {
              py::gil_scoped_release release;
              s = e.stats();
            }
            std::map<std::string, int64_t> all{
                {"sessions_open", s.sessions_open},     {"sessions_opened", s.sessions_opened},
                {"prefill_tokens", s.prefill_tokens},   {"prefill_steps", s.prefill_steps},
                {"decode_tokens", s.decode_tokens},     {"decode_steps", s.decode_steps},
                {"max_decode_rows", s.max_decode_rows}, {"slots_used", s.slots_used},
                {"pages_used", s.pages_used},           {"pages_total", s.pages_total}};
            all.merge(s.backend);
            return all;
          })
      .def("open", &Engine::open, nogil)
      .def("close", &Engine::close, "session"_a, nogil)
      .def("reset", &Engine::reset, "session"_a, nogil)
      .def("fork", &Engine::fork, "session"_a, nogil)
      .def("stop", &Engine::stop, "session"_a, nogil)
      .def("cancel", &Engine::cancel, "session"_a, nogil)
      .def(
          "submit",
          [](Engine& e, SessionId session, std::vector<int32_t> tokens, const Sampling* sampling,
             int max_tokens, std::vector<int32_t> stop_token_ids, bool ignore_eos) {
            e.submit(session, {.tokens = std::move(tokens),
                               .draw = sampling != nullptr,
                               .sampling = sampling ? *sampling : Sampling{},
                               .max_tokens = max_tokens,
                               .stop_token_ids = std::move(stop_token_ids),
                               .ignore_eos = ignore_eos});
          },
          "session"_a, "tokens"_a, py::kw_only(), "sampling"_a.none(true), "max_tokens"_a,
          "stop_token_ids"_a = py::tuple(), "ignore_eos"_a = false, nogil)
      .def(
          "run",
          [](Engine& e, const std::vector<SessionId>& sessions, int tokens, bool any) {
            bool main = on_main_thread();
            {
              py::gil_scoped_release release;
              if (main) {
                InterruptGuard guard;
                e.run(sessions, tokens, any, guard.flag());
              } else {
                e.run(sessions, tokens, any, nullptr);
              }
            }
            // An interrupt that Python's handler swallows just ends the call early.
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
          },
          "sessions"_a, py::kw_only(), "tokens"_a = 0, "any"_a = false)
      .def("poll", &Engine::poll, "session"_a, nogil)
      .def("position", &Engine::position, "session"_a, nogil)
      .def("tokens", &Engine::tokens, "session"_a, nogil)
      .def("poisoned", &Engine::poisoned, "session"_a, nogil)
      .def(
          "logits",
          [](Engine& e, SessionId session, const py::buffer& out) {
            Span span = memory_of(out, true);
            py::gil_scoped_release release;
            e.logits(session, {reinterpret_cast<float*>(span.data), span.bytes / sizeof(float)});
          },
          "session"_a, "out"_a)
      .def(
          "export_state",
          [](Engine& e, SessionId session) {
            Engine::Snapshot snapshot;
            {
              py::gil_scoped_release release;
              snapshot = e.save(session);
            }
            auto bytes = [](const void* data, size_t size) {
              return py::bytearray(static_cast<const char*>(data), size);
            };
            py::list out;
            std::vector<int32_t> marks{snapshot.computed, snapshot.reply_begin,
                                       snapshot.has_logits};
            out.append(py::make_tuple("tokens", "int32",
                                      Shape{static_cast<int64_t>(snapshot.tokens.size())},
                                      bytes(snapshot.tokens.data(), snapshot.tokens.size() * 4)));
            out.append(py::make_tuple("marks", "int32", Shape{3}, bytes(marks.data(), 12)));
            for (const auto& b : snapshot.buffers)
              out.append(py::make_tuple(b.buffer.fqn, dtype_name(b.buffer.dtype), b.shape,
                                        bytes(b.bytes.data(), b.bytes.size())));
            return out;
          },
          "session"_a)
      .def(
          "import_state",
          [](Engine& e, SessionId session, const py::sequence& buffers) {
            Engine::Snapshot snapshot;
            for (const py::handle& item : buffers) {
              auto [fqn, dtype, shape, data] =
                  item.cast<std::tuple<std::string, std::string, Shape, py::buffer>>();
              Span span = memory_of(data, false);
              if (fqn == "tokens" || fqn == "marks") {
                const auto* values = reinterpret_cast<const int32_t*>(span.data);
                std::vector<int32_t> ints(values, values + span.bytes / 4);
                if (fqn == "tokens")
                  snapshot.tokens = std::move(ints);
                else if (ints.size() == 3)
                  snapshot.computed = ints[0], snapshot.reply_begin = ints[1],
                  snapshot.has_logits = ints[2] != 0;
                else
                  throw Format("marks of the saved session must hold 3 integers");
                continue;
              }
              MutableStateManager::SavedBuffer b;
              b.buffer.fqn = fqn;
              b.buffer.dtype = parse_dtype(dtype);
              b.shape = shape;
              b.bytes.assign(span.data, span.data + span.bytes);
              snapshot.buffers.push_back(std::move(b));
            }
            py::gil_scoped_release release;
            e.load(session, snapshot);
          },
          "session"_a, "buffers"_a);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.attr("__version__") = QWEN_MOE_VERSION;
  register_errors(m);
  m.def("cuda_available", &cuda_available);
  m.def("cuda_device_info", &cuda_device_info, "device"_a);
  m.def("cuda_read_bandwidth", &cuda_read_bandwidth, "device"_a,
        py::call_guard<py::gil_scoped_release>());
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
  register_config(m);
  register_model(m);
  register_engine(m);
}
