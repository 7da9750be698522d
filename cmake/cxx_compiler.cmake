# What the C++ compiler makes with the project's flags. Read by the build and by the installed package.
#
# In:  TORCHMOE_ABI, TORCHMOE_CPU, what the compiler must make, anything where they are empty; TORCHMOE_ABI_OF, whose they are
# Out: TORCHMOE_COMPILER_ABI, TORCHMOE_COMPILER_CPU, empty where the compiler does not tell; and TORCHMOE_PROBLEM, a sentence, where there
#      is none yet and this finds one

if(TORCHMOE_PROBLEM)
  return()
endif()
get_property(_torchmoe_languages GLOBAL PROPERTY ENABLED_LANGUAGES)
list(REMOVE_ITEM _torchmoe_languages NONE)
if(NOT "CXX" IN_LIST _torchmoe_languages)
  if(NOT "CUDA" IN_LIST _torchmoe_languages)
    string(REPLACE ";" " " _torchmoe_languages "${_torchmoe_languages}")
    set(TORCHMOE_PROBLEM "the project must enable CXX before find_package(torchmoe), got \"${_torchmoe_languages}\": \
write project(name LANGUAGES CXX)")
  endif()
  return()
endif()

# What the directory adds to the flags counts too, of it what can change the answer.
get_directory_property(_torchmoe_options COMPILE_OPTIONS)
get_directory_property(_torchmoe_definitions COMPILE_DEFINITIONS)
list(TRANSFORM _torchmoe_definitions PREPEND -D)
list(APPEND _torchmoe_options ${_torchmoe_definitions})
list(FILTER _torchmoe_options INCLUDE REGEX "^-(D_GLIBCXX_[A-Z0-9_]+(=[0-9]+)?|std[a-z0-9+=]+)$")

# Each #error tells one thing, so that one call of the preprocessor tells all.
set(_torchmoe_source [[
#include <cstddef>
#if defined(_LIBCPP_VERSION)
#error torchmoe abi [libc++]
#elif defined(_GLIBCXX_DEBUG)
#error torchmoe abi [_GLIBCXX_DEBUG]
#elif defined(_GLIBCXX_USE_CXX11_ABI) && _GLIBCXX_USE_CXX11_ABI
#error torchmoe abi [_GLIBCXX_USE_CXX11_ABI=1]
#elif defined(__GLIBCXX__)
#error torchmoe abi [_GLIBCXX_USE_CXX11_ABI=0]
#endif
#if defined(__x86_64__)
#error torchmoe cpu [x86_64]
#elif defined(__aarch64__)
#error torchmoe cpu [aarch64]
#endif
#if __cplusplus < 202002L
#error torchmoe standard [older]
#else
#error torchmoe standard [20]
#endif
]])
# It is asked again whenever one of these has changed: a mistake is repaired without a new build folder.
string(TOUPPER "${CMAKE_BUILD_TYPE}" _torchmoe_type)
set(_torchmoe_asked "${_torchmoe_source} ${CMAKE_CXX_COMPILER} ${CMAKE_CXX_COMPILER_VERSION} ${CMAKE_CXX_FLAGS} \
${CMAKE_CXX_FLAGS_${_torchmoe_type}} ${CMAKE_BUILD_TYPE} ${_torchmoe_options}")
string(SHA256 _torchmoe_asked "${_torchmoe_asked}")
if(NOT "${TORCHMOE_COMPILER_ASKED}" STREQUAL _torchmoe_asked)
  set(_torchmoe_file "${CMAKE_BINARY_DIR}/CMakeFiles/torchmoe_compiler.cpp")
  file(WRITE "${_torchmoe_file}" "${_torchmoe_source}")
  set(_torchmoe_kept "${CMAKE_TRY_COMPILE_CONFIGURATION}")
  set(CMAKE_TRY_COMPILE_CONFIGURATION "${CMAKE_BUILD_TYPE}")  # for its flags
  try_compile(_torchmoe_compiled "${CMAKE_BINARY_DIR}/CMakeFiles/torchmoe_compiler" "${_torchmoe_file}"
    COMPILE_DEFINITIONS ${_torchmoe_options}
    OUTPUT_VARIABLE _torchmoe_answer
    CXX_STANDARD 20
  )
  set(CMAKE_TRY_COMPILE_CONFIGURATION "${_torchmoe_kept}")
  unset(_torchmoe_compiled CACHE)
  foreach(_torchmoe_thing abi cpu standard)
    string(TOUPPER ${_torchmoe_thing} _torchmoe_name)
    set(_torchmoe_value "")
    if(_torchmoe_answer MATCHES "torchmoe ${_torchmoe_thing} \\[([^]]+)\\]")
      set(_torchmoe_value "${CMAKE_MATCH_1}")
    endif()
    set(TORCHMOE_COMPILER_${_torchmoe_name} "${_torchmoe_value}" CACHE INTERNAL "What the C++ compiler makes")
  endforeach()
  set(TORCHMOE_COMPILER_ASKED "${_torchmoe_asked}" CACHE INTERNAL "Of which compiler and flags")
endif()

if(TORCHMOE_COMPILER_STANDARD STREQUAL "older")
  set(TORCHMOE_PROBLEM "the C++ compiler with its flags must compile C++20, got an older C++ of \
${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}: \
take -std= out of the flags, or set CMAKE_CXX_COMPILER to GCC 12 or clang 16 or later")
elseif(TORCHMOE_CPU AND TORCHMOE_COMPILER_CPU AND NOT TORCHMOE_COMPILER_CPU STREQUAL TORCHMOE_CPU)
  set(TORCHMOE_PROBLEM "the C++ compiler must make code for ${TORCHMOE_CPU} as ${TORCHMOE_ABI_OF}'s did, got ${TORCHMOE_COMPILER_CPU}: \
take a ${TORCHMOE_ABI_OF} that is built for ${TORCHMOE_COMPILER_CPU}, or another compiler")
elseif(TORCHMOE_ABI AND TORCHMOE_COMPILER_ABI AND NOT TORCHMOE_COMPILER_ABI STREQUAL TORCHMOE_ABI)
  if(TORCHMOE_COMPILER_ABI STREQUAL "libc++")
    set(_torchmoe_remedy "take -stdlib=libc++ out of the flags")
  elseif(TORCHMOE_COMPILER_ABI STREQUAL "_GLIBCXX_USE_CXX11_ABI=1")  # the default nearly everywhere
    set(_torchmoe_remedy "add -D${TORCHMOE_ABI} to CMAKE_CXX_FLAGS")
  else()
    set(_torchmoe_remedy "take -D${TORCHMOE_COMPILER_ABI} out of the flags")
  endif()
  set(TORCHMOE_PROBLEM "the C++ compiler with its flags must have ${TORCHMOE_ABI} as ${TORCHMOE_ABI_OF}'s had, \
got ${TORCHMOE_COMPILER_ABI}: ${_torchmoe_remedy}")
endif()
