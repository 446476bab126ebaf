# make demo: set up, then a ViT teaches a small CNN on embedded images (offline once set up).
# make test: set up, then lint, types, import rules and documentation, two at a time, and all tests.
# make docs: set up, then the documentation as a site in build/site.
PYTHON ?= python3
VENV ?= .venv
RUN := PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 $(VENV)/bin
MKDOCS := NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

.PHONY: demo test lint types imports site docs setup clean

demo: setup
	$(RUN)/scalekd demo --out runs/demo

test: setup
	$(MAKE) --jobs 2 lint types imports site
	OMP_NUM_THREADS=1 $(RUN)/pytest -n 2 --dist worksteal

lint: setup
	$(RUN)/ruff check .

types: setup
	$(RUN)/mypy

imports: setup
	$(RUN)/lint-imports --no-cache

site: setup
	$(MKDOCS) --quiet

docs: setup
	$(MKDOCS)

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "scalekd needs Python 3.10 or later; make PYTHON=python3.12 names another")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --no-compile --editable '.[dev]'
	# on all cores; pip uses one. Some packages have templates that cannot be compiled
	$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib src || true
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
