# Whether the CUDA toolkit is whole: nvcc and what find_package(Torch) asks for of a CUDA build of torch. Read by the build and by the
# installed package.
#
# Out: TORCHMOE_TOOLKIT_PROBLEM, which toolkit there is instead, empty where it is whole

set(TORCHMOE_TOOLKIT_PROBLEM "")
set(_torchmoe_level "${CMAKE_MESSAGE_LOG_LEVEL}")
set(CMAKE_MESSAGE_LOG_LEVEL WARNING)  # it looks for threads aloud
find_package(CUDAToolkit QUIET)
set(CMAKE_MESSAGE_LOG_LEVEL "${_torchmoe_level}")
if(NOT CUDAToolkit_FOUND OR NOT EXISTS "${CUDAToolkit_NVCC_EXECUTABLE}")
  set(TORCHMOE_TOOLKIT_PROBLEM "no CUDA toolkit")
else()
  foreach(_torchmoe_name cudart cublas cufft curand nvrtc)
    if(NOT TARGET CUDA::${_torchmoe_name})
      string(APPEND TORCHMOE_TOOLKIT_PROBLEM " ${_torchmoe_name}")
    endif()
  endforeach()
  if(TORCHMOE_TOOLKIT_PROBLEM)
    set(TORCHMOE_TOOLKIT_PROBLEM "a CUDA toolkit in ${CUDAToolkit_TARGET_DIR} without${TORCHMOE_TOOLKIT_PROBLEM}")
  endif()
endif()
