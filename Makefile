# Each target makes the virtual environment it needs. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Of 18,000 installed modules few are imported, by many processes: the first of them compiles each, and keeps it.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test pytest lint bench clean

demo: $(STAMP)  ## train on recall with one memory, a wide one and a mixture; then a small hybrid on real text
	$(BIN)/linear-moe demo --output demo-output

# Side by side: where nothing is cached, checking types takes one core 40 s.
test: $(STAMP)  ## every check and test
	@$(MAKE) --no-print-directory --jobs 2 lint pytest

pytest: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)  ## style, types, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(STAMP)  ## the chunked form against the token loop, on this CPU
	$(BIN)/python benchmarks/chunked_vs_recurrent.py

# pip first: the one that comes with Python 3.11 looks at every file of a hundred packages for 40 s longer.
# Then torch alone: asked for by another package, an installer may take a build of several GB that a CPU has no use for.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@$(INSTALL) pip
	@echo "installing torch into $(VENV)"
	@$(INSTALL) torch
	@echo "installing linear_moe and its tools into $(VENV)"
	@$(INSTALL) --editable '.[dev]'
	@touch $@

clean:  ## remove everything that the targets made
	rm -rf $(VENV) build dist demo-output .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
