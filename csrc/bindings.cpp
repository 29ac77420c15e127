// The only file that knows Python. Tensors arrive as integers: data pointers, sizes and strides in elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "ops.h"

namespace py = pybind11;
using namespace regrpo;

namespace {

template <typename T>
T* ptr(uintptr_t address) { return reinterpret_cast<T*>(address); }

// (data pointer, inner length, outer stride, inner stride)
using RowsTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
Rows rows_of(const RowsTuple& r) { return {ptr<void>(std::get<0>(r)), std::get<1>(r), std::get<2>(r), std::get<3>(r)}; }

void check(int status, const char* op, const int64_t* labels = nullptr, int64_t bad_row = 0, int64_t vocab = 0) {
  if (status == kOk) return;
  if (status == kBadLabel) {
    throw py::value_error("labels[" + std::to_string(bad_row) + "] = " + std::to_string(labels[bad_row]) +
                          " is out of range: expected 0 <= label < " + std::to_string(vocab) +
                          " (or -100 to skip the row); rows are counted over the flattened labels");
  }
  if (status == kNoSuchIsa) throw py::value_error(std::string(op) + ": this machine or build lacks the requested isa");
  throw std::runtime_error(std::string(op) + " failed with status " + std::to_string(status));
}

#ifndef REGRPO_CUDA_ARCHITECTURES
#define REGRPO_CUDA_ARCHITECTURES ""
#endif

py::dict build_info() {
  static const char* names[] = {"portable", "avx2", "avx512", "avx512_bf16"};
  std::vector<std::string> compiled = {"portable"}, usable;
#ifdef REGRPO_HAS_AVX2
  compiled.insert(compiled.end(), {"avx2", "avx512", "avx512_bf16"});
#endif
  for (int isa = 0; isa < kIsaCount; ++isa)
    if (cpu::has_isa(isa)) usable.emplace_back(names[isa]);
  py::dict info;
  info["cpu_isas_compiled"] = compiled;
  info["cpu_isas_usable"] = usable;
  info["cpu_isa"] = names[cpu::best_isa()];
  info["cuda_architectures"] = REGRPO_CUDA_ARCHITECTURES;
  info["compiler"] = __VERSION__;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.def("build_info", &build_info);
}
