# The CPU kernels: torch-free, the inner loops once per instruction set. Sets SAFERCLIP_CPU_KERNELS to the
# object libraries that a target links.
set(SAFERCLIP_CPU_DIR ${CMAKE_CURRENT_LIST_DIR})
# Contraction: fused multiply-adds where the ISA has them. No -ffast-math: the bounds rely on IEEE rounding.
# GCC 12's AVX-512 intrinsics set off the two uninitialized warnings themselves.
if(NOT SAFERCLIP_CPU_OPTIMIZE)
  set(SAFERCLIP_CPU_OPTIMIZE -O3)
endif()
set(SAFERCLIP_CPU_OPTIONS
  -Wall -Wextra -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized
  ${SAFERCLIP_CPU_OPTIMIZE} -ffp-contract=fast -fno-math-errno -fno-trapping-math)

add_library(saferclip_cpu_host OBJECT
  ${SAFERCLIP_CPU_DIR}/info_nce.cpp
  ${SAFERCLIP_CPU_DIR}/isa/dispatch.cpp
  ${SAFERCLIP_CPU_DIR}/nearest_safe.cpp
  ${SAFERCLIP_CPU_DIR}/neighbor_hinge.cpp
  ${SAFERCLIP_CPU_DIR}/packed_bank.cpp
  ${SAFERCLIP_CPU_DIR}/preservation_loss.cpp
  ${SAFERCLIP_CPU_DIR}/retarget_loss.cpp
  ${SAFERCLIP_CPU_DIR}/small_bank.cpp)
target_include_directories(saferclip_cpu_host PRIVATE ${SAFERCLIP_CPU_DIR}/../..)
target_compile_options(saferclip_cpu_host PRIVATE ${SAFERCLIP_CPU_OPTIONS})
set(SAFERCLIP_CPU_KERNELS saferclip_cpu_host)

function(saferclip_isa name table)
  add_library(saferclip_cpu_${name} OBJECT
    ${SAFERCLIP_CPU_DIR}/isa/preservation.cpp
    ${SAFERCLIP_CPU_DIR}/isa/product.cpp
    ${SAFERCLIP_CPU_DIR}/isa/quantize.cpp
    ${SAFERCLIP_CPU_DIR}/isa/retarget.cpp
    ${SAFERCLIP_CPU_DIR}/isa/screen.cpp
    ${SAFERCLIP_CPU_DIR}/isa/table.cpp)
  target_include_directories(saferclip_cpu_${name} PRIVATE ${SAFERCLIP_CPU_DIR}/../..)
  target_compile_options(saferclip_cpu_${name} PRIVATE ${SAFERCLIP_CPU_OPTIONS} ${ARGN})
  target_compile_definitions(saferclip_cpu_${name} PRIVATE
    SAFERCLIP_NAME="${name}" SAFERCLIP_NAMESPACE=isa_${name} SAFERCLIP_TABLE=${table})
  set(SAFERCLIP_CPU_KERNELS ${SAFERCLIP_CPU_KERNELS} saferclip_cpu_${name} PARENT_SCOPE)
endfunction()

saferclip_isa(generic kKernelsGeneric)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(SAFERCLIP_AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c)
  saferclip_isa(avx2 kKernelsAvx2 -mavx2 -mfma -mf16c)
  saferclip_isa(avx512 kKernelsAvx512 ${SAFERCLIP_AVX512})
  saferclip_isa(avx512vnni kKernelsAvx512Vnni ${SAFERCLIP_AVX512} -mavx512vnni)
endif()
