// The functions that exist once per instruction set, and the table that picks among them.
#pragma once
#include <cstdint>
#include <vector>

#include "matrix.h"
#include "retarget_loss.h"

namespace saferclip::cpu {

constexpr int kPanelRows = 32;   // bank rows scored together; two AVX-512 vectors
constexpr int kRetargetScratchRows = 6;
constexpr int kGroupSize = 12;   // queries scored together; 12 x 2 accumulators fill the registers

// What the screening bound needs of a query; one array element per query of a group.
// With unit query q = scale * q8 + e and bank row s = mean + step * s8 + f,
//   <q,s> <= base + shift * <mean,s'> + scale * step * <q8,s8> + error * |s'| + norm * |f|,
// every factor but `base` and `scale` already divided by `scale`.
struct GroupTerms {
  float shift[kGroupSize];
  float error[kGroupSize];
  float norm[kGroupSize];
  float scale[kGroupSize];
  double base[kGroupSize];
  int32_t bias[kGroupSize];  // -128 * sum(q8): undoes the unsigned storage of s8
};

// One 32-row panel of a packed bank starts with these, then bytes [dim/4][32][4], each s8 + 128.
struct PanelTerms {
  float step[kPanelRows];
  float mean_dot[kPanelRows];
  float norm[kPanelRows];   // >= |s'|
  float error[kPanelRows];  // >= |s' - step * s8|
};

// A pair that may belong to the result: lower <= score <= upper.
struct Hit {
  float upper;
  float lower;
  int32_t query;  // inside its group
  int32_t row;    // inside its panel
};

using HitSink = void (*)(void* context, int64_t group, const Hit* hits, int count);

struct ScreenArgs {
  int64_t dim;
  const GroupTerms* terms;   // [groups], null for exact-width screening
  const void* queries;       // int8 [groups][dim/4][12][4], or float unit rows [groups * 12][dim]
  const float* thresholds;   // [groups * 12], read again for each panel; in units of scale for int8
  int64_t queries_count;
  const uint8_t* next_panel; // int8: what will be screened next, or null
  float slack;               // relative rounding error of an fp32 dot product of this width
  HitSink sink;
  void* context;
};

struct Kernels {
  const char* name;
  // Panel of int8 rows against all groups.
  void (*screen_int8)(const uint8_t* panel, int rows, const ScreenArgs& args);
  // Up to 32 rows as they are against all groups.
  void (*screen_fp32)(const void* rows, DType dtype, int count, const ScreenArgs& args);
  // Quantizes up to 32 rows into a panel.
  void (*quantize)(const void* rows, DType dtype, int count, int64_t dim, const float* mean,
                   float slack, float* scratch, uint8_t* panel);  // scratch [dim + 16]
  // Quantizes query (double [dim], of length norm) around the bank's mean into element `slot` of a
  // group; scratch holds dim + 16 doubles.
  void (*quantize_query)(const double* query, double norm, const float* mean, double mean_square,
                         int64_t dim, float slack, double* scratch, int slot, int8_t* group,
                         GroupTerms* terms);
  // Writes, in ascending order, the rows that may belong to the k best of a query of length norm, and
  // returns their number. dots [count, with room up to a multiple of 16] are within error of <query, row>.
  int64_t (*top_rows)(float* dots, int64_t count, int k, double error, double norm, int32_t* rows);
  // <query, row> in double, in an order of additions that is the same on every ISA.
  double (*exact_dot)(const double* query, const void* row, DType dtype, int64_t dim);
  // out = row in double; returns its squared length, added up as exact_dot does.
  double (*widen)(const void* row, DType dtype, int64_t dim, double* out);
  void (*accumulate)(const void* row, DType dtype, int64_t dim, float* sum);
  // Rows [begin, end) of the retargeting loss; adds its four weighted terms to sums. scratch holds
  // kRetargetScratchRows rows of dim + 16 floats.
  void (*retarget_rows)(const RetargetArgs& args, int64_t begin, int64_t end, double* sums,
                        float* scratch);
  // dots[m * dots_stride + r] = <query m, row r> in fp32 for up to 32 rows; room for 3 rows more.
  // squares[r] = <row r, row r> unless null. Any order of additions.
  void (*dot_rows)(const void* rows, DType dtype, int count, int64_t dim, const float* queries,
                   int64_t query_stride, int queries_count, float* dots, int64_t dots_stride,
                   float* squares);
  // panel [dim][32] = scale times up to 32 rows, transposed, zeros behind the last.
  void (*transpose_panel)(const void* rows, DType dtype, int count, int64_t dim, float scale,
                          float* panel);
  // c [rows, columns] (+)= a [rows, depth] times panel [depth][32], of which columns <= 32 count.
  void (*multiply_panel)(const float* a, int64_t rows, int64_t a_stride, const float* panel,
                         int64_t depth, float* c, int64_t c_stride, int columns, bool accumulate);
  // Log-sum-exps of a tile of logits [rows, columns], each a largest value and a sum of
  // exp(logit - largest): those of its rows are merged into running ones, those of its columns written.
  void (*log_sum_exp)(const float* tile, int64_t rows, int64_t columns, float* row_largest,
                      float* row_sum, float* column_largest, float* column_sum);
  // out = exp(tile - row_lse) + exp(tile - column_lse), in place or not, each log-sum-exp given as
  // largest + log: near a softmax of 1 the sum of the two would round the difference away.
  void (*softmax_sum)(const float* tile, int64_t rows, int64_t columns, const float* row_largest,
                      const float* row_log, const float* column_largest, const float* column_log,
                      float* out);
  // Returns <unit, own>; unless grad is null writes the gradient through the normalization of
  // g = pull * own + push * (mixed - 2 * paired), where mixed and paired may be null together.
  double (*preservation_row)(const float* unit, const float* own, const float* mixed,
                             const float* paired, float pull, float push, float inverse_norm,
                             int64_t dim, DType dtype, void* grad);
};

extern const Kernels kKernelsGeneric;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
extern const Kernels kKernelsAvx512Vnni;
#endif

// The tables that this CPU can run, best first.
std::vector<const Kernels*> usable_kernels();

// The best table for this CPU, or the one that SAFERCLIP_FAST_ISA names. Throws std::runtime_error
// if the name is unknown or the CPU lacks it.
const Kernels& kernels();

}  // namespace saferclip::cpu
