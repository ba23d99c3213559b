# make demo | test | check | slow | clean.  One environment for all, made when it is missing:
#   make test VENV=/tmp/venv PYTHON=python3.12
# pip takes its index from its own settings: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# spares the CUDA libraries on a machine without a GPU.

VENV ?= .venv
PYTHON ?= python3
ARGS ?=

BIN := $(VENV)/bin
RUN := $(BIN)/python
PIP := $(RUN) -m pip --disable-pip-version-check -qq
STAMP := $(VENV)/.halp_fx

.PHONY: demo test slow check clean help
.DELETE_ON_ERROR:

help:
	@echo "make demo    train, prune, fine-tune and export a small network (about two minutes)"
	@echo "make test    the tests; ARGS='-k groups' passes options to pytest"
	@echo "make slow    the tests that take long"
	@echo "make check   ruff, mypy and the import contracts"
	@echo "make clean   removes what the other targets leave (not the environment)"

# A stamp for each extra: installs again only when what is asked for may have changed.
$(STAMP)-%: pyproject.toml
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --editable '.[$*]'
	@touch $@

demo: $(STAMP)-demo
	$(RUN) -m halp_fx.tools.demo $(ARGS)

test: $(STAMP)-test
	$(RUN) -m pytest $(ARGS)

slow: $(STAMP)-test
	$(RUN) -m pytest -m slow $(ARGS)

check: $(STAMP)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf build dist *.egg-info demo_out .coverage htmlcov
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find halp_fx passes tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
