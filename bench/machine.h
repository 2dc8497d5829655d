// What this machine can do at best, measured, so that each time has a bound beside it.
#pragma once

#include <string>

namespace sparkv::bench {

struct Limits {
  double bytes_per_second, multiply_adds_per_second;  // of so many threads together
};
Limits MeasureLimits(int threads);

std::string CpuName();
double Load();  // of the last minute

}  // namespace sparkv::bench
