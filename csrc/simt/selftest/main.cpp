#include <cstdio>

#include "case.h"

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s CASE ORDER\n", argv[0]);
    return 2;
  }
  for (const auto& cases : {executor_cases(), tensor_core_cases(), broken_kernel_cases()}) {
    for (const Case& test : cases) {
      if (test.name != std::string(argv[1])) continue;
      try {
        simt::set_order(argv[2], 1);
        test.run();
      } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
      }
      return 0;
    }
  }
  std::fprintf(stderr, "there is no case %s\n", argv[1]);
  return 2;
}
