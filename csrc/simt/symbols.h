// What the debug information knows of code.
#pragma once

#include <string>
#include <vector>

namespace simt {

// What binutils' addr2line says, with these options, of an address in this library or program; nothing when it fails.
std::vector<std::string> addr2line(const std::string& options, const void* code);

}  // namespace simt
