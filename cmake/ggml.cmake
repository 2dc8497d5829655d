# Finds the headers the plugin is built against and makes them the target sparkv_ggml_headers.
# ggml-backend-impl.h is internal to ggml and changes between releases without a new number, so it
# must come from the release whose programs will load the plugin.
if(SPARKV_GGML_SOURCE_DIR)
  set(ggml_headers ${SPARKV_GGML_SOURCE_DIR}/include ${SPARKV_GGML_SOURCE_DIR}/src)
  if(NOT EXISTS "${SPARKV_GGML_SOURCE_DIR}/src/ggml-backend-impl.h")
    message(FATAL_ERROR "SPARKV_GGML_SOURCE_DIR=${SPARKV_GGML_SOURCE_DIR} "
                        "has no src/ggml-backend-impl.h")
  endif()
else()
  find_package(ggml QUIET)
  find_path(SPARKV_GGML_IMPL_DIR ggml-backend-impl.h HINTS ${GGML_INCLUDE_DIR})
  if(ggml_FOUND AND SPARKV_GGML_IMPL_DIR)
    set(ggml_headers ${GGML_INCLUDE_DIR} ${SPARKV_GGML_IMPL_DIR})
  endif()
endif()

if(ggml_headers)
  add_library(sparkv_ggml_headers INTERFACE)
  target_include_directories(sparkv_ggml_headers SYSTEM INTERFACE ${ggml_headers})
else()
  message(STATUS "The llama.cpp plugin is skipped: set SPARKV_GGML_SOURCE_DIR to the ggml/ folder "
                 "of a llama.cpp source tree, or install a ggml that brings ggml-backend-impl.h")
endif()
