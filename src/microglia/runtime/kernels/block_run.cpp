// Chunk by chunk: copy the input to lines, then let the level's kernels run over tiles and stripes.
#include "block_run.h"

#include <algorithm>
#include <cstring>

namespace microglia::block {
namespace {

// Weights that stay in L2 over all tiles of a chunk: all of them up to the first bound, else runs of stripes of the second.
constexpr int64_t resident_value_bytes = 640 << 10, stripe_run_bytes = 384 << 10;

thread_local Scratch line_scratch, value_scratch;

}  // namespace

void in_parallel(mg_parallel parallel, int64_t count, int64_t grain, mg_body body, void* context) {
  if (parallel) return parallel(0, count, grain, body, context);
  body(0, count, context);
}

namespace {

// The last stripe where it is narrower than the kernels write: computed in a buffer of its own.
void run_narrow(const Tile& tile, TileKernel kernel, int64_t rows, int64_t columns, int64_t width, int64_t element, bool whole_line) {
  alignas(line_bytes) char target[most_pixels * line_bytes], residual[most_pixels * line_bytes] = {};
  float bias[line_floats] = {};
  const int64_t line = stripe_outputs * element;
  const size_t bytes = static_cast<size_t>(width * element);
  Tile whole = tile;
  if (tile.bias) std::memcpy(bias, tile.bias, static_cast<size_t>(width) * sizeof(float)), whole.bias = bias;
  for (int64_t pixel = 0; tile.residual && pixel < rows * columns; ++pixel) {
    const char* from = tile.residual + pixel / columns * tile.residual_row + pixel % columns * tile.residual_pixel;
    std::memcpy(residual + pixel * line, from, bytes);
    whole.residual = residual;
  }
  whole.target = target;
  whole.target_pixel = whole.residual_pixel = line;
  whole.target_row = whole.residual_row = columns * line;
  kernel(whole);
  for (int64_t pixel = 0; pixel < rows * columns; ++pixel) {
    char* to = tile.target + pixel / columns * tile.target_row + pixel % columns * tile.target_pixel;
    std::memcpy(to, target + pixel * line, bytes);
    if (whole_line) std::memset(to + bytes, 0, static_cast<size_t>(line) - bytes);
  }
}

// All stripes from `first` to `last` of one tile, whose pixels `tile` knows already.
void run_stripes(const Run& run, const Weighting& weights, Tile tile, int64_t rows, int64_t columns, int64_t first, int64_t last) {
  const Output& output = run.output;
  const TileKernel kernel = run.plan.level->kernel(rows, columns, weights.kind);
  const int64_t element = output.element_bytes(*run.plan.level);
  tile.rescale = output.rescale;
  tile.rows = rows, tile.columns = columns;
  char* target = tile.target;
  const char* residual = tile.residual;
  for (int64_t index = first; index < last; ++index) {
    const int64_t stripe = weights.stripe(index), channel = stripe * stripe_outputs;
    weights.fill(index, tile);
    tile.target = target + stripe * output.y.stripe;
    tile.residual = residual ? residual + stripe * output.residual.stripe : nullptr;
    tile.bias = output.bias ? output.bias + channel : nullptr;
    if (tile.rescale) tile.start = tile.rescale->start + channel, tile.scale = tile.rescale->scale + channel;
    if (channel + stripe_outputs <= output.channels) {
      kernel(tile);
    } else {
      run_narrow(tile, kernel, rows, columns, output.channels - channel, element, output.whole);
    }
  }
}

void run_tiles(const Run& run, const Weighting& weights, const Chunk& part, const char* lines, int64_t first, int64_t last) {
  const Plan& plan = run.plan;
  const int64_t down = divide_up(part.rows, plan.tile_rows), across = divide_up(part.columns, plan.tile_columns);
  Tile tile{};
  tile.activation = run.output.activation;
  tile.source_row = plan.rows.step * plan.row_bytes;
  tile.source_pixel = plan.pixel_bytes;
  const Image &y = run.output.y, &other = run.output.residual;
  tile.target_pixel = y.pixel, tile.target_row = y.row;
  tile.residual_pixel = other.pixel, tile.residual_row = other.row;
  for (int64_t index = 0; index < part.images * down * across; ++index) {
    const int64_t image = index / across / down, vertical = index / across % down, horizontal = index % across;
    const int64_t row = part.rows * vertical / down, rows = part.rows * (vertical + 1) / down - row;
    const auto edge = [&](int64_t tile_) {  // even tiles, or whole ones where columns are computed several at once
      return plan.level->columns == 1 ? part.columns * tile_ / across : std::min(part.columns, tile_ * plan.tile_columns);
    };
    const int64_t column = edge(horizontal), columns = edge(horizontal + 1) - column;
    tile.source = lines + image * plan.image_bytes + row * tile.source_row + column * plan.pixel_bytes;
    tile.target = y.at(part.image + image, part.row + row, part.column + column);
    tile.residual = other.data ? other.at(part.image + image, part.row + row, part.column + column) : nullptr;
    run_stripes(run, weights, tile, rows, columns, first, last);
  }
}

// Packs the stripes from `first` to `last`, of one list, into memory of the calling thread.
bool pack_stripes(const Run& run, int64_t first, int64_t last, mg_parallel parallel, Weighting& weights) {
  struct Packer {
    const Packing* packing;
    int64_t first, stripe_bytes;
    char* values;
  } work{run.weights.packing, first, weights.stripe_bytes, nullptr};
  work.values = value_scratch.reserve((last - first) * weights.stripe_bytes);
  if (!work.values) return false;
  const auto pack = [](int64_t begin, int64_t end, void* context) {
    const Packer& packer = *static_cast<Packer*>(context);
    for (int64_t index = begin; index < end; ++index) {
      packer.packing->pack(*packer.packing, packer.first + index, packer.values + index * packer.stripe_bytes);
    }
  };
  in_parallel(parallel, last - first, 1, pack, &work);
  weights.values = work.values, weights.first_packed = first, weights.packing = nullptr;
  return true;
}

// What a level sets up for its kernels on this thread.
class Prepared {
 public:
  explicit Prepared(const Level& level) : end_(level.end) {
    if (level.begin) level.begin();
  }
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;
  ~Prepared() {
    if (end_) end_();
  }

