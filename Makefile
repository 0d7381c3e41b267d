# SPDX-License-Identifier: MIT
# What a developer types. Everything happens in $(VENV) and build/, nothing outside.

PYTHON ?= python3
VENV ?= .venv
CC ?= cc

BIN = $(VENV)/bin
SOURCES = $(wildcard csrc/*.c)
HEADERS = $(wildcard csrc/*.h tests/c/*.h)
# A change of one of these means that the package has to be built again.
BUILD_FILES = pyproject.toml setup.py csrc/ffi_build.py pybitmap/_fast.c $(SOURCES) $(wildcard csrc/*.h)

# Of the loops in csrc/words.c; one that the processor lacks is the best it has. test_model goes through them by
# itself.
CLONES = plain popcnt avx512

# The programs in C choose a seed by the clock and print it; SEED=N repeats a run.
SEED ?=
CFLAGS_C = -std=c11 -g -Wall -Wextra -Wpedantic -Wconversion -Werror -Icsrc -Itests/c
ASAN = -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
TSAN = -O1 -fsanitize=thread

# The other byte order, and a weaker order of memory. Compilers are MACHINE-linux-gnu-gcc.
MACHINES = s390x aarch64

.PHONY: help run test test-pure build bench bench-c bench-stores bench-tools results lint types asan asan-c asan-py tsan cross \
    cross-tools $(addprefix cross-,$(MACHINES)) lockstep interrupts histories \
    test-minimal systems wheel docs man first-hour clean

# What shows that examples in pages and docstrings give what they show.
DOCTESTS = tests/test_docs.py tests/test_docstrings.py tests/test_readme.py tests/test_howto.py \
    tests/test_promises.py tests/compat/test_page.py tests/qmp/test_qmp_docs.py

# What needs other packages (pyarrow, NumPy) is skipped there, and tested by `make test`.
MINIMAL_TESTS = tests/core tests/cli

# Of Debian, newer than what most have.
SYSTEMS = trixie sid

# Steps of `make lockstep`.
N ?= 20000

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

run: $(VENV)/.cli ## Replay a real guest's writes and compare with QEMU's own bitmaps
	$(BIN)/pybitmap replay examples/traces/guest-files.trace.gz \
	    --expect examples/traces/guest-files.json

test: $(VENV)/.test ## Run the tests
	$(BIN)/python -m pytest

test-pure: $(VENV)/.test ## Run those of the core the other ways: by cffi alone, and with other clones of the loops
	PYBITMAP_PURE_CFFI=1 PYBITMAP_CLONE=plain $(BIN)/python -m pytest -q -m core
	PYBITMAP_CLONE=popcnt $(BIN)/python -m pytest -q tests/core/test_state_machine.py

test-minimal: build/minimal/.installed ## Run those of the core and the command line with the oldest packages that pyproject.toml allows
	cd build/minimal/source && PYBITMAP_REQUIRE_PEERS= ../venv/bin/python -m pytest -q -p no:cacheprovider $(MINIMAL_TESTS)

systems: ## Run the tests on newer systems, as root: Debian in folders, some GB (SYSTEMS="trixie sid")
	failed=; for system in $(SYSTEMS); do tests/support/system.sh $$system || failed="$$failed $$system"; done; \
	[ -z "$$failed" ] || { echo "make systems: failed on$$failed" >&2; exit 1; }

build: $(VENV)/.dev ## Build in place, with all that development needs

bench: $(VENV)/.bench ## Measure from Python, beside peers (BENCH_OPTS: --only set, --groups 2^30, --rounds 5, --json)
	$(BIN)/python bench/run.py $(BENCH_OPTS)

bench-stores: $(VENV)/.dev ## Measure stores beside plain reads and writes (BENCH_OPTS goes to pytest)
	$(BIN)/python -m pytest bench/bench_local.py bench/bench_qcow2.py $(BENCH_OPTS)

bench-tools: $(VENV)/.test ## Measure backups beside QEMU's own jobs, nbdkit beside its own plugins, scans of many disks
	$(BIN)/python bench/bench_backup.py
	$(BIN)/python bench/bench_nbdkit.py
	$(BIN)/python bench/bench_fleet.py --scale 3

results: $(VENV)/.bench build/bench/bench ## Measure everything, write bench/RESULTS.md and its plots (RESULTS_OPTS: --large, --redraw)
	$(BIN)/python bench/results.py --compiler $(CC) --c-program build/bench/bench $(RESULTS_OPTS)

bench-c: build/bench/bench ## Measure the C core beside bare loops (BENCH_OPTS: --groups 2^30, --json, --sweep size)
	$< $(BENCH_OPTS)

lint: $(VENV)/.dev ## Check style with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## Check types with mypy --strict, and a user's program also with pyright
	$(BIN)/mypy
	for version in 3.10 3.14; do $(BIN)/mypy --python-version $$version tests/typing/program.py || exit 1; done
	for version in 3.9 3.11 3.14; do \
	    $(BIN)/basedpyright --pythonversion $$version --level error tests/typing/program.py || exit 1; done

asan: asan-c asan-py ## Run the tests in C and those of the core under ASan and UBSan

tsan: build/tsan/test_threads build/tsan/test_tracker ## Run the threads in C under TSan
	for clone in $(CLONES); do PYBITMAP_CLONE=$$clone build/tsan/test_threads $(SEED) || exit 1; done
	build/tsan/test_tracker $(SEED)

cross: $(addprefix cross-,$(MACHINES)) ## Run the tests in C as user-mode QEMU has other machines (MACHINES="s390x aarch64")

lockstep: $(VENV)/.test ## Send N=20000 steps to a real QEMU and to ours, and compare
	PYBITMAP_REQUIRE_PEERS=1 PYBITMAP_LOCKSTEP_STEPS=$(N) $(BIN)/python -m pytest -s tests/qmp/test_lockstep.py

interrupts: $(VENV)/.test ## Raise at every line of every change of bitmaps, at every allocation, by signals (half an hour)
	PYBITMAP_ALL_LINES=1 $(BIN)/python -m pytest -n auto tests/block/test_interrupts.py \
	    tests/block/test_no_memory.py tests/block/test_signals.py tests/tools/test_backup_interrupts.py

histories: $(VENV)/.test ## Back up 500 random histories of disks, killed and resized, and restore each point (ten minutes)
	PYBITMAP_HISTORIES=500 $(BIN)/python -m pytest -n auto tests/tools/test_backup_histories.py

docs: $(VENV)/.docs $(VENV)/.test ## Make the pages in build/docs/html (a warning is an error), and run their examples
	$(BIN)/sphinx-build -q -W --keep-going -j auto -b html -c docs . build/docs/html
	$(if $(DOCTESTS),$(BIN)/python -m pytest -q $(DOCTESTS))

man: $(VENV)/.docs ## Make the manual page, build/docs/man/pybitmap.1
	$(BIN)/sphinx-build -q -W --keep-going -b man -c docs . build/docs/man

first-hour: ## Do what README, the tutorial and the how-tos say, in a fresh clone and a new virtual environment
	$(PYTHON) tests/first_hour.py

wheel: $(VENV)/.package ## Build source archive and wheel into dist/ (WHEEL_PYTHONS="python3 pypy3": wheels of these), and look at them
	rm -rf dist
	BIN=$(BIN) CC=$(CC) tests/support/packages.sh dist $(WHEEL_PYTHONS)
	$(BIN)/python tests/support/check_packages.py dist

clean: ## Remove all that was built
	rm -rf build dist *.egg-info $(VENV) pybitmap/_cffi.c pybitmap/*.so pybitmap/_cffi.*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

# $(VENV)/.NAME: the package is installed in place with the extra NAME. (setuptools warns of every
# installation in place.) What dev brings is enough for all others, if it is as new.
$(VENV)/.%: $(BUILD_FILES)
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip -q --disable-pip-version-check install 'pip>=21.3'  # older ones cannot install in place
	@{ test '$*' != dev && test -e $(VENV)/.dev && test -z "$$(find $^ -newer $(VENV)/.dev)"; } || \
	    PYTHONWARNINGS=ignore $(BIN)/pip -q --disable-pip-version-check install -e '.[$*]'
	@touch $@

# A copy, since what is compiled in place is compiled with another cffi.
build/minimal/.installed: $(BUILD_FILES) $(wildcard pybitmap/*.py pybitmap/*/*.py pybitmap/*/*/*.py tests/*.py tests/*/*.py)
	rm -rf build/minimal/source
	tests/support/copy_tree.sh build/minimal/source
	test -x build/minimal/venv/bin/pip || $(PYTHON) -m venv build/minimal/venv
	build/minimal/venv/bin/pip -q --disable-pip-version-check install 'pip>=21.3' \
	    $$($(PYTHON) tests/support/minimal.py)
	PYTHONWARNINGS=ignore build/minimal/venv/bin/pip -q --disable-pip-version-check install \
	    --no-build-isolation --no-deps -e build/minimal/source
	@touch $@

