# make demo: set up and run the whole method on a small dataset. make test: set up, lint and run the tests.
# TORCH_INDEX_URL picks the torch build (docs/INSTALL.md); VENV=... uses another environment.
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTHON := $(VENV)/bin/python
DEMO_DATA := data/demo
DEMO_RUN := demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo demo-data test soak mutants lint gpu-test bench clean

$(VENV)/.ready: requirements.txt requirements-dev.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $(TORCH)
	$(PYTHON) -m pip install -q --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@

$(DEMO_DATA)/manifest.json: $(VENV)/.ready
	$(PYTHON) prepare_caseops_data.py --demo --out $(DEMO_DATA)

demo-data: $(DEMO_DATA)/manifest.json

demo: $(DEMO_DATA)/manifest.json
	set -a && . presets/demo.env && set +a && RUN_ID=$(DEMO_RUN) DATA_PATH=$(DEMO_DATA) $(PYTHON) train_gpt.py
	OMP_NUM_THREADS=1 $(PYTHON) tools/sample.py "$${RUNS_DIR:-runs}/$(DEMO_RUN)" --device cpu --tokens 40 \
		--prompt "Return the" --prompt "This module" --prompt "If the argument"

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

test: lint
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist worksteal -m "not gpu" tests

# all faults, 50 runs with a fault each, 106,000 inputs for the readers, instead of the samples in make test; and tests
# that make test leaves out because they take long
soak: $(VENV)/.ready
	SOAK=1 SOAK_MUTATIONS=5000 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -s -v -rs -n 2 --dist worksteal --durations=15 \
		-m "not gpu" tests

# plants faults in the code, one at a time: each must make its test fail
mutants: $(VENV)/.ready
	$(PYTHON) tests/mutants.py

# on a machine with a GPU, with the active python, which has its own torch
gpu-test:
	python3 -m pytest -m gpu tests

bench:
	python3 benchmarks/bench_kernels.py
	python3 benchmarks/bench_step.py
	python3 benchmarks/bench_ttt.py steps

clean:
	rm -rf $(VENV) $(DEMO_DATA)
