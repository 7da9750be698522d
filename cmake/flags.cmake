# The flags of every target of ours; torch's headers are system headers and stay out of the warnings.
#
# Out: torchmoe_flags, to be linked

option(TORCHMOE_WERROR "Stop at a compiler's warning, for development" OFF)

add_library(torchmoe_flags INTERFACE)
target_compile_options(torchmoe_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>
)
if(TORCHMOE_WERROR)
  target_compile_options(torchmoe_flags INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Werror>
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Werror>
    "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Werror all-warnings>"
  )
endif()
