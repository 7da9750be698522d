# _build.py: how the library is built, for bug reports and for _library.py, which must know before it may load anything.
find_package(OpenMP REQUIRED COMPONENTS CXX)  # for the date of its specification
string(REPLACE GNU GCC TORCHMOE_COMPILER "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
set(TORCHMOE_CUDA_VERSION none)
if(TORCHMOE_CUDA)
  set(TORCHMOE_CUDA_VERSION ${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR})
endif()
configure_file(cmake/_build.py.in ${PROJECT_BINARY_DIR}/_build.py @ONLY)
