# ccache where it is present. With a precompiled header it hits only when told that the header's time stamps and macros do not
# matter and when the compiler preprocesses the header.
find_program(CCACHE_PROGRAM ccache)
find_program(ENV_PROGRAM env)  # not CMake's own, with which another CMake would compile everything again
if(CCACHE_PROGRAM AND ENV_PROGRAM)
  set(CMAKE_CXX_COMPILER_LAUNCHER
    ${ENV_PROGRAM}
    CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
    ${CCACHE_PROGRAM}
  )
  add_compile_options($<$<COMPILE_LANG_AND_ID:CXX,GNU>:-fpch-preprocess>)
endif()
