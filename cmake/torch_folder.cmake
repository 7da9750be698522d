# Where torch is, and which. Read by the build and by the installed package.
#
# Out: Torch_DIR, TORCH_INSTALL_PREFIX, Torch_VERSION, and TORCHMOE_TORCH_PROBLEM, empty unless there is one

set(TORCHMOE_TORCH_PROBLEM "")
# The variable and the places of find_package(Torch).
find_path(Torch_DIR TorchConfig.cmake PATH_SUFFIXES Torch share/cmake/Torch)
if(NOT Torch_DIR)
  set(TORCHMOE_TORCH_PROBLEM "CMAKE_PREFIX_PATH must lead to torch, got \"${CMAKE_PREFIX_PATH}\": \
python -c 'import torch; print(torch.utils.cmake_prefix_path)' prints what to add")
  return()
endif()
get_filename_component(TORCH_INSTALL_PREFIX "${Torch_DIR}/../../.." ABSOLUTE)
include("${Torch_DIR}/TorchConfigVersion.cmake")
set(Torch_VERSION "${PACKAGE_VERSION}")
