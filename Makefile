# Everything the project does, by name. The work is in scripts/ and CMake; `make help` lists it.
.DEFAULT_GOAL := help
.PHONY: help build demo test cuda golden bench bench-attend model-gemma clean

# Evaluated when a recipe runs, so that a set-up step may install it first.
PYTHON = $(shell for p in python3 /usr/bin/python3; do \
	$$p -c 'import numpy' 2>/dev/null && { echo $$p; break; }; done)

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' Makefile | expand -t 22
	@echo "  Variables: LLAMA_SOURCE_DIR=dir LLAMA_GIT_TAG=tag USE_SYSTEM_LLAMA=1 MODEL=file"

build: ## set up what is missing (packages, llama.cpp, model) and build into build/
	@scripts/build.sh

demo: build ## a question over a long document: plain f16 cache, then sparkv, as a table and a page
	@$(PYTHON) tools/demo/demo.py $(ARGS)

test: ## set up, build and run all tests, then the unit tests under ASan and UBSan
	@scripts/test.sh

cuda: ## build/cuda/lib/libsparkv-cuda.so (needs nvcc 12 or newer); where there is a GPU, test it
	@cmake --preset cuda
	@cmake --build --preset cuda --target sparkv-cuda gpu_tests
	@build/cuda/tests/bin/gpu_tests

golden: ## compare the library with reference vectors: make golden DIR=folder
	@scripts/build.sh sparkv_reference_shared
	@$(PYTHON) tests/golden/golden.py "$(or $(DIR),tests/golden)"

bench: build ## measure on this machine: build/bin/sparkv bench, ARGS= goes through
	@build/bin/sparkv bench $(ARGS)

bench-attend: ## attention, packing and writing alone, beside ggml's: ARGS=--help lists what can be varied
	@scripts/build.sh attend_bench
	@OMP_WAIT_POLICY=passive build/cmake/bench/attend_bench $(ARGS)

model-gemma: build ## fetch Gemma-3-270m (its terms are shown) into build/models/
	@$(PYTHON) scripts/fetch.py gemma
	@ls build/models/gemma-*.gguf

clean: ## remove what was built of ours; llama.cpp, downloads and models stay
	rm -rf build/cmake build/release build/asan build/tsan build/fuzz build/cuda build/bin build/lib build/logs
