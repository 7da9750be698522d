# Where torch is, and which. Read by the build and by the installed package.
#
# Out: Torch_DIR, TORCH_INSTALL_PREFIX, Torch_VERSION; TORCHMOE_TORCH_ABI, what torch says of its C++ ABI, empty where it says nothing; and
#      TORCHMOE_PROBLEM, a sentence, empty unless there is one

set(TORCHMOE_PROBLEM "")
# The variable and the places of find_package(Torch).
find_path(Torch_DIR TorchConfig.cmake PATH_SUFFIXES Torch share/cmake/Torch)
if(NOT Torch_DIR)
  set(_torchmoe_path "\"${CMAKE_PREFIX_PATH}\"")
  if(NOT "$ENV{CMAKE_PREFIX_PATH}" STREQUAL "")
    string(APPEND _torchmoe_path " and \"$ENV{CMAKE_PREFIX_PATH}\" in the environment")
  endif()
  # CMake wraps no line that begins with a space: the command can be copied.
  set(TORCHMOE_PROBLEM "CMAKE_PREFIX_PATH must lead to torch, got ${_torchmoe_path}: add to it the output of
  python -c 'import torch; print(torch.utils.cmake_prefix_path)'")
  return()
endif()
get_filename_component(TORCH_INSTALL_PREFIX "${Torch_DIR}/../../.." ABSOLUTE)
include("${Torch_DIR}/TorchConfigVersion.cmake")
set(Torch_VERSION "${PACKAGE_VERSION}")

# Torch's flags, read without find_package(Torch), which may want a CUDA toolkit. Newer ones have none.
set(TORCHMOE_TORCH_ABI "")
file(STRINGS "${Torch_DIR}/TorchConfig.cmake" _torchmoe_flags REGEX "^[^#]*_GLIBCXX_USE_CXX11_ABI=[01]")
if(_torchmoe_flags MATCHES "_GLIBCXX_USE_CXX11_ABI=[01]")
  set(TORCHMOE_TORCH_ABI "${CMAKE_MATCH_0}")
endif()

foreach(_torchmoe_library c10 torch_cpu)
  if(NOT EXISTS "${TORCH_INSTALL_PREFIX}/lib/lib${_torchmoe_library}.so")
    set(TORCHMOE_PROBLEM "torch must have its shared libraries in ${TORCH_INSTALL_PREFIX}/lib, got no lib${_torchmoe_library}.so there: \
put first on CMAKE_PREFIX_PATH a torch as pip installs it")
    unset(Torch_DIR CACHE)  # so that the next run looks again
    return()
  endif()
endforeach()