 private:
  void (*end_)();
};

// Stripes go in runs whose weights stay in L2 while all tiles of the chunk pass.
void run_chunk(const Run& run, const Chunk& part, const char* lines, int64_t first, int64_t last) {
  const int64_t total = (run.weights.places_before(last) - run.weights.places_before(first)) * line_bytes;
  const int64_t limit = (total <= resident_value_bytes ? resident_value_bytes : stripe_run_bytes) / line_bytes;
  while (first < last) {
    int64_t end = first + 1;
    while (end < last && run.weights.places_before(end + 1) - run.weights.places_before(first) <= limit) ++end;
    Weighting weights = run.weights;
    if (weights.packing && !pack_stripes(run, first, end, nullptr, weights)) return run.status.store(MG_NO_MEMORY);
    run_tiles(run, weights, part, lines, first, end);
    first = end;
  }
}

void run_chunks(int64_t begin, int64_t end, void* context) {
  Run& run = *static_cast<Run*>(context);
  char* lines = run.plan.direct ? nullptr : line_scratch.reserve(run.plan.scratch_bytes());
  if (!lines && !run.plan.direct) return run.status.store(MG_NO_MEMORY);
  const Prepared prepared(*run.plan.level);
  for (int64_t index = begin; index < end; ++index) {
    const Chunk part = run.plan.chunk_at(index);
    if (lines) run.plan.copy(part, 0, run.plan.copy_units(part), lines);
    run_chunk(run, part, lines ? lines : run.plan.lines_of(part), 0, run.weights.stripe_count);
  }
}

// One chunk whose stripes are shared out: all threads copy, then all compute from the same lines.
struct SharedChunk {
  const Run* run;
  Chunk part;
  char* lines;  // of a copy; null without one
  int64_t pieces;

  // The first stripe of a piece, such that pieces have about the same number of places (a stripe alone counts as one).
  int64_t boundary(int64_t piece) const {
    const Weighting& weights = run->weights;
    if (piece <= 0) return 0;
    if (piece >= pieces) return weights.stripe_count;
    const auto work = [&](int64_t stripe) { return weights.places_before(stripe) + stripe; };
    const int64_t wanted = work(weights.stripe_count) * piece / pieces;
    int64_t low = 0, high = weights.stripe_count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (work(middle) < wanted) low = middle + 1; else high = middle;
    }
    return low;
  }
};

void copy_shared(int64_t begin, int64_t end, void* context) {
  const SharedChunk& shared = *static_cast<SharedChunk*>(context);
  shared.run->plan.copy(shared.part, begin, end, shared.lines);
}

void run_shared(int64_t begin, int64_t end, void* context) {
  const SharedChunk& shared = *static_cast<SharedChunk*>(context);
  const char* lines = shared.lines ? shared.lines : shared.run->plan.lines_of(shared.part);
  const Prepared prepared(*shared.run->plan.level);
  run_chunk(*shared.run, shared.part, lines, shared.boundary(begin), shared.boundary(end));
}

// Chunks are shared out where they come out even, and stripes otherwise if there are enough of them.
bool stripes_balance_better(const Run& run, int64_t threads) {
  const int64_t chunks = run.plan.chunks(), rounds = divide_up(chunks, threads);
  const bool even = chunks * 8 >= rounds * threads * 7;
  return threads > 1 && !even && run.weights.stripe_count >= 2 * threads;
}

}  // namespace

int execute(Run& run, int64_t threads) {
  const int64_t chunks = run.plan.chunks();
  // One chunk packs each run of stripes when its turn comes, so that it is still in L2; several need all of them.
  if (run.weights.packing && chunks > 1 && !pack_stripes(run, 0, run.weights.stripe_count, run.parallel, run.weights)) {
    return MG_NO_MEMORY;
  }
  if (!stripes_balance_better(run, threads)) {
    in_parallel(run.parallel, chunks, 1, run_chunks, &run);
    return run.status.load();
  }
  SharedChunk shared{&run, {}, run.plan.direct ? nullptr : line_scratch.reserve(run.plan.scratch_bytes()), threads};
  if (!shared.lines && !run.plan.direct) return MG_NO_MEMORY;
  for (int64_t index = 0; index < chunks; ++index) {
    shared.part = run.plan.chunk_at(index);
    const int64_t units = run.plan.copy_units(shared.part);
    if (shared.lines) in_parallel(run.parallel, units, divide_up(units, threads), copy_shared, &shared);
    in_parallel(run.parallel, shared.pieces, 1, run_shared, &shared);
  }
  return run.status.load();
}

}  // namespace microglia::block
