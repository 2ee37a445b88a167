# Every target does its own set-up: Debian packages (as root), a virtual environment, the build. Bare `make` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The demo needs no extras: its environment takes a tenth of the space of the developers', which it uses if there is one.
DEMO := $(or $(wildcard $(READY)),$(VENV)/.demo)
SOURCES := pyproject.toml iobmd/_version.py $(wildcard cython_ext/* tools/bench/*.pyx)

.PHONY: help demo test test-repeat fuzz test-asan test-tsan test-vm vm-shell lint docs screenshots shell wheels bench soak clean

help:
	@echo "make demo         show what iobmd does, and what this host supports"
	@echo "make test         run the tests; as root all of them"
	@echo "make lint         check style, types and generated files"
	@echo "make docs         build the documentation into docs/_build/html"
	@echo "make screenshots  draw what the documentation shows of iobmd pagemap"
	@echo "make shell        generate completions and man pages, after a change of options"
	@echo "make wheels       build and check the files of a release into dist/"
	@echo "make bench        measure copies from another process"
	@echo "make soak         run all operations at once, each checked against the kernel"
	@echo "make fuzz         test the handling of untrusted input with random examples"
	@echo "make test-repeat  run the tests ten times, under load and on fragmented memory"
	@echo "make test-asan    run tests under the address sanitizer (test-tsan: threads)"
	@echo "make test-vm      run tests in guests with other kernels (vm-shell: a shell)"
	@echo "make clean        delete the environment and all results"
	@echo
	@echo "The Makefile describes the variables of each, such as PYTEST_ARGS."

demo: $(DEMO)
	$(BIN)/iobmd doctor
	$(BIN)/iobmd demo
	$(BIN)/iobmd pagemap self --map

test: $(READY)
	$(BIN)/pytest $(PYTEST_ARGS)

# Ten runs: on a busy machine, under nohup, on fragmented memory. RUNS="busy nohup", PYTEST_ARGS=tests/unit
test-repeat: $(READY)
	tools/proof-of-suite $(RUNS) -- $(PYTEST_ARGS)

# The property tests of untrusted input, with random examples: SECONDS=3600, PYTEST_ARGS="-k messages"
FUZZ_TESTS := $(wildcard tests/security/test_fuzz_*.py)
FUZZ_SECONDS = $(or $(SECONDS),60)
fuzz: $(READY)
	IOBMD_FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/pytest --timeout $$(($(FUZZ_SECONDS) + 120)) $(FUZZ_TESTS) $(PYTEST_ARGS)

# The extensions under the address sanitizer. Left out by default: tests of whole address spaces, in which the
# sanitizer's own takes minutes to walk, and those that look for memory, which are long with it.
ASAN_TESTS := $(patsubst %,tests/kernel/test_%.py,buffer cache cache_modes copies dma dma_segments mapping pinning \
    segments shared task withcopy slabs lazy_copies shared_since_fork host_memory) \
    $(patsubst %,tests/remote/test_%.py,freeze lazy_copies snapshot) $(FUZZ_TESTS) tests/security/test_threads.py \
    tests/unit/test_census.py
test-asan:
	tools/sanitize address "$(PYTHON)" build/asan --timeout 600 $(or $(PYTEST_ARGS),$(ASAN_TESTS))

# The native layer by several threads, under the thread sanitizer: SECONDS=600
test-tsan:
	IOBMD_FUZZ_SECONDS=$(FUZZ_SECONDS) tools/sanitize thread "$(PYTHON)" build/tsan \
	    --timeout $$(($(FUZZ_SECONDS) + 120)) $(or $(PYTEST_ARGS),tests/security/test_threads.py)

# Tests in guests: ARCH=aarch64 (default: this host's), KERNELS="5.10 6.12-16k", PROFILE="kernel" or ci, TESTS="tests/unit",
# JOBS=1, VERBOSE=1, TABLE=docs/kernels.md
test-vm: $(READY)
	tools/prepare-vm $(ARCH)
	$(BIN)/python -m iobmd.tools.vm run $(if $(ARCH),--architecture $(ARCH)) --kernels "$(KERNELS)" --profiles "$(PROFILE)" --tests "$(TESTS)" $(if $(JOBS),--jobs $(JOBS)) $(if $(VERBOSE),--verbose) $(if $(TABLE),--table $(TABLE))

# A shell in a guest: ARCH=aarch64, KERNEL=6.12, PROFILE=device
vm-shell: $(READY)
	tools/prepare-vm $(ARCH)
	$(BIN)/python -m iobmd.tools.vm shell $(if $(ARCH),--architecture $(ARCH)) $(if $(KERNEL),--kernel $(KERNEL)) $(if $(PROFILE),--profile $(PROFILE))

lint: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" tools/lint

# Completions and man pages, after a change of a command's options
shell: $(READY)
	$(BIN)/python -m iobmd.tools.release.shell

docs: $(READY)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

# What the documentation shows of iobmd pagemap, on a fixed program: needs tmux, chromium and swap. VIEWS="map page"
screenshots: $(READY)
	$(BIN)/python -m iobmd.tools.screenshots $(VIEWS)

# The sdist and the wheels of a release, built for each platform and checked: TARGETS="manylinux-x86_64"
wheels: $(READY)
	tools/prepare-release "$(PYTHON)" build/release
	$(BIN)/python -m iobmd.tools.release $(if $(TARGETS),--only $(TARGETS))

bench: $(READY)
	$(BIN)/iobmd bench copy

# Everything at once, each event checked against the kernel: SECONDS=600, EVENTS=1000000, THREADS=1, SPARE_WORKERS=1,
# SEED=1, JSON=report.json
soak: $(READY)
	$(BIN)/iobmd soak --seconds $(or $(SECONDS),60) $(if $(EVENTS),--events $(EVENTS)) $(if $(THREADS),--threads $(THREADS)) $(if $(SPARE_WORKERS),--spare-workers) $(if $(SEED),--seed $(SEED)) $(if $(JSON),--json $(JSON))

$(READY): $(SOURCES) tools/prepare
	tools/prepare "$(PYTHON)" "$(VENV)"
	touch $@

$(VENV)/.demo: $(SOURCES) tools/prepare
	tools/prepare "$(PYTHON)" "$(VENV)" ""
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info iobmd/_native/*.so tools/bench/*.so
