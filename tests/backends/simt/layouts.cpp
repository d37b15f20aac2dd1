// Lane layouts of the emulation against CuTe's constexpr layouts (headers of the nvidia-cutlass package).
// Prints every element that differs; the exit code is their number.
#include <cstdio>

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

#include "mma_layout.h"

namespace {

int differences = 0;

void expect(const char* what, int lane, int value, int row, int column, int cute_index, int cute_rows) {
  if (row == cute_index % cute_rows && column == cute_index / cute_rows) return;
  ++differences;
  std::printf("%s lane %d value %d: here (%d, %d), CuTe (%d, %d)\n", what, lane, value, row, column,
              cute_index % cute_rows, cute_index / cute_rows);
}

// CuTe's layouts map (lane, value) to row + rows * column.
template <class Op>
void check_mma(const char* name) {
  using Traits = cute::MMA_Traits<Op>;
  typename Traits::ALayout a;
  typename Traits::BLayout b;
  typename Traits::CLayout c;
  static_assert(cute::size<0>(a) == 32 && cute::size<0>(b) == 32 && cute::size<0>(c) == 32);
  static_assert(cute::size<1>(a) == 8 && cute::size<1>(b) == 4 && cute::size<1>(c) == 4);
  std::printf("%s\n", name);
  for (int lane = 0; lane < 32; ++lane) {
    for (int value = 0; value < 8; ++value) {
      const auto e = simt::a_element(lane, value / 2, value % 2);
      expect("A", lane, value, e.row, e.column, a(lane, value), 16);
    }
    for (int value = 0; value < 4; ++value) {
      const auto e = simt::b_element(lane, value / 2, value % 2);
      expect("B", lane, value, e.row, e.column, b(lane, value), 8);
      const auto f = simt::c_element(lane, value);
      expect("C", lane, value, f.row, f.column, c(lane, value), 16);
    }
  }
}

// ldmatrix.x4: source (lane, bit) and destination (lane, bit) are laid over the same bits.
void check_ldmatrix() {
  using Traits = cute::Copy_Traits<cute::SM75_U32x4_LDSM_N>;
  typename Traits::SrcLayout source;
  typename Traits::DstLayout destination;
  std::printf("ldmatrix.x4\n");
  for (int lane = 0; lane < 32; ++lane) {
    for (int reg = 0; reg < 4; ++reg) {
      for (int bit = 0; bit < 32; ++bit) {
        const int from = simt::ldmatrix_source_lane(lane, reg);
        const int from_bit = simt::ldmatrix_source_byte(lane) * 8 + bit;
        const int here = source(from, from_bit), cute_bit = destination(lane, reg * 32 + bit);
        if (here == cute_bit) continue;
        ++differences;
        std::printf("ldmatrix lane %d register %d bit %d: here %d, CuTe %d\n", lane, reg, bit, here, cute_bit);
      }
    }
  }
}

}  // namespace

int main() {
  check_mma<cute::SM80_16x8x16_F32F16F16F32_TN>("m16n8k16 f16");
  check_mma<cute::SM80_16x8x16_F32BF16BF16F32_TN>("m16n8k16 bf16");
  check_ldmatrix();
  std::printf("%d differences\n", differences);
  return differences != 0;
}
