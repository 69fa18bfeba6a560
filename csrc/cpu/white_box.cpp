// SPDX-License-Identifier: Apache-2.0
// The C++ internals for the tests: every instruction set by name, any order of chunks, raw
// pointers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>

#include "guided.h"

namespace py = pybind11;
using namespace fastcache;

namespace {

using Pointer = uintptr_t;

const Kernels& table(const std::string& isa) {
  const Kernels* kernels = kernels_for(isa.c_str());
  if (!kernels) throw std::invalid_argument(isa + " does not run here");
  return *kernels;
}

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const char* name : {"default", "avx2", "avx512"})
    if (kernels_for(name)) names.push_back(name);
  return names;
}

// Runs the chunks backwards, `grain` at a time: an order no thread pool promises, and must not
// matter.
struct Backwards {
  int64_t grain;
  template <class F>
  void operator()(int64_t begin, int64_t end, int64_t, const F& f) const {
    for (int64_t stop = end; stop > begin; stop -= grain) f(std::max(begin, stop - grain), stop);
  }
};

Operand dense(Pointer data, Type type, const Shape& shape) {
  return {reinterpret_cast<char*>(data), type, shape.length};
}

std::vector<double> l1(const std::string& isa, Type value, Type stored, Pointer y, Pointer x,
                       Pointer prev, Pointer out, int64_t samples, int64_t length, int64_t grain) {
  const Shape shape{samples, length, 1};
  std::vector<double> sums(2 * samples);
  residual_l1(table(isa), Backwards{grain}, shape, dense(y, value, shape), dense(x, value, shape),
              dense(prev, stored, shape), dense(out, stored, shape), sums.data());
  return sums;
}

std::vector<double> magnitude(const std::string& isa, Type value, Type stored, Pointer y, Pointer x,
                              Pointer prev, Pointer out, int64_t samples, int64_t rows,
                              int64_t width, double eps, int64_t grain) {
  const Shape shape{samples, rows * width, width};
  std::vector<double> ratios(samples);
  residual_magnitude(table(isa), Backwards{grain}, shape, dense(y, value, shape),
                     dense(x, value, shape), dense(prev, stored, shape), dense(out, stored, shape),
                     eps, ratios.data());
  return ratios;
}

// scale, shift: [samples, width]
std::vector<double> modulated(const std::string& isa, Type value, Type by, Type stored, Pointer x,
                              Pointer scale, Pointer shift, Pointer prev, Pointer out,
                              int64_t samples, int64_t tokens, int64_t width, double eps,
                              int64_t grain) {
  const Shape shape{samples, tokens * width, width};
  const auto rows = [&](Pointer data) {
    return Modulation{reinterpret_cast<const char*>(data), by, width, 0};
  };
  std::vector<double> sums(2);
  modulated_l1(table(isa), Backwards{grain}, shape, dense(x, value, shape), rows(scale),
               rows(shift), dense(prev, stored, shape), dense(out, stored, shape), tokens, eps,
               sums.data());
  return sums;
}

void weighted_sum(const std::string& isa, Type type, Pointer out,
                  const std::vector<std::tuple<Pointer, Type, float>>& terms, int64_t n) {
  std::vector<Term> list;
  for (const auto& [data, kind, weight] : terms)
    list.push_back({reinterpret_cast<const void*>(data), kind, weight});
  table(isa).combine(type, reinterpret_cast<void*>(out), list.data(), static_cast<int>(list.size()),
                     n);
}

void differences(const std::string& isa, Type value, Type stored,
                 const std::vector<Pointer>& factors, Pointer y, float delta, int64_t n) {
  std::vector<void*> list;
  for (Pointer factor : factors) list.push_back(reinterpret_cast<void*>(factor));
  table(isa).taylor_update(value, stored, list.data(), static_cast<int>(list.size()),
                           reinterpret_cast<const void*>(y), delta, n);
}

// guides: [samples, rows, width], every row `apart` widths behind the one before it
std::vector<double> guided(const std::string& isa, Type value, Type stored,
                           const std::vector<Pointer>& guides, int64_t samples, int64_t rows,
                           int64_t width, int64_t apart, bool per_sample, int64_t grain) {
  const int64_t row = apart * width, groups = per_sample ? samples : 1;
  const int order = static_cast<int>(guides.size()) - 2;
  std::vector<Guide> list;
  for (Pointer guide : guides)
    list.push_back(
        {{reinterpret_cast<char*>(guide), list.empty() ? value : stored, rows * row}, row});
  std::vector<double> sums(groups * sums_of(order));
  guided_sums(table(isa), Backwards{grain}, Shape{samples, rows * width, width}, list.data(), order,
              groups, sums.data());
  return sums;
}

// (chunk, sample, offset, count) of every chunk, in order
std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> chunks(int64_t samples,
                                                                   int64_t length) {
  std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> all;
  for_chunks([](int64_t begin, int64_t end, int64_t, const auto& f) { f(begin, end); },
             Shape{samples, length, 1}, CHUNK,
             [&](int64_t c, int64_t b, int64_t i, int64_t n) { all.emplace_back(c, b, i, n); });
  return all;
}

}  // namespace

PYBIND11_MODULE(_native_test, m) {
  py::enum_<Type>(m, "Type")
      .value("f32", Type::f32)
      .value("f16", Type::f16)
      .value("bf16", Type::bf16);
  m.attr("CHUNK") = CHUNK;
  m.def("available", available);
  m.def("capability", [] { return capability(); });
  m.def("chunks", chunks);
  m.def("residual_l1", l1);
  m.def("residual_magnitude", magnitude);
  m.def("modulated_l1", modulated);
  m.def("combine", weighted_sum);
  m.def("taylor_update", differences);
  m.def("guided_sums", guided);
}
