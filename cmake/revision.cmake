# TORCHMOE_GIT_REVISION: the commit being built, with "-dirty" when tracked files differ from it; "unknown" outside a checkout.
execute_process(
  COMMAND git describe --always --dirty --abbrev=12 --exclude=*
  WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
  OUTPUT_VARIABLE TORCHMOE_GIT_REVISION
  OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_QUIET
  RESULT_VARIABLE revision_failed
)
if(revision_failed)
  set(TORCHMOE_GIT_REVISION unknown)
endif()
