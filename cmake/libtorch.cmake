# torchmoe::libtorch: what the library links of torch. Read by the build and by the installed package.
#
# A library without CUDA needs c10 and torch_cpu alone, which every build of torch carries. find_package(Torch) asks for more: of a CUDA
# build of torch it wants the whole CUDA toolkit. So the targets are made here of the files in torch's own folder. With CUDA they are those
# of find_package(Torch).
#
# In:  TORCHMOE_CUDA, TORCH_INSTALL_PREFIX

if(TARGET torchmoe::libtorch)
  return()
endif()
add_library(torchmoe::libtorch INTERFACE IMPORTED)
if(TORCHMOE_CUDA)
  find_package(Torch REQUIRED)
  # The two targets, and not ${TORCH_LIBRARIES}, which would export an absolute path.
  target_link_libraries(torchmoe::libtorch INTERFACE torch torch_library)
else()
  foreach(name c10 torch_cpu)
    add_library(torchmoe::${name} SHARED IMPORTED)
    set_target_properties(torchmoe::${name} PROPERTIES IMPORTED_LOCATION "${TORCH_INSTALL_PREFIX}/lib/lib${name}.so")
    target_link_libraries(torchmoe::libtorch INTERFACE torchmoe::${name})
  endforeach()
  # What torch_cpu itself needs, such as CUDA's runtime, the loader finds next to it.
  target_link_options(torchmoe::libtorch INTERFACE LINKER:--allow-shlib-undefined)
  target_include_directories(torchmoe::libtorch INTERFACE
    "${TORCH_INSTALL_PREFIX}/include"
    "${TORCH_INSTALL_PREFIX}/include/torch/csrc/api/include"
  )
  target_compile_features(torchmoe::libtorch INTERFACE cxx_std_20)
endif()
