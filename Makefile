# make install   everything pinned, into .venv          make demo   the embedded example, about three minutes
# make test      the whole test suite                   make check  format, lint, types, doctests
# make docs      the documentation as a site in site/  make dist   wheel and source archive in dist/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test check docs bench dist format clean

help:
	@sed -n '1,3s/^# //p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tdpo needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,check,docs,bench,dist,judge,experiments]'
	@! command -v npm > /dev/null || npm install --silent --no-fund --no-audit --prefix $(VENV) axe-core@4.11.0 || \
	  echo "axe-core was not installed: the accessibility test will be skipped"
	@touch $(STAMP)

demo: install
	$(BIN)/tdpo demo --output_dir demo-output

test: install
	$(BIN)/python -m pytest -n auto --dist loadfile

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tools/check_words.py
	$(BIN)/python -m pytest --doctest-modules src
	$(MAKE) --no-print-directory docs

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: install
	@test -n "$(PAIRS)" -a -n "$(TOKENIZER)" || { echo "usage: make bench PAIRS=pairs.jsonl TOKENIZER=name-or-folder"; exit 2; }
	$(BIN)/python benchmarks/bound.py --pairs $(PAIRS) --tokenizer $(TOKENIZER)
	$(BIN)/python benchmarks/op.py
	$(BIN)/python benchmarks/step.py --pairs $(PAIRS) --tokenizer $(TOKENIZER)
	$(BIN)/python benchmarks/reference.py --pairs $(PAIRS) --tokenizer $(TOKENIZER)
	$(BIN)/python benchmarks/data.py --pairs $(PAIRS) --tokenizer $(TOKENIZER)
	$(BIN)/python benchmarks/plot.py

dist: install  # without build/, from which setuptools would pack what earlier builds left
	rm -rf dist build
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/twine check --strict dist/*

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) demo-output build dist site .pytest_cache .mypy_cache .ruff_cache
