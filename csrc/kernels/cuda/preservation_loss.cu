// Launcher of preservation_loss: lays out the workspace and queues the kernels.
#include "preservation_loss.cuh"

#include <cstring>

namespace saferclip {
namespace {

enum Input {
  kText,
  kImage,
  kFrozenText,
  kFrozenImage,
};

struct Plan {
  DType type;            // of the products: the inputs' own, or fp32 if they differ
  int64_t row_bytes;     // of the operands
  int64_t splits, columns_per_split;
  int64_t chunk_rows;    // rows of P + C - 2 I stored at a time
  int64_t batch_bytes;   // of a row of `batch` elements of `type`
  int64_t bytes = 0;     // of the workspace; the rest are offsets into it
  int64_t inverse, scale, cosine, diagonal, row_softmax, column_softmax, partial, row_terms, copies;
  int64_t transposed, weights, product;
};

HostMatrix input_matrix(const PreservationProblem& p, int input) {
  const void* data[] = {p.text, p.image, p.frozen_text, p.frozen_image};
  const DType types[] = {p.type, p.type, p.frozen_text_type, p.frozen_image_type};
  return {data[input], types[input]};
}

Plan make_plan(const PreservationProblem& p) {
  Plan plan;
  const bool one_type = p.frozen_text_type == p.type && p.frozen_image_type == p.type;
  plan.type = one_type ? p.type : DType::kFloat32;
  const int size = element_size(plan.type);
  plan.row_bytes = round_up(p.dim * size, 16);
  plan.batch_bytes = round_up(p.batch * size, 16);
  const int64_t tiles = ceil_div(p.batch, kTile), slots = 2 * static_cast<int64_t>(multiprocessor_count());
  int64_t splits = slots / tiles;
  splits = splits < 1 ? 1 : (splits > tiles ? tiles : splits);
  plan.columns_per_split = ceil_div(tiles, splits) * kTile;
  plan.splits = ceil_div(p.batch, plan.columns_per_split);
  const int64_t fit = p.slice_bytes / plan.batch_bytes / kTile * kTile;
  plan.chunk_rows = fit < kTile ? kTile : (fit < p.batch ? fit : p.batch);
  auto take = [&](int64_t bytes) {
    const int64_t at = plan.bytes;
    plan.bytes += round_up(bytes, 256);
    return at;
  };
  const int64_t column = p.batch * sizeof(float);
  plan.inverse = take(4 * column);
  plan.scale = take(4 * column);
  plan.cosine = take(2 * column);
  plan.diagonal = take(2 * column);
  plan.row_softmax = take(2 * 3 * column);  // Lse, others
  plan.column_softmax = take(2 * 3 * column);
  plan.partial = take(plan.splits * p.batch * sizeof(LogSum));
  plan.row_terms = take(p.batch * sizeof(Vec16));
  plan.copies = take(4 * p.batch * plan.row_bytes);
  plan.transposed = take(p.need_grad ? p.dim * plan.batch_bytes : 0);
  plan.weights = take(p.need_grad ? plan.chunk_rows * plan.batch_bytes : 0);
  plan.product = take(p.need_grad ? plan.chunk_rows * p.dim * sizeof(float) : 0);
  return plan;
}

// Everything that one call needs, with the workspace divided up.
struct Call {
  const PreservationProblem& p;
  const Plan plan;
  uint8_t* workspace;
  Stream stream;

