# `make demo` and `make test` do all their set-up: Debian packages (as root), a virtual environment, the build.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := pyproject.toml iobmd/_version.py $(wildcard cython_ext/*)

.PHONY: demo test test-vm vm-shell lint docs bench clean

demo: $(READY)
	$(BIN)/iobmd doctor
	$(BIN)/iobmd demo

test: $(READY)
	$(BIN)/pytest $(PYTEST_ARGS)

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

$(READY): $(SOURCES) tools/prepare
	tools/prepare "$(PYTHON)" "$(VENV)"
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info iobmd/_native/*.so
