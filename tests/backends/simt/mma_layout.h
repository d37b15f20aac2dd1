// Which lane holds which matrix element in mma.sync.m16n8k16 of 16-bit types and in ldmatrix (PTX ISA,
// "Matrix fragments"). layouts.cpp checks this against CuTe, element by element.
#pragma once

namespace simt {

struct Element {
  int row;     // of A or C; for B its column (B is stored by columns)
  int column;  // along the depth for A and B
};

constexpr Element a_element(int lane, int reg, int half) {
  return {lane / 4 + 8 * (reg % 2), lane % 4 * 2 + 8 * (reg / 2) + half};
}
constexpr Element b_element(int lane, int reg, int half) { return {lane / 4, lane % 4 * 2 + 8 * reg + half}; }
constexpr Element c_element(int lane, int reg) { return {lane / 4 + 8 * (reg / 2), lane % 4 * 2 + reg % 2}; }

// ldmatrix.x4: register `reg` of a lane holds 4 bytes of row lane/4 of matrix `reg`, whose row r was
// pointed to by lane 8 * reg + r.
constexpr int ldmatrix_source_lane(int lane, int reg) { return 8 * reg + lane / 4; }
constexpr int ldmatrix_source_byte(int lane) { return lane % 4 * 4; }

}  // namespace simt