  template <class T>
  T* buffer(int64_t offset, int64_t count, const char* name) const {
    T* at = reinterpret_cast<T*>(workspace + offset);
    if (count > 0) name_buffer(at, count * sizeof(T), name);
    return at;
  }
  unsigned row_blocks(int64_t rows) const {
    return static_cast<unsigned>(ceil_div(rows, kRowKernelThreads / kWarpSize));
  }
  unsigned thread_blocks() const { return static_cast<unsigned>(ceil_div(p.batch, kRowKernelThreads)); }
  Matrix matrix(int input) const { return input_matrix(p, input).on_device(p.dim); }
  // Of side 0 or 1; `offset` is that of both.
  Softmax softmax(int64_t offset, int side) const {
    const int64_t lse = p.batch * static_cast<int64_t>(sizeof(Lse)), share = p.batch * static_cast<int64_t>(sizeof(float));
    return {buffer<Lse>(offset + side * lse, p.batch, "log-sums"),
            buffer<float>(offset + 2 * lse + side * share, p.batch, "shares of the others")};
  }
};

// `diagonal` is written if `first`, and read either way: S and its transpose have the same.
template <class E>
int log_sum(const Call& call, const UnitRows& x, const UnitRows& y, bool first, float* diagonal, const Softmax& softmax) {
  const Plan& plan = call.plan;
  LogSum* partial = call.buffer<LogSum>(plan.partial, plan.splits * call.p.batch, "partial log-sums");
  const dim3 grid(static_cast<unsigned>(ceil_div(call.p.batch, kTile)), static_cast<unsigned>(plan.splits));
  if (int error = launch(call.stream, log_sum_kernel<E>, grid, kTileThreads, kLogSumSharedBytes, x, y,
                         call.p.logit_scale, plan.columns_per_split, partial, first ? diagonal : nullptr)) {
    return error;
  }
  return launch(call.stream, merge_splits_kernel, dim3(call.thread_blocks()), kRowKernelThreads, 0, partial,
                call.p.batch, static_cast<int>(plan.splits), diagonal, softmax);
}

// sum_j (P + C - 2 I) y_j for `count` rows, into the workspace; `transposed` holds y already.
template <class E>
int weighted_rows(const Call& call, const UnitRows& x, const UnitRows& y, const Softmax& of_row,
                  const Softmax& of_column, int64_t first_row, int64_t count, const uint8_t* transposed,
                  float* product) {
  const Plan& plan = call.plan;
  const int64_t batch = call.p.batch, dim = call.p.dim;
  uint8_t* weights = call.buffer<uint8_t>(plan.weights, count * plan.batch_bytes, "weights");
  const unsigned tiles = static_cast<unsigned>(ceil_div(count, kTile));
  if (int error = launch(call.stream, weights_kernel<E>, dim3(tiles, static_cast<unsigned>(ceil_div(batch, kTile))),
                         kTileThreads, kTileSharedBytes, x, y, call.p.logit_scale, of_row, of_column,
                         first_row, count, weights, plan.batch_bytes)) {
    return error;
  }
  return launch(call.stream, product_kernel<E>, dim3(tiles, static_cast<unsigned>(ceil_div(dim, kTile))),
                kTileThreads, kTileSharedBytes, Operand{weights, count, plan.batch_bytes},
                Operand{transposed, dim, plan.batch_bytes}, product);
}

// InfoNCE (if its weight is not 0) and the gradient of one side: 0 text, 1 image.
template <class E>
int one_side(const Call& call, int side, const UnitRows (&unit)[4], const Softmax& of_row, const Softmax& of_column,
             float* diagonal, void* grad) {
  const PreservationProblem& p = call.p;
  const Plan& plan = call.plan;
  const int other = side == kText ? kFrozenImage : kFrozenText, own = side == kText ? kFrozenText : kFrozenImage;
  const bool nce = p.weights[2 + side] != 0.0f;
  if (nce) {
    if (int error = log_sum<E>(call, unit[side], unit[other], true, diagonal, of_row)) return error;
    if (int error = log_sum<E>(call, unit[other], unit[side], false, diagonal, of_column)) return error;
  }
  if (!p.need_grad) return 0;
  uint8_t* transposed = nullptr;
  if (nce) {
    transposed = call.buffer<uint8_t>(plan.transposed, p.dim * plan.batch_bytes, "transposed rows");
    const int64_t padded = plan.batch_bytes / sizeof(E);
    const dim3 grid(static_cast<unsigned>(ceil_div(padded, kTransposeTile)),
                    static_cast<unsigned>(ceil_div(p.dim, kTransposeTile)));
    if (int error = launch(call.stream, transpose_kernel<E>, grid, kRowKernelThreads, kTransposeSharedBytes,
                           call.matrix(other), p.batch, unit[other].inverse, unit[other].scale, transposed,
                           plan.batch_bytes)) {
      return error;
    }
  }
  const int64_t step = nce ? plan.chunk_rows : p.batch;
  for (int64_t first = 0; first < p.batch; first += step) {
    const int64_t count = p.batch - first < step ? p.batch - first : step;
    float* product = nullptr;
    if (nce) {
      product = call.buffer<float>(plan.product, count * p.dim, "weighted rows");
      if (int error = weighted_rows<E>(call, unit[side], unit[other], of_row, of_column, first, count, transposed,
                                       product)) {
        return error;
      }
    }
    const float batch = static_cast<float>(p.batch);
    const FinishArguments finish = {call.matrix(side),
                                    call.matrix(own),
                                    unit[side].inverse,
                                    unit[side].scale,
                                    unit[own].inverse,
                                    unit[own].scale,
                                    product,
                                    first,
                                    count,
                                    p.weights[side] / batch,
                                    p.weights[2 + side] * p.logit_scale * 0.5f / batch,
                                    static_cast<uint8_t*>(grad)};
    if (int error = launch(call.stream, finish_kernel, dim3(call.row_blocks(count)), kRowKernelThreads, 0, finish)) {
      return error;
    }
  }
  return 0;
}

template <class E>
int run(const Call& call, float* loss, float* terms, void* grad_text, void* grad_image) {
  const PreservationProblem& p = call.p;
  const Plan& plan = call.plan;
  RowFacts facts;
  facts.row_bytes = plan.row_bytes;
  TermArguments arguments = {};
  float* diagonal[2];
  UnitRows unit[4];
  for (int i = 0; i < 4; ++i) {
    const int64_t column = i * p.batch * 4, rows = i * p.batch * plan.row_bytes;
    float* inverse = call.buffer<float>(plan.inverse + column, p.batch, "inverse norms");
    float* scale = call.buffer<float>(plan.scale + column, p.batch, "scales");
    uint8_t* copy = call.buffer<uint8_t>(plan.copies + rows, p.batch * plan.row_bytes, "padded rows");
    facts.inverse[i] = inverse, facts.scale[i] = scale, facts.copy[i] = copy;
    unit[i] = {{copy, p.batch, plan.row_bytes}, inverse, scale};
  }
  Softmax of_row[2], of_column[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t column = i * p.batch * 4;
    float* cosine = call.buffer<float>(plan.cosine + column, p.batch, "cosines");
    diagonal[i] = call.buffer<float>(plan.diagonal + column, p.batch, "diagonal");
    of_row[i] = call.softmax(plan.row_softmax, i), of_column[i] = call.softmax(plan.column_softmax, i);
    facts.cosine[i] = cosine, arguments.cosine[i] = cosine;
    if (p.weights[2 + i] == 0.0f) continue;
    arguments.row_lse[i] = of_row[i].lse, arguments.column_lse[i] = of_column[i].lse;
    arguments.diagonal[i] = diagonal[i];
  }
  if (int error = launch(call.stream, row_facts_kernel<E>, dim3(call.row_blocks(p.batch)), kRowKernelThreads, 0,
                         call.matrix(kText), call.matrix(kImage), call.matrix(kFrozenText), call.matrix(kFrozenImage),
                         p.batch, facts)) {
    return error;
  }
  for (int side = 0; side < 2; ++side) {
    void* grad = side == kText ? grad_text : grad_image;
    if (int error = one_side<E>(call, side, unit, of_row[side], of_column[side], diagonal[side], grad)) return error;
  }
  Vec16* row_terms = call.buffer<Vec16>(plan.row_terms, p.batch, "row terms");
  arguments.batch = p.batch, arguments.row_terms = row_terms;
  if (int error = launch(call.stream, row_terms_kernel, dim3(call.thread_blocks()), kRowKernelThreads, 0, arguments)) {
    return error;
  }
  Vec16 weights;
  std::memcpy(&weights, p.weights, sizeof(weights));
  return launch(call.stream, reduce_terms_kernel, dim3(1), kReduceThreads, kReduceSharedBytes, row_terms, p.batch,
                1.0 / static_cast<double>(p.batch), weights, loss, terms);
}

}  // namespace

int64_t preservation_loss_workspace_bytes(const PreservationProblem& problem) { return make_plan(problem).bytes; }

int preservation_loss(const PreservationProblem& problem, void* workspace, float* loss, float* terms,
                      void* grad_text, void* grad_image, void* stream) {
  const Call call = {problem, make_plan(problem), static_cast<uint8_t*>(workspace), static_cast<Stream>(stream)};
  auto* run_typed = call.plan.type == DType::kFloat32    ? run<float>
                    : call.plan.type == DType::kBFloat16 ? run<bf16>
                                                         : run<fp16>;
  return run_typed(call, loss, terms, grad_text, grad_image);
}

}  // namespace saferclip
