#!/usr/bin/env bash
# Sets up, builds and runs every test; the last line counts them all.
set -euo pipefail
cd "$(dirname "$0")/.."
passed=0 failed=0

# count_ctest name tree [option ...]: runs ctest in a build tree and adds its numbers to the total.
count_ctest() {
  local log=build/logs/ctest-$1.log total bad
  ctest --test-dir "$2" --output-on-failure --no-tests=error "${@:3}" 2>&1 | tee "$log" || true
  # "98% tests passed, 1 tests failed out of 50"; absent when ctest itself failed
  read -r bad total < <(sed -n 's/.*, \([0-9]*\) tests\? failed out of \([0-9]*\)$/\1 \2/p' "$log") ||
    { bad=1 total=1; }
  passed=$((passed + total - bad)) failed=$((failed + bad))
}

heading() { printf '\n== %s ==\n' "$*"; }

heading "set-up and build"
scripts/build.sh --tests

heading "unit tests under AddressSanitizer and UndefinedBehaviorSanitizer"
werror=OFF
[ "${CI-}" = true ] && werror=ON
cmake --preset asan -DSPARKV_WERROR=$werror >build/logs/configure-asan.log
cmake --build --preset asan -j "$(nproc)"
count_ctest asan build/asan -j "$(nproc)"

if [ -f tests/fuzz/CMakeLists.txt ] && command -v clang++-14 >/dev/null; then
  heading "libFuzzer, 20 seconds each"
  cmake --preset fuzz >build/logs/configure-fuzz.log
  cmake --build --preset fuzz -j "$(nproc)"
  for target in build/fuzz/tests/bin/*_fuzz; do
    if "$target" -max_total_time=20 -max_len=16384 -rss_limit_mb=2048 -artifact_prefix=build/fuzz/ \
      -verbosity=0 -print_funcs=0 -print_final_stats=1; then
      passed=$((passed + 1))
    else
      failed=$((failed + 1))
    fi
  done
else
  heading "libFuzzer is skipped: it needs clang++-14 and tests/fuzz"
fi

if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
  heading "NEON kernels and packed bytes on arm64, under qemu"
  cmake --preset arm64 -DSPARKV_WERROR=$werror >build/logs/configure-arm64.log
  cmake --build --preset arm64 -j "$(nproc)" --target unit_tests
  # All unit tests would take more than ten minutes there.
  count_ctest arm64 build/arm64 -j "$(nproc)" -R '/neon|^Rows\.|^Half\.|^LogGrid\.'
else
  heading "arm64 is skipped: it needs aarch64-linux-gnu-g++ and qemu-aarch64"
fi

heading "all tests"
# Tests of whole programs wait for all others (RUN_SERIAL).
count_ctest all build/cmake -j "$(nproc)"

printf '\n%d passed, %d failed\n' "$passed" "$failed"
[ "$failed" = 0 ]
