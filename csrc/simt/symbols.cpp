#include "symbols.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>

namespace simt {

std::vector<std::string> addr2line(const std::string& options, const void* code) {
  Dl_info info;
  if (!dladdr(code, &info)) return {};
  char buffer[4096];
  std::snprintf(buffer, sizeof buffer, "addr2line %s -e '%s' 0x%zx", options.c_str(), info.dli_fname,
                reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(info.dli_fbase));
  std::vector<std::string> lines;
  if (FILE* pipe = popen(buffer, "r")) {
    while (std::fgets(buffer, sizeof buffer, pipe)) {
      lines.emplace_back(buffer);
      lines.back().erase(lines.back().find_last_not_of('\n') + 1);
    }
    pclose(pipe);
  }
  return lines;
}

}  // namespace simt
