#!/usr/bin/env bash
# Sets up whatever is missing, then builds everything into build/.
#
#   scripts/build.sh [--tests] [target...]     --tests: also what only the tests need; targets of
#                                              CMake beyond the library, the plugin and the command
#
# Debian packages, the pinned llama.cpp and the demo model are had once; each step leaves either its
# result or nothing, so it can be stopped at any moment and run again. From the environment:
#   LLAMA_SOURCE_DIR=dir  build this llama.cpp instead of the pinned one
#   LLAMA_GIT_TAG=tag     clone this llama.cpp release instead
#   USE_SYSTEM_LLAMA=1    use the llama.cpp programs on PATH and the ggml that CMake finds
#   MODEL=file            use this GGUF as the demo model
#   CI=true               warnings are errors
set -euo pipefail
cd "$(dirname "$0")/.."

programs=(llama-cli llama-completion llama-server llama-bench llama-perplexity llama-quantize)
tests=false
[ "${1-}" = --tests ] && { tests=true; shift; }
targets=("$@")

say() { echo "sparkv: $*" >&2; }
die() { say "$*"; exit 1; }

# quietly <name> <command...>: runs a command whose output matters only when it fails, and says
# every few seconds where it is.
quietly() {
  local log=build/logs/$1.log every=10 before='sparkv: ' after='\n' ticker status=0
  [ -t 2 ] && every=1 before='\r\033[Ksparkv: ' after=''
  shift
  mkdir -p build/logs
  : >"$log"
  # The sleep outlives the loop: it may hold neither our pipes nor the lock.
  while sleep $every >/dev/null 2>&1 9>&- && kill -0 $$ 2>/dev/null; do
    printf "$before%.90s$after" "$(tail -n 1 "$log")" >&2
  done &
  ticker=$!
  "$@" >>"$log" 2>&1 </dev/null || status=$?
  kill $ticker
  wait $ticker 2>/dev/null || true
  [ -t 2 ] && printf '\r\033[K' >&2
  return $status
}

# The same for a command that has to work.
must() {
  quietly "$@" || { tail -n 30 "build/logs/$1.log" >&2; die "'$2' failed, see build/logs/$1.log"; }
}

# --- Debian packages: "package:what it brings", a program or a file ----------------

needed=(
  g++:g++ cmake:cmake ninja-build:ninja pkg-config:pkg-config
  libcli11-dev:/usr/include/CLI/CLI.hpp libfmt-dev:/usr/include/fmt/core.h
  nlohmann-json3-dev:/usr/include/nlohmann/json.hpp
  libgtest-dev:/usr/include/gtest/gtest.h librapidcheck-dev:/usr/include/rapidcheck.h
)
# Only the fuzz smoke run, the tests for arm64, the count of instructions and pictures of reports
# want these; without them they are skipped.
wanted=(
  valgrind:valgrind librsvg2-bin:rsvg-convert
  clang-14:clang++-14 g++-aarch64-linux-gnu:aarch64-linux-gnu-g++ qemu-user:qemu-aarch64
  'libclang-rt-14-dev:/usr/lib/llvm-14/lib/clang/*/lib/linux/libclang_rt.fuzzer-*.a'
)

# Only the kernel benchmark wants this.
bench=OFF
if [[ " ${targets[*]} " == *" attend_bench "* ]]; then
  bench=ON
  needed+=(libbenchmark-dev:/usr/include/benchmark/benchmark.h)
fi

# The tests compile libsparkv-cuda.so where there is a compiler for it.
cuda=OFF
nvcc_release=$(nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9]*\).*/\1/p')
$tests && [ "${nvcc_release:-0}" -ge 12 ] && cuda=ON