asan-c: $(addprefix build/asan/test_,model model_mapped threads tracker arrays)
	for program in $^; do $$program $(SEED) || exit 1; done

# Red zones stand only around what comes from malloc; the other build maps everything.
build/asan/test_model: DEFINES = -DHB_TEST_ALLOC -DHB_MAP_MIN=SIZE_MAX
build/asan/test_model_mapped: DEFINES = -DHB_TEST_ALLOC -DHB_MAP_MIN=1 -DHB_GIVE_BACK_MIN=1
build/asan/test_threads build/asan/test_tracker: DEFINES = -DHB_MAP_MIN=SIZE_MAX
# Here pages are given back beside marks.
build/tsan/test_threads: DEFINES = -DHB_MAP_MIN=1 -DHB_GIVE_BACK_MIN=1

# Not `python -m pytest`, which would find the package of this folder first.
# The interpreter is not instrumented, so the sanitizer is loaded before it; what the interpreter
# leaks is not ours to report. pytest captures what a dying process says, so the sanitizers write
# files, also those of the processes that tests start; they are shown, and are a failure, whatever
# pytest says. What threads do differs from run to run, so they run some times more.
ASAN_LOG = $(CURDIR)/build/asan/log
ASAN_PYTEST = LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:log_path=$(ASAN_LOG) \
    UBSAN_OPTIONS=print_stacktrace=1:log_path=$(ASAN_LOG) \
    PYTHONPATH=$(CURDIR)/build/asan/site PYTHONMALLOC=malloc HYPOTHESIS_PROFILE=default \
    $(BIN)/pytest -q -m core -p no:cacheprovider

