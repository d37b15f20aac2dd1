// What every per-ISA source file defines, in a namespace of its own (SAFERCLIP_NAMESPACE).
#pragma once
#include "kernels/cpu/kernels.h"

namespace saferclip::cpu::SAFERCLIP_NAMESPACE {

void screen_int8(const uint8_t* panel, int rows, const ScreenArgs& args);
void screen_fp32(const void* rows, DType dtype, int count, const ScreenArgs& args);
void quantize(const void* rows, DType dtype, int count, int64_t dim, const float* mean, float slack,
              float* scratch, uint8_t* panel);
void quantize_query(const double* query, double norm, const float* mean, double mean_square,
                    int64_t dim, float slack, double* scratch, int slot, int8_t* group,
                    GroupTerms* terms);
double exact_dot(const double* query, const void* row, DType dtype, int64_t dim);
double widen(const void* row, DType dtype, int64_t dim, double* out);
void accumulate(const void* row, DType dtype, int64_t dim, float* sum);
void retarget_rows(const RetargetArgs& args, int64_t begin, int64_t end, double* sums, float* scratch);
int64_t top_rows(float* dots, int64_t count, int k, double error, double norm, int32_t* rows);
void dot_rows(const void* rows, DType dtype, int count, int64_t dim, const float* queries,
              int64_t query_stride, int queries_count, float* dots, int64_t dots_stride, float* squares);
void transpose_panel(const void* rows, DType dtype, int count, int64_t dim, float scale, float* panel);
void multiply_panel(const float* a, int64_t rows, int64_t a_stride, const float* panel, int64_t depth,
                    float* c, int64_t c_stride, int columns, bool accumulate);
void log_sum_exp(const float* tile, int64_t rows, int64_t columns, float* row_largest,
                 float* row_sum, float* column_largest, float* column_sum);
void softmax_sum(const float* tile, int64_t rows, int64_t columns, const float* row_largest,
                 const float* row_log, const float* column_largest, const float* column_log, float* out);
double preservation_row(const float* unit, const float* own, const float* mixed, const float* paired,
                        float pull, float push, float inverse_norm, int64_t dim, DType dtype,
                        void* grad);

}  // namespace saferclip::cpu::SAFERCLIP_NAMESPACE
