// The Python module qwen_moe._core: all that is registered, in order.
#include "bindings/bindings.h"

using namespace qwen_moe::bindings;

PYBIND11_MODULE(_core, m) {
  m.attr("__version__") = QWEN_MOE_VERSION;
  register_errors(m);
  register_facts(m);
  register_config(m);
  register_model(m);
  register_engine(m);
}
