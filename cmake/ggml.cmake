# Finds what the plugin is built against: SPARKV_GGML_SOURCE_DIR if it is set, else an installed ggml.
# ggml-backend-impl.h is internal to ggml and changes between releases without a new number, so it
# must come from the release whose programs will load the plugin; few installations have it.
#
# Sets SPARKV_GGML_VERSION and SPARKV_GGML_INCLUDE_DIRS, both empty when there is nothing to build with.
set(SPARKV_GGML_VERSION "")
set(SPARKV_GGML_INCLUDE_DIRS "")

if(SPARKV_GGML_SOURCE_DIR)
  set(ggml_root "${SPARKV_GGML_SOURCE_DIR}")
  if(EXISTS "${ggml_root}/ggml/CMakeLists.txt")  # llama.cpp, whose ggml/ is meant
    string(APPEND ggml_root "/ggml")
  endif()
  if(NOT EXISTS "${ggml_root}/src/ggml-backend-impl.h")
    message(FATAL_ERROR "SPARKV_GGML_SOURCE_DIR=${SPARKV_GGML_SOURCE_DIR} "
                        "has no src/ggml-backend-impl.h")
  endif()
  file(STRINGS "${ggml_root}/CMakeLists.txt" lines
       REGEX "^set\\(GGML_VERSION_(MAJOR|MINOR|PATCH) [0-9]+\\)")
  string(REGEX REPLACE "[^0-9;]" "" numbers "${lines}")
  list(LENGTH numbers count)
  if(NOT count EQUAL 3)
    message(FATAL_ERROR "${ggml_root}/CMakeLists.txt names no ggml version")
  endif()
  list(JOIN numbers "." SPARKV_GGML_VERSION)
  set(SPARKV_GGML_INCLUDE_DIRS "${ggml_root}/include" "${ggml_root}/src")
else()
  find_package(ggml QUIET)
  find_path(SPARKV_GGML_IMPL_DIR ggml-backend-impl.h HINTS ${GGML_INCLUDE_DIR})
  if(ggml_FOUND AND SPARKV_GGML_IMPL_DIR)
    set(SPARKV_GGML_VERSION ${ggml_VERSION})
    set(SPARKV_GGML_INCLUDE_DIRS ${GGML_INCLUDE_DIR} ${SPARKV_GGML_IMPL_DIR})
  endif()
endif()

if(NOT SPARKV_GGML_VERSION)
  message(STATUS "The llama.cpp plugin is skipped: set SPARKV_GGML_SOURCE_DIR to a llama.cpp source "
                 "tree, or install a ggml that brings ggml-backend-impl.h")
endif()
