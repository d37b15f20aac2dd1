// Fills the table of one instruction set. Compiled once for each.
#include "isa.h"

namespace saferclip::cpu {

using namespace SAFERCLIP_NAMESPACE;

const Kernels SAFERCLIP_TABLE = {
    .name = SAFERCLIP_NAME,
    .screen_int8 = screen_int8,
    .screen_fp32 = screen_fp32,
    .quantize = quantize,
    .quantize_query = quantize_query,
    .top_rows = top_rows,
    .exact_dot = exact_dot,
    .widen = widen,
    .accumulate = accumulate,
    .retarget_rows = retarget_rows,
    .dot_rows = dot_rows,
    .transpose_panel = transpose_panel,
    .multiply_panel = multiply_panel,
    .log_sum_exp = log_sum_exp,
    .softmax_sum = softmax_sum,
    .preservation_row = preservation_row,
};

}  // namespace saferclip::cpu
