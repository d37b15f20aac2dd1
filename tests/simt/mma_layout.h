// Which lane holds which matrix element in mma.sync and ldmatrix (PTX ISA, "Matrix fragments").
// Everything is in bytes along K, so m16n8k16 of 2-byte types and m16n8k32 of int8 are one layout:
// A is 16 rows x 32 bytes, B is 8 columns x 32 bytes. test_layouts.cpp checks this against CuTe.
#pragma once

namespace simt {

struct Element {
  int row;   // row of A or C, column of B
  int byte;  // byte along K for A and B; column for C
};

constexpr Element a_element(int lane, int reg, int byte_in_reg) {
  return {lane / 4 + 8 * (reg % 2), (lane % 4) * 4 + 16 * (reg / 2) + byte_in_reg};
}
constexpr Element b_element(int lane, int reg, int byte_in_reg) {
  return {lane / 4, (lane % 4) * 4 + 16 * reg + byte_in_reg};
}
constexpr Element c_element(int lane, int reg) {
  return {lane / 4 + 8 * (reg / 2), (lane % 4) * 2 + reg % 2};
}
// ldmatrix.x4: register `reg` of a lane holds 4 bytes of row lane/4 of matrix `reg`, whose row r was
// pointed to by lane 8 * reg + r.
constexpr int ldmatrix_source_lane(int lane, int reg) { return 8 * reg + lane / 4; }
constexpr int ldmatrix_source_byte(int lane) { return lane % 4 * 4; }

}  // namespace simt
