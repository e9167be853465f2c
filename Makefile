# Every target does its own set-up: a virtual environment in .venv, installed from constraints.txt.
SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Plans made here read the price table as it is; nothing is fetched in the background.
export SLM_REFRESH := never
DEMO_HOME ?= $(CURDIR)/.demo
LOCAL := env -u AWS_PROFILE -u AWS_ACCESS_KEY_ID -u AWS_SECRET_ACCESS_KEY -u GOOGLE_APPLICATION_CREDENTIALS

.PHONY: setup lint test demo e2e lab lab-short prove bench gpu lock clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,plot,cloud,dev]'
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -n 2 -m "not gpu and not e2e"

# The demo's runs live in a home of their own and see no cloud credentials: nothing can be rented by accident.
demo: $(STAMP)
	$(LOCAL) SLM_HOME="$(DEMO_HOME)" $(BIN)/slm plan demo --backend local
	$(LOCAL) SLM_HOME="$(DEMO_HOME)" $(BIN)/slm launch demo --backend local --yes

# End-to-end proofs as `.ci/run` runs them; `make prove` is the full size.
e2e: $(STAMP)
	$(BIN)/python -m pytest -m e2e tests/e2e --ignore=tests/e2e/cloudlab
	$(BIN)/python bench/prove_demo.py
	$(BIN)/python bench/prove_budget.py --steps 300 --share 0.5
	$(BIN)/python bench/prove_kills.py --kills 2
	$(BIN)/python bench/prove_cap_local.py --minutes 1
	$(BIN)/python bench/prove_recover.py --steps 150
	$(BIN)/python -m bench.prove_resume --kills 4
	$(BIN)/python -m bench.prove_store_kills --kills 20
	$(BIN)/python bench/prove_interrupts.py --moments 3
	$(BIN)/python bench/prove_mutations.py
	$(BIN)/python bench/gpu.py --tiny

# SkyPilot's clusters on a real Slurm in network namespaces: Debian 12, root, 22 minutes; skipped with the reason elsewhere.
lab: $(STAMP)
	$(BIN)/python -m pytest -m e2e tests/e2e/cloudlab

# The scenarios of it that `.ci/run` plays: a node that vanishes, a preemption, no supervisor, the cap.
lab-short: $(STAMP)
	$(BIN)/python -m pytest -m "e2e and short" tests/e2e/cloudlab

prove: $(STAMP)
	$(BIN)/python -m pytest -m e2e tests/e2e
	$(BIN)/python bench/prove_demo.py
	$(BIN)/python bench/prove_budget.py
	$(BIN)/python bench/prove_kills.py --kills 20
	$(BIN)/python bench/prove_cap_local.py --minutes 10
	$(BIN)/python bench/prove_recover.py
	$(BIN)/python -m bench.recovery
	$(BIN)/python bench/cap_faults.py --schedules 10000 --seed 1 --fault-free 4
	$(BIN)/python bench/crash_points.py --profile aws
	$(BIN)/python bench/crash_points.py --profile kubernetes
	$(BIN)/python bench/prove_interrupts.py --moments 12
	$(BIN)/python -m bench.prove_resume --kills 50
	$(BIN)/python -m bench.prove_store_kills --kills 500
	$(BIN)/python bench/prove_mutations.py

# Measurements, kept with date, machine and command in bench/results; DATA holds runs_public.csv and spot traces.
DATA ?= ../shared/data
bench: $(STAMP)
	$(BIN)/python bench/keep.py estimate-accuracy -- python bench/estimate_accuracy.py $(DATA)/runs_public.csv --json
	$(BIN)/python bench/keep.py policy -- python bench/policy.py $(DATA)/traces/aws-v100-feb-2023 --budget 100 \
	  --spot 0.918 --on-demand 3.06 --deadline 120 --startup 12 --lost 7.5 --starts 150 --seed 0 --json
	$(BIN)/python bench/keep.py plan-speed -- python bench/plan_speed.py --json
	$(BIN)/python bench/keep.py checkpoint -- python bench/checkpoint.py
	$(BIN)/python bench/keep.py recovery-local -- python -m bench.recovery_local --rounds 3 --json
	$(BIN)/python bench/keep.py loader -- python bench/loader.py --json
	$(BIN)/python bench/keep.py tokenize -- python bench/tokenize.py --json
	$(BIN)/python bench/keep.py exactness -- python bench/exactness.py --json
	$(BIN)/python bench/keep.py goodput -- python bench/goodput.py --json

# On a machine with a CUDA device; without `make` any Python >= 3.11 with torch, lightning, numpy and transformers does:
# python bench/gpu.py --out gpu.json
gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python bench/keep.py gpu -- python bench/gpu.py --json

# What `make` installs, remade from the ranges in pyproject.toml with SkyPilot's own pins kept.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --upgrade pip
	build/lock/bin/python -m pip install --quiet torch==2.13.0
	build/lock/bin/python -m pip install --quiet -e '.[train,plot,cloud,dev]' 'click<8.2' 'protobuf<7'
	(sed -n '/^#/p' constraints.txt; build/lock/bin/python -m pip freeze --exclude-editable --exclude pip \
	  --exclude setuptools --exclude wheel | sed 's/+cpu//') > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:
	rm -rf $(VENV) .demo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
