# Everything a person does with this project, by name. `make help` lists it.
# The first of them that runs; another one by PYTHON=/path/to/python.
PYTHON ?= $(shell for each in python3.11 python3.12 python3.13; do $$each -c "" 2> /dev/null && echo $$each && break; done)
VENV   := .venv
PY     := $(VENV)/bin/python

# For local-train, compare, tune, submit and audit: DATA=folder; for all but the last: CONFIG=file.yaml WORKERS=n RUN=name
# For compare: MODELS=file.yaml too, of contenders as in fracture/configs/comparisons/default.yaml; for tune: TRIALS=n
# For schedule: DATA=, CONFIG= and WORKERS= too, REGISTRY=folder or URI, EVERY=week, NOTIFY=URL
DATA    ?=
CONFIG  ?=
WORKERS ?=
RUN     ?=
TRIALS  ?=
REGISTRY ?=
EVERY   ?=
MODELS  ?=
NOTIFY  ?=
ONLY    ?=
KILLS   ?=
FLAGS    = $(if $(DATA),--data "$(DATA)") $(if $(CONFIG),--config "$(CONFIG)") \
  $(if $(WORKERS),--workers $(WORKERS)) $(if $(RUN),--run "$(RUN)")

# The Ray of cluster-up. It reads the token from ~/.ray/auth_token; its dashboard is on loopback, its other ports are on
# every address, which is Ray's default. Its jobs find the Python of .venv.
RAY      := env RAY_AUTH_MODE=token RAY_JOB_STOP_WAIT_TIME_S=60 PATH="$(CURDIR)/$(VENV)/bin:$$PATH" ray
RAY_PID  := .ray-cluster.pid
RAY_LOG  := .ray-cluster.log
RAY_RUNS := ps -p $$(cat $(RAY_PID) 2> /dev/null || echo 0) -o args= 2> /dev/null | grep -q "ray start"