asan-py: build/asan/site/pybitmap $(VENV)/.test
	@$(CC) -print-file-name=libasan.so | grep -q / || { echo "make asan-py: nothing was run, $(CC) has no libasan.so to load" \
	    "into Python; gcc has" >&2; exit 1; }
	@rm -f $(ASAN_LOG).*
	@failed=; \
	$(ASAN_PYTEST) || failed=1; \
	for round in 1 2 3; do $(ASAN_PYTEST) tests/core/test_hbitmap_threads.py tests/block/test_node.py || failed=1; done; \
	for log in $(ASAN_LOG).*; do if [ -f "$$log" ]; then cat "$$log"; failed=1; fi; done; \
	[ -z "$$failed" ]

# setuptools would take what it finds in build/ for its own, however it was compiled.
build/asan/site/pybitmap: $(BUILD_FILES) $(wildcard pybitmap/*.py) | $(VENV)/.test
	rm -rf build/lib.* build/temp.* build/bdist.*
	CFLAGS="$(ASAN) -g" LDFLAGS="-fsanitize=address,undefined" \
	    $(BIN)/pip -q install --no-deps --upgrade --target build/asan/site .
	rm -rf build/lib.* build/temp.* build/bdist.*
	@touch $@

# gcc brings the libraries of its sanitizers.
define linked_with
	@mkdir -p $(@D)
	@echo 'int main(void) { return 0; }' | $(CC) $(1) -x c -o $(@D)/empty - 2> /dev/null || { echo "make: nothing was run," \
	    "$(CC) does not link with $(filter -fsanitize%,$(1)). clang's libraries for it are in Debian's libclang-rt-dev" >&2; exit 1; }
endef

build/asan/test_model_mapped: tests/c/test_model.c $(SOURCES) $(HEADERS)
	$(call linked_with,$(ASAN))
	$(CC) $(CFLAGS_C) $(ASAN) $(DEFINES) -o $@ $< $(SOURCES) -pthread

build/asan/%: tests/c/%.c $(SOURCES) $(HEADERS)
	$(call linked_with,$(ASAN))
	$(CC) $(CFLAGS_C) $(ASAN) $(DEFINES) -o $@ $< $(SOURCES) -pthread

build/tsan/%: tests/c/%.c $(SOURCES) $(HEADERS)
	$(call linked_with,$(TSAN))
	$(CC) $(CFLAGS_C) $(TSAN) $(DEFINES) -o $@ $< $(SOURCES) -pthread

# Once round, or a fifth of it: half a minute for each machine.
CROSS_SEED = $(or $(SEED),$$(date +%s))
EMULATOR = $(firstword $(shell command -v qemu-$*-static) $(shell command -v qemu-$*))

$(addprefix cross-,$(MACHINES)): cross-%: $(addprefix build/cross/%/test_,model model_mapped threads tracker arrays)
	$(EMULATOR) build/cross/$*/test_arrays $(CROSS_SEED)
	$(EMULATOR) build/cross/$*/test_model $(CROSS_SEED) 1
	$(EMULATOR) build/cross/$*/test_model_mapped $(CROSS_SEED) 1
	$(EMULATOR) build/cross/$*/test_threads $(CROSS_SEED) 1
	$(EMULATOR) build/cross/$*/test_tracker $(CROSS_SEED) 4

build/cross/%/test_model: DEFINES = -DHB_TEST_ALLOC
build/cross/%/test_model_mapped: DEFINES = -DHB_TEST_ALLOC -DHB_MAP_MIN=1 -DHB_GIVE_BACK_MIN=1

build/cross/%: $(wildcard tests/c/*.c) $(SOURCES) $(HEADERS) | cross-tools
	@mkdir -p $(@D)
	$(*D)-linux-gnu-gcc $(CFLAGS_C) -O2 -static -DEMULATED $(DEFINES) -o $@ \
	    tests/c/$(patsubst %_mapped,%,$(*F)).c $(SOURCES) -pthread

cross-tools:
	@missing=; for machine in $(MACHINES); do \
	    command -v $$machine-linux-gnu-gcc > /dev/null || missing="$$missing $$machine-linux-gnu-gcc"; \
	    command -v qemu-$$machine-static > /dev/null || command -v qemu-$$machine > /dev/null || \
	        missing="$$missing qemu-$$machine-static"; \
	done; \
	[ -z "$$missing" ] || { echo "make cross: nothing was run, these programs are missing:$$missing. Debian has them" \
	    "in gcc-s390x-linux-gnu, gcc-aarch64-linux-gnu, libc6-dev-s390x-cross, libc6-dev-arm64-cross, qemu-user-static" \
	    >&2; exit 1; }

# As the package is compiled: without optimisation across files.
build/bench/%: bench/c/%.c $(wildcard bench/c/*.h) $(SOURCES) $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS_C) -O3 -fPIC -fvisibility=hidden -o $@ $< $(SOURCES) -pthread -lm
