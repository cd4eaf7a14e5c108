// The module fastdistill._arena. Addresses come as integers; fastdistill/optim/transfer.py makes
// sure that they are in bounds, and fastdistill/optim/layout.py that a plan makes sense.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "arena/checksum.h"
#include "arena/layout.h"
#include "arena/transfer.h"

namespace fastdistill::arena {
namespace {

namespace py = pybind11;

auto plan_tuples(const std::vector<std::array<int64_t, 4>>& parameters, int64_t shards,
                 int64_t alignment, bool packed) {
  std::vector<Parameter> all;
  for (const auto& [rows, row_size, unit, group] : parameters) {
    all.push_back({rows, row_size, unit, group});
  }
  Plan result = plan(all, shards, alignment, packed);
  return std::make_tuple(std::move(result.rows), std::move(result.offsets), result.size);
}

/// (address, dtype, address, dtype, elements)
using PieceTuple = std::tuple<uintptr_t, Dtype, uintptr_t, Dtype, int64_t>;

void transfer_tuples(const std::vector<PieceTuple>& pieces, int64_t threads) {
  const py::gil_scoped_release unlocked;
  std::vector<Piece> all;
  for (const auto& [from, from_dtype, to, to_dtype, count] : pieces) {
    all.push_back({reinterpret_cast<const void*>(from), from_dtype, reinterpret_cast<void*>(to),
                   to_dtype, count});
  }
  transfer(all, threads);
}

uint32_t checksum_address(uintptr_t data, int64_t bytes, int64_t threads) {
  const py::gil_scoped_release unlocked;
  return checksum(reinterpret_cast<const void*>(data), bytes, threads);
}

}  // namespace

PYBIND11_MODULE(_arena, m) {
  py::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::float32)
      .value("float64", Dtype::float64)
      .value("bfloat16", Dtype::bfloat16)
      .value("float16", Dtype::float16);
  m.def("plan", &plan_tuples, py::arg("parameters"), py::arg("shards"), py::arg("alignment"),
        py::arg("packed"));
  m.def("transfer", &transfer_tuples, py::arg("pieces"), py::arg("threads"));
  m.def("checksum", &checksum_address, py::arg("address"), py::arg("bytes"), py::arg("threads"));
}

}  // namespace fastdistill::arena
