#include "../launches.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <memory>
#include <string>

namespace py = pybind11;

namespace {

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};
std::string demangled(const char* name) {
  const std::unique_ptr<char, Free> found(abi::__cxa_demangle(name, nullptr, nullptr, nullptr));
  return found ? found.get() : name;
}

struct Close {
  void operator()(void* library) const { dlclose(library); }
};

py::dict to_dict(const tokenprune::Launch& launch) {
  py::dict dict;
  dict["kernel"] = demangled(launch.kernel);
  dict["grid"] = py::make_tuple(launch.grid[0], launch.grid[1], launch.grid[2]);
  dict["threads"] = launch.threads;
  dict["registers"] = launch.registers;
  dict["static_shared"] = launch.static_shared;
  dict["dynamic_shared"] = launch.dynamic_shared;
  dict["blocks_per_sm"] = launch.blocks_per_sm;
  dict["num_sms"] = launch.num_sms;
  return dict;
}

// Records from its construction to stop(), both on the same thread.
class LaunchRecorder {
 public:
  LaunchRecorder(const std::string& library, bool execute)
      : library_(dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {
    if (!library_) throw py::value_error(library + " is not loaded");
    record_ = reinterpret_cast<decltype(record_)>(dlsym(library_.get(), "tokenprune_record_launches"));
    if (!record_) throw py::value_error(library + " does not record launches");
    now_.execute = execute;
    before_ = record_(&now_);
    recording_ = true;
  }
  LaunchRecorder(const LaunchRecorder&) = delete;
  ~LaunchRecorder() { end(); }

  py::list stop() {
    end();
    py::list launches;
    for (const tokenprune::Launch& launch : now_.launches) launches.append(to_dict(launch));
    return launches;
  }

 private:
  void end() {
    if (recording_) record_(before_);
    recording_ = false;
  }

  // Held, because the names of the kernels lie in it.
  std::unique_ptr<void, Close> library_;
  decltype(&tokenprune_record_launches) record_ = nullptr;
  tokenprune::LaunchRecord now_;
  tokenprune::LaunchRecord* before_ = nullptr;
  bool recording_ = false;
};

}  // namespace

void bind_launches(py::module_& m) {
  py::class_<LaunchRecorder>(m, "LaunchRecorder",
                             "Records the kernels that this thread launches from a loaded library; see launches.py.")
      .def(py::init<const std::string&, bool>(), py::arg("library"), py::arg("execute") = true)
      .def("stop", &LaunchRecorder::stop, "Ends the recording; one dict a launch, in order.");
}
