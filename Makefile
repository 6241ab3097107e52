# Every target makes its own virtual environment first; it needs Python 3.11 to 3.13 and the package index.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
DEMO ?= runs/demo
# The demo's certificates: every DEMO_SKIP-th test image, DEMO_N votes each.
DEMO_SKIP ?= 10
DEMO_N ?= 10000

# Of test-faults: SEED=7 gives the same order of cases again, INJECTIONS=1000 takes as long as these need, SECONDS=600
# another time, and CASE='merge/write/1/EIO' repeats a single case.
FAULTS := $(foreach name,SEED INJECTIONS SECONDS CASE,$(if $($(name)),--$(shell echo $(name) | tr A-Z a-z)='$($(name))'))

.PHONY: demo test test-docs test-all test-torch test-faults docs lint format clean

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"error: Python {v[0]}.{v[1]} at {sys.executable}: use 3.11 to 3.13, make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# Trains both methods, certifies the same test images with each, compares. Run again, it continues.
demo: $(VENV)/installed
	$(RUN) train.py --config=configs/demo.py --workdir=$(DEMO)/consistency
	$(RUN) train.py --config=configs/demo.py:method=gaussian --workdir=$(DEMO)/gaussian
	$(RUN) certify.py --workdir=$(DEMO)/consistency --skip=$(DEMO_SKIP) --n=$(DEMO_N)
	$(RUN) certify.py --workdir=$(DEMO)/gaussian --skip=$(DEMO_SKIP) --n=$(DEMO_N)
	$(RUN) analyze.py $(DEMO)/consistency $(DEMO)/gaussian --radii 0 0.5 1 1.5 --output=$(DEMO)

# Two files at a time, on a core each; all but tests/documentation. Compiled programs stay in .pytest_cache.
test: $(VENV)/installed
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The notebooks, the documentation with its commands and examples, the installed commands.
test-docs: $(VENV)/installed
	$(RUN) -m pytest -n 2 --dist worksteal tests/documentation

# All of it, with the tests that take longer than their worth in every run.
test-all: $(VENV)/installed
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "" tests tests/documentation

# What needs PyTorch, which no other target installs: its checkpoints, read and written, and the published training
# steps, which ours must equal. None of it is skipped here.
# PyTorch's build for the CPU is smaller than what pip takes by default; PIP_EXTRA_INDEX_URL can name where it is.
test-torch: $(VENV)/installed-torch
	RS_CONSISTENCY_NEEDS_TORCH=1 $(RUN) -m pytest -n 2 tests/models/test_torch_checkpoints.py tests/cli/test_torch.py tests/methods/test_published_steps.py

$(VENV)/installed-torch: $(VENV)/installed
	$(RUN) -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[torch]'
	touch $@

# For 3 minutes: each program killed, or its disk failing, at any write, fsync, rename, ... (tests/faults); and arbitrary
# files and counts. Needs a C compiler. A failure names the command that repeats it.
test-faults: $(VENV)/installed
	$(RUN) -m tests.faults $(FAULTS)

# The documentation, to docs/_build/html/index.html.
docs: $(VENV)/installed
	$(RUN) -m sphinx -W --keep-going -q -b html docs docs/_build/html

# The one gate: format, lint, types on public functions, and which package may import which (pyproject.toml).
lint: $(VENV)/installed
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(VENV)/bin/lint-imports

format: $(VENV)/installed
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) runs/demo docs/_build build *.egg-info
