// A kernel that was compiled ahead of time, as plain fields: what python/qwen_moe/kernels writes
// and a backend loads. `params` are types of kernels/specs.py: "*bf16" a pointer to 16-byte aligned
// memory, "*i32/4" one aligned to 4 bytes, "i32", "i64" and "fp32" numbers, "i32/16" a multiple
// of 16.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace qwen_moe {

struct KernelImage {
  std::string name;                                         // what the core asks for
  std::string symbol;                                       // in `code`
  std::string code;                                         // a cubin
  int shared = 0;                                           // bytes of dynamic shared memory
  int warps = 0;                                            // of a block
  std::vector<std::pair<std::string, std::string>> params;  // name and type, in order
  std::vector<std::pair<std::string, int>> constants;       // rows of a block and such
  int scratch = 0;        // pointers behind the params; the kernels that we compile want null
  bool overlaps = false;  // may be launched before its predecessor has ended: waits for it itself
};

}  // namespace qwen_moe
