// Classifies pictures with an AOTInductor package of a pruned model, without Python:
//   classify PACKAGE.pt2 IMAGE.ppm... [--libraries FOLDER] [--logits]
// The pictures (binary PPM, as prepare.py writes them) go through the model as one batch.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

using Details = std::unordered_map<std::string, std::string>;  // what the export wrote beside the model

const std::string& said(const Details& details, const std::string& name) {
  const auto found = details.find(name);
  if (found == details.end()) {
    throw std::runtime_error("the package does not say its " + name + ": give it to export_package among the details");
  }
  return found->second;
}

// Of a JSON list.
std::vector<double> numbers(std::string text) {
  std::replace_if(text.begin(), text.end(), [](char c) { return c == '[' || c == ']' || c == ','; }, ' ');
  std::istringstream stream(text);
  return {std::istream_iterator<double>(stream), {}};
}

// The operators: what they are, then their kernels. The order of the files matters.
void load_operators(const std::string& folder, const std::string& device) {
  std::vector<std::string> names = {"_C_schemas.so", "_C_cpu.so"};
  if (device == "cuda") {
    names.push_back("_C_cuda.so");
  }
  for (const std::string& name : names) {
    if (dlopen((folder + "/" + name).c_str(), RTLD_NOW) == nullptr) {
      throw std::runtime_error(dlerror());
    }
  }
}

// [3, height, width] in 0..1.
at::Tensor read_ppm(const std::string& path, int64_t height, int64_t width) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  int64_t columns = 0, rows = 0, most = 0;
  if (!(file >> kind >> columns >> rows >> most) || kind != "P6" || most != 255) {
    throw std::runtime_error(path + ": no such file, or no binary PPM of 8 bits");
  }
  if (rows != height || columns != width) {
    throw std::runtime_error(path + " is not " + std::to_string(width) + " x " + std::to_string(height) + " pixels");
  }
  at::Tensor pixels = at::empty({height, width, 3}, at::kByte);
  file.get();  // the one white space behind the header
  if (!file.read(static_cast<char*>(pixels.data_ptr()), pixels.numel())) {
    throw std::runtime_error(path + " ends early");
  }
  return pixels.permute({2, 0, 1}).to(at::kFloat).div(255);
}

std::vector<std::string> lines(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> found;
  for (std::string line; std::getline(stream, line);) {
    found.push_back(line);
  }
  return found;
}

int run(const std::string& path, const std::vector<std::string>& files, const std::string& folder, bool all) {
  const c10::InferenceMode guard;
  const Details known = torch::inductor::AOTIModelPackageLoader::load_metadata_from_package(path, "model");
  const std::string& device = said(known, "device");
  load_operators(folder, device);
  torch::inductor::AOTIModelPackageLoader model(path);

  // The package does not look at the shapes it is given.
  const std::string& batch = said(known, "batch");
  if (batch != "any" && batch != std::to_string(files.size())) {
    throw std::runtime_error("the package takes " + batch + " pictures at a time, not " + std::to_string(files.size()));
  }
  const std::vector<double> size = numbers(said(known, "input_size"));
  std::vector<at::Tensor> pictures;
  for (const std::string& file : files) {
    pictures.push_back(read_ppm(file, size.at(1), size.at(2)));
  }
  const at::Tensor mean = at::tensor(numbers(said(known, "mean")), at::kFloat).view({3, 1, 1});
  const at::Tensor std = at::tensor(numbers(said(known, "std")), at::kFloat).view({3, 1, 1});
  const std::map<std::string, at::ScalarType> types = {
      {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}};
  const at::ScalarType dtype = types.at(said(known, "dtype"));
  const at::Tensor images = at::stack(pictures).sub(mean).div(std).to(at::Device(device), dtype);
  const at::Tensor logits = model.run({images.contiguous()}).at(0).to(at::kCPU, at::kFloat);

  const auto classes = lines(known.count("classes") ? known.at("classes") : "");
  const auto [shares, best] = logits.softmax(1).topk(std::min<int64_t>(5, logits.size(1)), 1);
  for (size_t i = 0; i < files.size(); ++i) {
    std::cout << files[i] << "\n" << std::fixed << std::setprecision(1);
    for (int64_t j = 0; j < best.size(1); ++j) {
      const size_t number = best[i][j].item<int64_t>();
      const std::string name = number < classes.size() ? classes[number] : "class " + std::to_string(number);
      std::cout << std::setw(7) << 100 * shares[i][j].item<float>() << " %  " << number << "  " << name << "\n";
    }
    for (int64_t j = 0; all && j < logits.size(1); ++j) {
      std::cout << (j == 0 ? "logits " : " ") << std::defaultfloat << std::setprecision(9) << logits[i][j].item<float>()
                << (j + 1 == logits.size(1) ? "\n" : "");
    }
  }
  return 0;
}

int main(int count, char** values) {
  std::vector<std::string> files(values + 1, values + count);
  std::string folder = TOKENPRUNE;
  if (auto found = std::find(files.begin(), files.end(), "--libraries"); files.end() - found >= 2) {
    folder = found[1];
    files.erase(found, found + 2);
  }
  const bool all = std::erase(files, "--logits") > 0;
  if (files.size() < 2) {
    std::cerr << "usage: classify PACKAGE.pt2 IMAGE.ppm... [--libraries FOLDER] [--logits]\n";
    return 2;
  }
  try {
    return run(files[0], {files.begin() + 1, files.end()}, folder, all);
  } catch (const c10::Error& error) {
    std::cerr << "classify: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "classify: " << error.what() << "\n";
    return 1;
  }
}