make_venv = test -x $(1)/bin/python || { test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed, and none is \
  here: install one, or name it: make setup PYTHON=/path/to/python"; exit 1; }; $(PYTHON) -m venv $(1); }

.DEFAULT_GOAL := help
.PHONY: help setup local-train compare tune cluster-up submit cluster-down schedule audit data test test-ray test-long \
  test-all bench soak lint format docs lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/installed ## make the virtual environment with the locked dependencies

# The lock brings setuptools, so that the project itself is installed without another package from the network, whose
# hash nobody would check.
$(VENV)/installed: requirements.lock pyproject.toml
	@echo "installing the locked dependencies into $(VENV) (once; about 2 minutes)"
	@$(call make_venv,$(VENV))
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

local-train: setup ## train and test on this machine; DATA= CONFIG= WORKERS= RUN= (no DATA: sample radiographs)
	@$(PY) job/train.py $(FLAGS)

compare: setup ## train models on the same folds, and say which is better; DATA= MODELS= RUN= WORKERS= CONFIG=
	@$(PY) job/compare.py $(FLAGS) $(if $(MODELS),--models "$(MODELS)")

tune: setup ## search for better settings on this machine; DATA= CONFIG= TRIALS= RUN= WORKERS= (the same RUN goes on)
	@$(PY) job/tune.py $(FLAGS) $(if $(TRIALS),--trials $(TRIALS))

# One process holds all of this Ray, so that cluster-down ends it and no other; `ray stop` would end every Ray here.
# Port 8266, since a job of local-train holds the default, 52365, and without it no job can be submitted.
cluster-up: setup ## start a Ray on this machine that stays, for `make submit`; its dashboard: http://127.0.0.1:8265
	@! $(RAY_RUNS) || { echo "it runs already; make cluster-down ends it"; exit 1; }
	@rm -f $(RAY_LOG); $(RAY) get-auth-token --generate > /dev/null
	@nohup $(RAY) start --head --block --dashboard-host=127.0.0.1 --dashboard-agent-listen-port=8266 \
	  > $(RAY_LOG) 2>&1 < /dev/null & echo $$! > $(RAY_PID)
	@until grep -qs "Ray runtime started" $(RAY_LOG); do sleep 0.5; $(RAY_RUNS) || { cat $(RAY_LOG); exit 1; }; done

submit: setup ## train on the Ray of cluster-up; DATA= (from / on, or a URI) CONFIG= WORKERS= RUN=
	@$(RAY_RUNS) || { echo "no Ray of cluster-up runs: make cluster-up first"; exit 1; }
	@$(RAY) job submit --address http://127.0.0.1:8265 --working-dir . -- python job/train.py $(FLAGS)

cluster-down: ## end the Ray of cluster-up
	@if $(RAY_RUNS); then kill $$(cat $(RAY_PID)); else echo "no Ray of cluster-up runs"; fi
	@while $(RAY_RUNS); do sleep 0.2; done; rm -f $(RAY_PID)

# Its paths are absolute: after this folder has moved, make it anew.
schedule: setup ## write a systemd timer and a crontab line; DATA= REGISTRY= EVERY=week CONFIG= WORKERS= NOTIFY=
	@$(PY) cluster/schedules/local.py --data "$(DATA)" --registry "$(REGISTRY)" $(if $(EVERY),--every "$(EVERY)") \
	  $(if $(CONFIG),--config "$(CONFIG)") $(if $(WORKERS),--workers $(WORKERS)) $(if $(NOTIFY),--notify "$(NOTIFY)")

audit: setup ## look at the radiographs in DATA= before training: copies, leakage, shortcuts
	@$(if $(DATA),,$(error name the folder of radiographs: make audit DATA=/path/to/radiographs))
	@$(PY) job/preprocess.py --audit-only --data "$(DATA)"

data: setup ## download the Kaggle set "Fracture Multi-Region X-Ray Data" into data/
	@$(PY) job/download.py --out data

$(VENV)-s3/installed: tests/object_store.lock # apart: moto wants an older python-dateutil than ours
	@$(call make_venv,$(VENV)-s3)
	@$(VENV)-s3/bin/python -m pip install --quiet --disable-pip-version-check -r tests/object_store.lock
	@touch $@

$(VENV)/pennylane: tests/pennylane.lock $(VENV)/installed # what tests compare the quantum circuit with: 220 MB
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r tests/pennylane.lock
	@touch $@

TEST_NEEDS := setup $(VENV)/pennylane $(VENV)-s3/installed

test: $(TEST_NEEDS) ## run the tests but the slow ones, on Ray a training on 1 and on 2 workers, a kill and a resume; minutes
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-ray: $(TEST_NEEDS) ## the other tests: those that run on Ray, and slow ones
	@$(PY) -m pytest -m "(slow or ray and not smoke) and not long"

test-long: $(TEST_NEEDS) ## the longest tests: hosts that are taken away (root on Linux), schedules, retrainings that are killed
	@$(PY) -m pytest -m long -rPs

test-all: test test-ray test-long ## all of these three

bench: setup ## measure, into bench.md and bench.json; DATA= ONLY=train, roof, reading, preparation, startup, scaling, copies, leaks, recipes, predicting or gpu
	@$(PY) -m tests.benchmarks.run $(if $(ONLY),--only $(ONLY)) $(if $(DATA),--data "$(DATA)")

soak: setup ## kill a training KILLS= times (20), and compare its end with an undisturbed one; 10 minutes
	@$(PY) -m tests.benchmarks.soak $(if $(KILLS),--kills $(KILLS))

lint: setup ## ruff, without changing anything
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

docs: setup ## write docs/configuration.md anew from the settings
	@$(PY) -m fracture.config_docs > docs/configuration.md

format: setup ## let ruff mend and format the code
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

# One lock for all three versions of Python. What it pins stays pinned; to have everything newer, remove it first.
lock: ## resolve the dependencies of pyproject.toml into requirements.lock
	@rm -rf .lock-venv
	@$(call make_venv,.lock-venv)
	@.lock-venv/bin/python -m pip install --quiet --disable-pip-version-check uv
	@.lock-venv/bin/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
	  --no-emit-index-url --no-annotate --custom-compile-command "make lock" --extra dev --extra kaggle --extra export \
	  --extra excel --extra archive \
	  --output-file requirements.lock pyproject.toml
	@.lock-venv/bin/python -c "import hashlib, pathlib, re; file = pathlib.Path('cluster/runtime-env.yaml'); \
	  lock = hashlib.sha256(pathlib.Path('requirements.lock').read_bytes()).hexdigest()[:12]; \
	  file.write_text(re.sub('# lock [0-9a-f]+', '# lock ' + lock, file.read_text()))"
	@rm -rf .lock-venv && grep -c == requirements.lock

clean: ## remove runs with their models, shards, audits, built wheels and sample radiographs; keeps .venv and data/
	@rm -rf runs shards audits build dist $(dir $(wildcard data/sample-*/SYNTHETIC.json))
