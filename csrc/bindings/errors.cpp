// Errors of the core as the classes of errors.py.
#include "base/error.h"
#include "bindings/bindings.h"

namespace qwen_moe::bindings {

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

}  // namespace qwen_moe::bindings
