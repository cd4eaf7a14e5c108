// sum_of_squares (ops/norm.py).
namespace fastdistill::FASTDISTILL_LEVEL {

template <class T>
double sum_of_squares(const Source& source, const Chunk& chunk) {
  Scratch<T> scratch;
  double total = 0;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    if (source.storage == kStorageOf<T>)
      prefetch_next(static_cast<const T*>(source.data) + chunk.offset + first);
    const T* value = load(source, chunk.offset + first, count, scratch);
    Lanes<T> squared;
    for_each_lane(count, [=, &squared](int64_t i, int lane) {
      squared.value[lane] += value[i] * value[i];
    });
    total += squared.sum();
  });
  return total;
}

}  // namespace fastdistill::FASTDISTILL_LEVEL
