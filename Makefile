# `make demo` and `make test` do all their set-up: Debian packages (as root), a virtual environment, the build.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := pyproject.toml iobmd/_version.py $(wildcard cython_ext/* tools/bench/*.pyx)

.PHONY: demo test test-repeat fuzz test-asan test-tsan test-vm vm-shell lint docs bench soak clean

demo: $(READY)
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
    segments shared task withcopy) tests/remote/test_freeze.py $(FUZZ_TESTS) \
    tests/security/test_threads.py
test-asan:
	tools/sanitize address "$(PYTHON)" build/asan $(or $(PYTEST_ARGS),$(ASAN_TESTS))

# The native layer by several threads, under the thread sanitizer: SECONDS=600
test-tsan:
	IOBMD_FUZZ_SECONDS=$(FUZZ_SECONDS) tools/sanitize thread "$(PYTHON)" build/tsan \
	    --timeout $$(($(FUZZ_SECONDS) + 120)) $(or $(PYTEST_ARGS),tests/security/test_threads.py)

# Tests in guests: KERNELS="5.10 6.12", PROFILE="kernel" or ci, JOBS=1, VERBOSE=1, TABLE=docs/kernels.md
test-vm: $(READY)
	tools/prepare-vm
	$(BIN)/python -m iobmd.tools.vm run --kernels "$(KERNELS)" --profiles "$(PROFILE)" $(if $(JOBS),--jobs $(JOBS)) $(if $(VERBOSE),--verbose) $(if $(TABLE),--table $(TABLE))

# A shell in a guest: KERNEL=6.12, PROFILE=device
vm-shell: $(READY)
	tools/prepare-vm
	$(BIN)/python -m iobmd.tools.vm shell $(if $(KERNEL),--kernel $(KERNEL)) $(if $(PROFILE),--profile $(PROFILE))

lint: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" tools/lint

docs: $(READY)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

bench: $(READY)
	$(BIN)/iobmd bench copy

# Everything at once, each event checked against the kernel: SECONDS=600, EVENTS=1000000, THREADS=1, SPARE_WORKERS=1,
# SEED=1, JSON=report.json
soak: $(READY)
	$(BIN)/iobmd soak --seconds $(or $(SECONDS),60) $(if $(EVENTS),--events $(EVENTS)) $(if $(THREADS),--threads $(THREADS)) $(if $(SPARE_WORKERS),--spare-workers) $(if $(SEED),--seed $(SEED)) $(if $(JSON),--json $(JSON))

$(READY): $(SOURCES) tools/prepare
	tools/prepare "$(PYTHON)" "$(VENV)"
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info iobmd/_native/*.so tools/bench/*.so
