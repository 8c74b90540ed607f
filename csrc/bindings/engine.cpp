// The engine, what it takes and what it gives.
#include "engine/engine.h"

#include <algorithm>
#include <atomic>
#include <csignal>
#include <map>
#include <string>
#include <tuple>

#include "bindings/bindings.h"

namespace qwen_moe::bindings {
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

}  // namespace

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

}  // namespace qwen_moe::bindings