present() {
  if [[ $1 == /* ]]; then compgen -G "$1"; else command -v "$1"; fi >/dev/null
}

# A Python that has what the scripts need; another one may come first on PATH.
find_python() {
  for python in python3 /usr/bin/python3; do
    "$python" -c 'import numpy, pip' 2>/dev/null && return
  done
  return 1
}

install_packages() {
  local missing=() optional=() entry
  for entry in "${needed[@]}"; do present "${entry#*:}" || missing+=("${entry%%:*}"); done
  find_python || missing+=(python3 python3-pip python3-numpy)
  if $tests; then
    for entry in "${wanted[@]}"; do present "${entry#*:}" || optional+=("${entry%%:*}"); done
  fi
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    [ ${#missing[@]} = 0 ] && return
    say "not root (or no apt-get), and Debian packages are missing: ${missing[*]} ${optional[*]}"
    exit 2
  fi
  missing+=("${optional[@]}")
  [ ${#missing[@]} = 0 ] && return
  say "installing Debian packages: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  quietly apt dpkg --configure -a || true  # after an earlier run was stopped inside dpkg
  quietly apt apt-get update -q || true  # the lists at hand may do
  quietly apt apt-get install -q -y --no-install-recommends -o DPkg::Lock::Timeout=300 \
    "${missing[@]}" ||
    die "could not get Debian packages (see build/logs/apt.log); supply them with:" \
      "apt-get install ${missing[*]}"
  find_python || die "'python3 -c \"import numpy, pip\"' fails after installing ${missing[*]}"
}

# --- llama.cpp ---------------------------------------------------------------------

# Native builds of ggml crash on some virtual machines (AMX), so the instruction sets are named.
instruction_sets() {
  local cpu=" $(grep -m1 '^flags' /proc/cpuinfo || true) "
  has() { local flag; for flag; do [[ $cpu == *" $flag "* ]] || return 1; done; }
  option() { local name=$1; shift; has "$@" && echo "-D$name=ON" || echo "-D$name=OFF"; }
  [ "$(uname -m)" = x86_64 ] || return 0
  option GGML_AVX avx
  option GGML_AVX2 avx2
  option GGML_BMI2 bmi2
  option GGML_FMA fma
  option GGML_F16C f16c
  option GGML_AVX512 avx512f avx512cd avx512bw avx512dq avx512vl
  option GGML_AVX512_VBMI avx512vbmi
  option GGML_AVX512_VNNI avx512_vnni
  option GGML_AVX512_BF16 avx512_bf16
}

clone_llama() {
  local target=$1
  [ -d "$target" ] && return
  rm -rf "$target.partial"
  mkdir -p "$(dirname "$target")"
  git clone --depth 1 --branch "$LLAMA_GIT_TAG" https://github.com/ggml-org/llama.cpp \
    "$target.partial" ||
    die "could not get llama.cpp $LLAMA_GIT_TAG from GitHub; supply LLAMA_SOURCE_DIR=folder"
  mv "$target.partial" "$target"
}

# Sets llama_source and llama_tree, where it is built.
find_llama() {
  local pinned=$PWD/build/deps/src/llama.cpp
  if [ -n "${LLAMA_SOURCE_DIR-}" ]; then
    llama_source=$(realpath -m -- "$LLAMA_SOURCE_DIR")
    [ -f "$llama_source/ggml/CMakeLists.txt" ] ||
      die "LLAMA_SOURCE_DIR=$LLAMA_SOURCE_DIR is not a llama.cpp tree (no ggml/CMakeLists.txt)"
  elif [ -n "${LLAMA_GIT_TAG-}" ]; then
    llama_source=$pinned-$LLAMA_GIT_TAG
    clone_llama "$llama_source"
  else
    llama_source=$pinned
  fi
  llama_tree=$PWD/build/deps/llama
  [ "$llama_source" = "$pinned" ] || llama_tree+=-$(cksum <<<"$llama_source" | cut -d' ' -f1)
}

build_llama() {
  local flags=(
    -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON
    '-DCMAKE_INSTALL_RPATH=$ORIGIN/../lib;$ORIGIN' -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF
    -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DGGML_CCACHE=OFF -DGGML_NATIVE=OFF
    $(instruction_sets)
  )
  if [ "$llama_tree" = "$PWD/build/deps/llama" ]; then
    # The archive has no history: name its commit, and keep git from taking ours for it.
    flags+=(-DLLAMA_BUILD_COMMIT=0c1e57098 -DLLAMA_BUILD_NUMBER=0)
    export GIT_CEILING_DIRECTORIES=${llama_source%/*}
  else
    flags+=(-DLLAMA_CURL=OFF)
  fi
  local stamp=$llama_tree/.sparkv-configured
  if [ "$(cat "$stamp" 2>/dev/null)" != "${flags[*]}" ]; then
    say "configuring llama.cpp"
    must configure-llama cmake -S "$llama_source" -B "$llama_tree" -G Ninja "${flags[@]}"
    echo "${flags[*]}" >"$stamp"
  fi
  NINJA_STATUS='llama.cpp [%f/%t] ' ninja -C "$llama_tree" -j "$(nproc)" "${programs[@]}" >&2
  # By rename, so that a program that runs now keeps the file it started from.
  rm -rf build/.staging
  mkdir -p build/.staging/bin build/.staging/lib
  cp -a "${programs[@]/#/$llama_tree/bin/}" build/.staging/bin
  cp -a "$llama_tree"/bin/lib*.so* build/.staging/lib
  mv -f build/.staging/bin/* build/bin
  mv -f build/.staging/lib/* build/lib
  rm -r build/.staging
}

link_system_llama() {
  local program path
  for program in "${programs[@]}"; do
    path=$(PATH=${PATH//"$PWD/build/bin"/} command -v "$program") ||
      die "USE_SYSTEM_LLAMA=$USE_SYSTEM_LLAMA, but '$program' is not on PATH"
    ln -sfn "$path" "build/bin/$program"
  done
}

# --- ours --------------------------------------------------------------------------

build_sparkv() {
  local werror=OFF folder
  [ "${CI-}" = true ] && werror=ON
  must configure cmake -S . -B build/cmake -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_RUNTIME_OUTPUT_DIRECTORY="$PWD/build/bin" \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/build/lib" \
    -DSPARKV_WERROR="$werror" -DSPARKV_BENCH=$bench -DSPARKV_CUDA=$cuda -DSPARKV_GGML_SOURCE_DIR="${llama_source:+$llama_source/ggml}" \
    -DPython3_EXECUTABLE="$(command -v "$python")"
  if $tests; then
    targets+=(all)
  else
    for folder in src adapters/ggml tools/sparkv; do
      [ -f "$folder/CMakeLists.txt" ] && targets+=("$folder/all")
    done
  fi
  NINJA_STATUS='sparkv [%f/%t] ' ninja -C build/cmake -j "$(nproc)" "${targets[@]}" >&2
}

install_packages
mkdir -p build/bin build/lib
exec 9>build/.lock
flock -n 9 || { say "another run sets up build/; waiting for it"; flock 9; }

if [ "${USE_SYSTEM_LLAMA:-0}" != 0 ]; then
  "$python" scripts/fetch.py smollm
  link_system_llama
  llama_source=
else
  find_llama
  wanted_downloads=(smollm)
  [ -n "${LLAMA_SOURCE_DIR-}${LLAMA_GIT_TAG-}" ] || wanted_downloads=(llama smollm)
  "$python" scripts/fetch.py "${wanted_downloads[@]}"
  build_llama
fi
build_sparkv
