// Fills the table of one instruction set. Compiled once for each.
#include "isa.h"

namespace saferclip::cpu {

using namespace SAFERCLIP_NAMESPACE;

const Kernels SAFERCLIP_TABLE = {
    SAFERCLIP_NAME, screen_int8,   screen_fp32,    quantize,    quantize_query, exact_dot,       widen,
    accumulate,     retarget_rows, multiply_panel, log_sum_exp, softmax_sum,    preservation_row,
};

}  // namespace saferclip::cpu
