// 16-bit float conversions of the emulation against the host functions of the CUDA headers, bit by bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdio>
#include <cstring>

#include "numeric.h"

namespace {

int differences = 0;

template <class T>
uint16_t bits_of(T x) {
  uint16_t bits;
  std::memcpy(&bits, &x, 2);
  return bits;
}
template <class T>
T from_bits(uint16_t bits) {
  T x;
  std::memcpy(&x, &bits, 2);
  return x;
}

void expect(const char* what, uint32_t input, uint32_t here, uint32_t cuda) {
  if (here == cuda) return;
  if (++differences < 20) std::printf("%s of %08x: here %08x, CUDA %08x\n", what, input, here, cuda);
}

void check_float(uint32_t bits) {
  const float x = std::bit_cast<float>(bits);
  expect("bf16", bits, simt::float_to_bf16(x), bits_of(__float2bfloat16_rn(x)));
  expect("fp16", bits, simt::float_to_fp16(x), bits_of(__float2half_rn(x)));
}

}  // namespace

int main() {
  for (uint32_t i = 0; i < 65536; ++i) {
    const auto b = static_cast<uint16_t>(i);
    const float bf = __bfloat162float(from_bits<__nv_bfloat16>(b)), half = __half2float(from_bits<__half>(b));
    if (bf == bf) expect("bf16 to float", i, std::bit_cast<uint32_t>(simt::bf16_to_float(b)), std::bit_cast<uint32_t>(bf));
    if (half == half) expect("fp16 to float", i, std::bit_cast<uint32_t>(simt::fp16_to_float(b)), std::bit_cast<uint32_t>(half));
    // Every upper half with the lower halves where rounding turns, and a spread of others.
    for (uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) check_float(i << 16 | low);
  }
  for (uint64_t i = 0; i < (uint64_t(1) << 32); i += 4099) check_float(static_cast<uint32_t>(i));
  // fp16 turns at bit 12: every 13-bit tail around the ties of all fp16 numbers.
  for (uint32_t i = 0; i < (1u << 20); ++i) {
    for (uint32_t low : {0u, 0x7ffu, 0x800u, 0x801u, 0xfffu}) check_float(i << 12 | low);
  }
  std::printf("%d differences\n", differences);
  return differences != 0;
}
