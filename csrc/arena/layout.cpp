#include "arena/layout.h"

#include <algorithm>
#include <numeric>
#include <tuple>

namespace fastdistill::arena {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

/// Indices of the parameters in the order in which they are placed.
std::vector<size_t> placement_order(const std::vector<Parameter>& parameters) {
  std::vector<size_t> order(parameters.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t i, size_t j) {
    const Parameter &a = parameters[i], &b = parameters[j];
    return std::tie(a.unit, a.group) < std::tie(b.unit, b.group);
  });
  return order;
}

}  // namespace

Plan plan(const std::vector<Parameter>& parameters, int64_t shards, int64_t alignment,
          bool packed) {
  Plan plan;
  plan.rows.resize(parameters.size());
  plan.offsets.resize(parameters.size());
  int64_t end = 0;
  const Parameter* previous = nullptr;
  for (const size_t i : placement_order(parameters)) {
    const Parameter& parameter = parameters[i];
    const bool follows = packed && previous != nullptr && previous->unit == parameter.unit;
    if (!follows) end = divide_up(end, alignment) * alignment;
    plan.rows[i] = divide_up(parameter.rows, shards);
    plan.offsets[i] = end;
    end += plan.rows[i] * parameter.row_size;
    previous = &parameter;
  }
  plan.size = divide_up(end, alignment) * alignment;
  return plan;
}

}  // namespace fastdistill::arena
