// Launcher of nearest_safe and pack_bank: lays out the workspace, then bounds, screen, rescore.
#include "nearest_safe.h"

#include "rescore.cuh"
#include "screen.cuh"

namespace saferclip {
namespace {

// A packed bank: a header (magic and version, number of rows), bounds of every row, fp16 rows.
constexpr int64_t kHeaderBytes = 16;

struct Packed {
  uint64_t* header;
  uint8_t* rows;
  RowBound* bounds;
  int64_t row_bytes;
};
Packed packed_parts(void* packed, int64_t rows, int64_t dim) {
  uint8_t* base = static_cast<uint8_t*>(packed);
  const int64_t data = kHeaderBytes + rows * static_cast<int64_t>(sizeof(RowBound));
  return {reinterpret_cast<uint64_t*>(base), base + data, reinterpret_cast<RowBound*>(base + kHeaderBytes),
          round_up(2 * dim, 16)};
}

struct Plan {
  bool copy;             // screen an fp16 copy; otherwise the 16-bit bank is read as it is
  bool pack;             // the copy is made here, in the workspace
  int64_t row_bytes;     // of screened rows
  int64_t query_chunk;   // queries a screen launch
  int64_t splits, rows_per_split, capacity;
  int64_t bytes = 0;     // of the workspace; the rest are offsets into it
  int64_t bank_bounds, packed, query, query_bounds, norms, entries, count, threshold;
};

// One wave of co-resident blocks (two an SM): few queries are split over the bank to fill the chip.
Plan make_plan(const NearestProblem& p) {
  Plan plan;
  const HostMatrix bank{p.bank, p.bank_type};
  plan.copy = p.packed || p.bank_type == DType::kFloat32 || !bank.is_wide(p.dim);
  plan.pack = plan.copy && !p.packed;
  plan.row_bytes = round_up(2 * p.dim, 16);
  const int64_t slots = 2 * static_cast<int64_t>(multiprocessor_count());
  const int64_t query_tiles = ceil_div(p.queries, kTile), bank_tiles = ceil_div(p.rows, kTile);
  const int64_t chunk_tiles = query_tiles < slots ? query_tiles : slots;
  plan.query_chunk = chunk_tiles * kTile < p.queries ? chunk_tiles * kTile : p.queries;
  int64_t splits = slots / chunk_tiles;
  if (splits > ceil_div(bank_tiles, 4)) splits = ceil_div(bank_tiles, 4);  // at least 512 rows each
  plan.rows_per_split = ceil_div(bank_tiles, splits) * kTile;
  plan.splits = ceil_div(p.rows, plan.rows_per_split);
  plan.capacity = p.k <= 16 ? 256 : round_up(kTile + 6 * p.k, kTile);  // room for a tile and what survives
  auto take = [&](int64_t bytes) {
    const int64_t at = plan.bytes;
    plan.bytes += round_up(bytes, 256);
    return at;
  };
  const int64_t lists = plan.query_chunk * plan.splits, entries = lists * plan.capacity;
  plan.bank_bounds = take(plan.copy ? 0 : p.rows * sizeof(RowBound));
  plan.packed = take(plan.pack ? packed_bank_bytes(p.rows, p.dim) : 0);
  plan.query = take(plan.query_chunk * plan.row_bytes);
  plan.query_bounds = take(plan.query_chunk * sizeof(RowBound));
  plan.norms = take(plan.query_chunk * sizeof(double));
  plan.entries = take(entries * sizeof(Survivor));
  plan.count = take(lists * sizeof(int));
  plan.threshold = take(lists * sizeof(float));
  return plan;
}

template <class S>
int search_chunk(const NearestProblem& p, const Plan& plan, uint8_t* workspace, const Packed& bank_parts,
                 const HostMatrix& query, int64_t queries, float* scores, int64_t* indices, Stream stream) {
  auto buffer = [&](auto* type, int64_t offset, int64_t count, const char* name) {
    auto* at = reinterpret_cast<decltype(type)>(workspace + offset);
    name_buffer(at, count * sizeof(*type), name);
    return at;
  };
  const int64_t lists = queries * plan.splits, entries = lists * plan.capacity;
  uint8_t* screened = buffer((uint8_t*)nullptr, plan.query, queries * plan.row_bytes, "screened queries");
  RowBound* bounds = buffer((RowBound*)nullptr, plan.query_bounds, queries, "query bounds");
  double* norms = buffer((double*)nullptr, plan.norms, queries, "query norms");
  const Survivors survivors = {buffer((Survivor*)nullptr, plan.entries, entries, "survivors"),
                               buffer((int*)nullptr, plan.count, lists, "survivor counts"),
                               buffer((float*)nullptr, plan.threshold, lists, "thresholds"),
                               static_cast<int>(plan.capacity), static_cast<int>(plan.splits)};
  const unsigned row_blocks = static_cast<unsigned>(ceil_div(queries, kRowThreads / kWarpSize));
  if (int error = launch(stream, prepare_query_kernel<S>, dim3(row_blocks), kRowThreads, 0,
                         query.on_device(p.dim), queries, screened, plan.row_bytes, bounds, norms)) {
    return error;
  }
  const ScreenProblem screen = {
      {screened, queries, plan.row_bytes},
      {bank_parts.rows, p.rows, plan.row_bytes},
      bank_parts.header,
      bounds,
      bank_parts.bounds,
      plan.rows_per_split,
      p.k,
  };
  const dim3 grid(static_cast<unsigned>(ceil_div(queries, kTile)), static_cast<unsigned>(plan.splits));
  if (int error = launch(stream, screen_kernel<S>, grid, kTileThreads, kScreenSharedBytes, screen, survivors)) {
    return error;
  }
  const HostMatrix bank{p.bank, p.bank_type};
  const RescoreProblem rescore = {query.on_device(p.dim), bank.on_device(p.dim), p.rows, plan.rows_per_split,
                                  norms, p.k, scores, indices};
  return launch(stream, rescore_kernel, dim3(static_cast<unsigned>(queries)), kRescoreThreads,
                rescore_shared_bytes(p.dim), rescore, survivors);
}

}  // namespace

int64_t packed_bank_bytes(int64_t rows, int64_t dim) {
  return kHeaderBytes + rows * (static_cast<int64_t>(sizeof(RowBound)) + round_up(2 * dim, 16));
}

int64_t nearest_safe_workspace_bytes(const NearestProblem& problem) { return make_plan(problem).bytes; }

int pack_bank(const void* bank, DType bank_type, int64_t rows, int64_t dim, void* packed, void* stream) {
  const HostMatrix source{bank, bank_type};
  const Packed parts = packed_parts(packed, rows, dim);
  const unsigned blocks = static_cast<unsigned>(ceil_div(rows, kRowThreads / kWarpSize));
  return launch(static_cast<Stream>(stream), pack_rows_kernel, dim3(blocks), kRowThreads, 0,
                source.on_device(dim), rows, parts.rows, parts.row_bytes, parts.bounds, parts.header);
}

int nearest_safe(const NearestProblem& p, void* workspace, float* scores, int64_t* indices, void* stream) {
  const Plan plan = make_plan(p);
  uint8_t* base = static_cast<uint8_t*>(workspace);
  Packed bank_parts;
  if (plan.copy) {
    void* packed = plan.pack ? base + plan.packed : const_cast<void*>(p.packed);
    if (plan.pack) {
      name_buffer(packed, packed_bank_bytes(p.rows, p.dim), "packed bank");
      if (int error = pack_bank(p.bank, p.bank_type, p.rows, p.dim, packed, stream)) return error;
    }
    bank_parts = packed_parts(packed, p.rows, p.dim);
  } else {
    RowBound* bounds = reinterpret_cast<RowBound*>(base + plan.bank_bounds);
    bank_parts = {nullptr, static_cast<uint8_t*>(const_cast<void*>(p.bank)), bounds, plan.row_bytes};
    name_buffer(bounds, p.rows * sizeof(RowBound), "bank bounds");
    const unsigned blocks = static_cast<unsigned>(ceil_div(p.rows, kRowThreads / kWarpSize));
    if (int error = launch(static_cast<Stream>(stream), bound_rows_kernel, dim3(blocks), kRowThreads, 0,
                           HostMatrix{p.bank, p.bank_type}.on_device(p.dim), p.rows, bounds)) {
      return error;
    }
  }
  auto* search = !plan.copy && p.bank_type == DType::kBFloat16 ? search_chunk<bf16> : search_chunk<fp16>;
  for (int64_t first = 0; first < p.queries; first += plan.query_chunk) {
    const int64_t count = p.queries - first < plan.query_chunk ? p.queries - first : plan.query_chunk;
    const HostMatrix query{static_cast<const uint8_t*>(p.query) + first * p.dim * element_size(p.query_type),
                           p.query_type};
    if (int error = search(p, plan, base, bank_parts, query, count, scores + first * p.k, indices + first * p.k,
                           static_cast<Stream>(stream))) {
      return error;
    }
  }
  return 0;
}

}  // namespace saferclip
