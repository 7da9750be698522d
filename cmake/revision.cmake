# TORCHMOE_GIT_REVISION: the commit being built, with "-dirty" when tracked files differ from it; "unknown" outside a checkout, as of
# sources inside another project's repository.
set(TORCHMOE_GIT_REVISION unknown)
execute_process(
  COMMAND git rev-parse --show-toplevel
  WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
  OUTPUT_VARIABLE toplevel
  OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_QUIET
  RESULT_VARIABLE revision_failed
)
file(REAL_PATH "${PROJECT_SOURCE_DIR}" source)
if(NOT revision_failed AND toplevel STREQUAL source)
  execute_process(
    COMMAND git describe --always --dirty --abbrev=12 --exclude=*
    WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
    OUTPUT_VARIABLE TORCHMOE_GIT_REVISION
    OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_QUIET
  )
endif()
