# Everything a person does with this project, by name. `make help` lists it.
PYTHON ?= python3.11
VENV   := .venv
PY     := $(VENV)/bin/python

# For local-train and audit: DATA=folder; for local-train: CONFIG=file.yaml WORKERS=n RUN=name
DATA    ?=
CONFIG  ?=
WORKERS ?=
RUN     ?=
ONLY    ?=

.DEFAULT_GOAL := help
.PHONY: help setup local-train audit data test bench check lint format lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/installed ## make the virtual environment with the locked dependencies

$(VENV)/installed: requirements.lock
	@echo "installing the locked dependencies into $(VENV) (once; about 2 minutes)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

local-train: setup ## train and test on this machine; DATA= CONFIG= WORKERS= RUN= (no DATA: sample radiographs)
	@$(PY) job/train.py $(if $(DATA),--data "$(DATA)") $(if $(CONFIG),--config "$(CONFIG)") \
	  $(if $(WORKERS),--workers $(WORKERS)) $(if $(RUN),--run "$(RUN)")

audit: setup ## look at the radiographs in DATA= before training: copies, leakage, shortcuts
	@$(if $(DATA),,$(error name the folder of radiographs: make audit DATA=/path/to/radiographs))
	@$(PY) job/preprocess.py --audit-only --data "$(DATA)"

data: setup ## download the Kaggle set "Fracture Multi-Region X-Ray Data" into data/
	@$(PY) job/download.py --out data

$(VENV)-s3/installed: tests/object_store.lock # apart: moto wants an older python-dateutil than ours
	@test -x $(VENV)-s3/bin/python || $(PYTHON) -m venv $(VENV)-s3
	@$(VENV)-s3/bin/python -m pip install --quiet --disable-pip-version-check -r tests/object_store.lock
	@touch $@

test: setup $(VENV)-s3/installed ## run all tests, also those that train on Ray
	@$(PY) -m pytest

bench: setup ## measure, into bench.md and bench.json; DATA= ONLY=train, roof, reading, preparation, startup, scaling, copies, leaks or recipes
	@$(PY) -m tests.benchmarks.run $(if $(ONLY),--only $(ONLY)) $(if $(DATA),--data "$(DATA)")

check: lint test ## what CI runs, and the linter

lint: setup ## ruff, without changing anything
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

format: setup ## let ruff mend and format the code
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

lock: ## resolve the dependencies of pyproject.toml anew into requirements.lock
	@rm -rf .lock-venv && $(PYTHON) -m venv .lock-venv
	@.lock-venv/bin/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print('\n'.join(p['dependencies'] + sum(p['optional-dependencies'].values(), [])))" > .lock-venv/wanted.txt
	@.lock-venv/bin/python -m pip install --quiet -r .lock-venv/wanted.txt
	@.lock-venv/bin/python -m pip freeze > requirements.lock
	@rm -rf .lock-venv && wc -l requirements.lock

clean: ## remove runs with their models, shards, audits and sample radiographs; keeps .venv and data/
	@rm -rf runs shards audits $(dir $(wildcard data/sample-*/SYNTHETIC.json))
