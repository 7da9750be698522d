# The target Catch2::Catch2, of version 2 or 3: what is installed, or what is fetched.

find_package(Catch2 3 CONFIG QUIET)
if(NOT Catch2_FOUND)
  find_package(Catch2 2 CONFIG QUIET)
endif()
if(NOT Catch2_FOUND AND CMAKE_CROSSCOMPILING)
  # Version 2 is headers alone, which serve every processor; those around them are this machine's.
  find_path(TORCHMOE_CATCH2_HEADERS catch2/catch.hpp PATHS /usr/include NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH)
  if(TORCHMOE_CATCH2_HEADERS)
    set(_catch2 "${CMAKE_CURRENT_BINARY_DIR}/catch2")
    file(MAKE_DIRECTORY "${_catch2}")
    file(CREATE_LINK "${TORCHMOE_CATCH2_HEADERS}/catch2" "${_catch2}/catch2" SYMBOLIC)
    add_library(Catch2::Catch2 INTERFACE IMPORTED)
    target_include_directories(Catch2::Catch2 INTERFACE "${_catch2}")
    set(Catch2_FOUND TRUE)
  endif()
endif()
if(NOT Catch2_FOUND)
  include(FetchContent)
  FetchContent_Declare(Catch2
    URL https://github.com/catchorg/Catch2/archive/refs/tags/v3.7.1.tar.gz)
  FetchContent_MakeAvailable(Catch2)
  # Its headers are not ours to warn about.
  set_target_properties(Catch2 PROPERTIES
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES
    "$<TARGET_PROPERTY:Catch2,INTERFACE_INCLUDE_DIRECTORIES>")
endif()
