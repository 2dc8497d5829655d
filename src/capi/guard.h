// The border to C: nothing thrown below passes it.
#pragma once

#include <exception>
#include <new>

#include "base/status.h"

namespace sparkv {

// Runs body(), which returns a Status, and reports it.
template <typename Body>
sparkv_status Guard(sparkv_error* error, Body&& body) noexcept {
  try {
    return body().Report(error);
  } catch (const std::bad_alloc&) {
    if (error != nullptr) std::snprintf(error->text, sizeof(error->text), "memory: out of memory");
    return SPARKV_NO_MEMORY;
  } catch (const std::exception& e) {
    if (error != nullptr) std::snprintf(error->text, sizeof(error->text), "internal: %s", e.what());
  } catch (...) {
    if (error != nullptr)
      std::snprintf(error->text, sizeof(error->text), "internal: unknown exception");
  }
  return SPARKV_UNSUPPORTED;
}

}  // namespace sparkv
