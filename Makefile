# `make demo` and `make test` work on a fresh machine with python3 (3.11 or later), pip, make and a C++ compiler.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
GPU_PY ?= python3
OUT ?= results
LAB_JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
# On a machine that others use too, threads that spin for each other long hold up each other
export GOMP_SPINCOUNT ?= 10000

.PHONY: help demo test test-slow test-all lab lab-gpu faults soak gpu clean-demo

help: ## these lines
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

demo: $(VENV)/.installed ## a small Table 1 on this machine: embedded corpus, five encodings, figure, samples
	@echo "1 of 3: text from the documentation of Python's packages on this machine, as tokens: seconds"
	$(PY) prepare_fineweb.py --source demo --tokenizer bytes --out data/demo
	@echo "2 of 3: five small GPTs, each trained and evaluated: half a minute each on two idle cores, longer on a busy machine"
	$(PY) table1.py --sizes demo --encodings rope carope carope_hidden learned sinusoidal --lengths 64 128 256 512 --max_tokens 65536
	@echo "3 of 3: what one of them writes: seconds"
	$(PY) sample.py runs/demo-carope_hidden --prompt "Return the " --prompt "The class " --max_new_tokens 160
	@echo
	@echo "Runs with their logs and checkpoints: runs/demo-*; the table and its figure: runs/table1.md, runs/table1.png"
	@echo "Next: $(PY) sample.py runs/demo-carope --prompt \"A module is\"      more text, other prompts"
	@echo "      $(PY) train.py config/demo.toml config/nope.toml --steps=500  another encoding, other options (--help)"
	@echo "      $(PY) table1.py --dry_run                                     what the paper's own table takes"
	@echo "      $(PY) -m lab.report runs/demo-* -o report.html                curves, tables and samples of the runs on one page"

# One more than there are cores: tests wait for processes and disks, too
PYTEST := $(PY) -m pytest -n $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1) --maxprocesses 5 --dist loadfile

test: $(VENV)/.installed-dev ## style, types and the tests but the slow ones: five minutes on two cores
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy .
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed-dev ## what takes longer: more faults, kernels compiled for a GPU, benchmarks at toy size
	$(PYTEST) -m "slow and not soak"

test-all: test test-slow ## both

lab: $(VENV)/.installed ## every encoding with three seeds on this CPU, hours that may be interrupted: runs/lab.md
	$(PY) prepare_fineweb.py --source demo --tokenizer bytes --out data/demo
	$(PY) -m lab.sweep --jobs $(LAB_JOBS) $(LAB_ARGS)

faults: $(VENV)/.installed-dev ## every fault of docs/reliability.md injected: a table, and results/faults.json
	$(PY) -m pytest tests/faults -m "not soak" --faults results/faults.json
	$(PY) tests/fault_report.py

soak: $(VENV)/.installed-dev ## 25 random kills each of training, preparation and table1.py: results/soak.json
	$(PY) -m pytest tests/faults -m soak --faults results/soak.json
	$(PY) tests/fault_report.py

gpu: ## everything that needs a GPU, in ten minutes; results in OUT; runs GPU_PY, a python3 with torch (docs/performance.md)
	$(GPU_PY) -m lab.bench.gpu --out $(OUT) $(GPU_ARGS)

lab-gpu: ## the laboratory alone: a small GPT with many encodings; run it again to continue
	$(GPU_PY) -m lab.bench.gpu --out $(OUT) --only lab $(GPU_ARGS)

clean-demo: ## forget the demo's data and runs
	rm -rf data/demo runs/demo-* runs/table1.*

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; make PYTHON=python3.11 (or later) uses another one" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m pip install --user virtualenv && $(PYTHON) -m virtualenv $(VENV); }

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(PY) -m pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(PY) -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	@touch $@
