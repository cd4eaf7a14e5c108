// Where every parameter of a network lies in the flat range of a role. Free of Python and torch.
#pragma once

#include <cstdint>
#include <vector>

namespace fastdistill::arena {

/// What the planner knows of a parameter: its first dim, the product of the others (a scalar is one
/// row of one element), and where it belongs.
struct Parameter {
  int64_t rows, row_size, unit, group;
};

/// One rank's range, the same on every rank.
struct Plan {
  std::vector<int64_t> rows;     ///< of each parameter on every rank, with the last ranks' padding
  std::vector<int64_t> offsets;  ///< first element of each parameter
  int64_t size;                  ///< elements of the range, a multiple of the alignment
};

/// Places units in ascending order, in a unit the groups in ascending order, in a group the
/// parameters as they are given. Every parameter starts at a multiple of `alignment` elements; if
/// `packed`, only the first of each unit does, and the others follow without gaps.
Plan plan(const std::vector<Parameter>& parameters, int64_t shards, int64_t alignment, bool packed);

}  // namespace fastdistill::arena
