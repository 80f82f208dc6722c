// Defines the operators where there is no Python to do it: a C++ program loads this library before those with kernels.
#include <exception>
#include <iostream>

#include "../stable.h"

namespace {

constexpr const char* kSchemas[] = {
#include "schemas.inc"
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tokenprune, m) {
  try {
    for (const char* schema : kSchemas) {
      m.def(schema);
    }
  } catch (const std::exception&) {
    // Torch has said what is wrong. Thrown on while the library is being loaded, it would end the program.
    std::cerr << "tokenprune: _C_schemas.so defines nothing: the operators are defined already, as by `import "
                 "tokenprune_ext`. It is for programs without Python.\n";
  }
}
