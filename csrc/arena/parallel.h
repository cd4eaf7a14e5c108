// Threads for work that is cut into many pieces.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace fastdistill::arena {

/// Calls body(i) once for every i below `count`, on at most `threads` threads, each of which takes
/// the next i when it is done with one: pieces of unlike sizes keep all of them busy to the end.
/// They live for this call only, so that a process may fork between calls. `body` must not throw.
template <class Body>
void parallel_for(int64_t count, int64_t threads, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i = next++; i < count; i = next++) body(i);
  };
  std::vector<std::thread> helpers;
  helpers.reserve(std::max<int64_t>(std::min(threads, count) - 1, 0));
  try {
    while (helpers.size() < helpers.capacity()) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // The system has no more threads to give; those that run do the work.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace fastdistill::arena
