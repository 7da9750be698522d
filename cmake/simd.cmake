# The room csrc/cpu/simd, compiled once for each instruction set.
#
# In:  torchmoe_flags
# Out: TORCHMOE_SIMD_OBJECTS; torchmoe_add_simd() and torchmoe_add_tiles(), for one more set

# The objects torchmoe_<instruction set>, which see neither torch's headers nor the precompiled one.
function(torchmoe_add_simd instruction_set)
  set(_room "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../csrc")
  set(_target torchmoe_${instruction_set})
  add_library(${_target} OBJECT
    ${_room}/cpu/simd/activation.cpp
    ${_room}/cpu/simd/product.cpp
    ${_room}/cpu/simd/softmax.cpp
    ${_room}/cpu/simd/table.cpp
    ${_room}/cpu/simd/weighted_sum.cpp
  )
  target_include_directories(${_target} PRIVATE ${_room})
  target_compile_definitions(${_target} PRIVATE TORCHMOE_INSTRUCTION_SET=${instruction_set})
  # A multiplication and an addition become one instruction whatever the compiler's default is.
  target_compile_options(${_target} PRIVATE -O3 -ffp-contract=fast ${ARGN})
  target_link_libraries(${_target} PRIVATE torchmoe_flags)
  set(TORCHMOE_SIMD_OBJECTS ${TORCHMOE_SIMD_OBJECTS} $<TARGET_OBJECTS:${_target}> PARENT_SCOPE)
endfunction()

# The set multiplies bfloat16 on the tile registers that the header has.
function(torchmoe_add_tiles instruction_set header)
  target_sources(torchmoe_${instruction_set} PRIVATE
    ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../csrc/cpu/simd/tile_product.cpp)
  target_compile_definitions(torchmoe_${instruction_set} PRIVATE TORCHMOE_TILES="${header}")
endfunction()

torchmoe_add_simd(baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(TORCHMOE_AVX2 -mavx2 -mfma -mf16c)
  set(TORCHMOE_AVX512 ${TORCHMOE_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
  torchmoe_add_simd(avx2 ${TORCHMOE_AVX2})
  torchmoe_add_simd(avx512 ${TORCHMOE_AVX512})
  torchmoe_add_simd(avx512_bf16 ${TORCHMOE_AVX512} -mavx512bf16)
  torchmoe_add_simd(amx ${TORCHMOE_AVX512} -mavx512bf16)
  torchmoe_add_tiles(amx cpu/simd/tiles.h)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  torchmoe_add_simd(neon_bf16 -march=armv8.2-a+bf16)
endif()
