// Errors by meaning. The bindings map each class once to a Python class of the same name.
// Messages say what came, what was expected, and which object it was about.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace qwen_moe {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The caller passed something that cannot work.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

// It would work with fewer sessions, a shorter context, or later.
class Capacity : public Error {
 public:
  using Error::Error;
};

// A file or a tensor in it is not what it should be.
class Format : public Error {
 public:
  using Error::Error;
};

// The device or its driver failed.
class Device : public Error {
 public:
  using Error::Error;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Throws `E` with the parts joined when `condition` does not hold.
template <class E = InvalidArgument, class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw E(concat(parts...));
}

}  // namespace qwen_moe
