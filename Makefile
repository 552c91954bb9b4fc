# Everything here creates .venv on its own and again when its inputs change.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -P
PIP := $(RUN) -m pip -qq --disable-pip-version-check install -c constraints.txt
INPUTS := pyproject.toml constraints.txt

.PHONY: setup demo test models lint types bench docs clean
.DELETE_ON_ERROR:

setup: $(VENV)/.dev
	@echo ".venv is ready"

# What running and drawing the examples needs.
$(VENV)/.run: $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit("trainc needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	@echo "Setting up .venv: trainc, torch and what the examples need"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade "pip>=25.1"
	@$(PIP) -e ".[examples,plots]"
	@touch $@

# What working on trainc needs, on top.
$(VENV)/.dev: $(VENV)/.run
	@echo "Setting up .venv: test tools, transformers and triton"
	@$(PIP) -e ".[examples,plots,triton]" --group dev
	@touch $@

demo: $(VENV)/.run
	@$(RUN) examples/demo.py

# Triton reads TRITON_INTERPRET when it is first imported, so its interpreter gets a process of its own.
test: $(VENV)/.dev
	@echo "Testing the Triton sources in the interpreter"
	@TRITON_INTERPRET=1 $(RUN) -m pytest -q -n 2 -m interpreter
	@echo "Testing everything else"
	@$(RUN) -m pytest -q -n 2 -m "not interpreter and not models"

# timm needs torchvision, whose build for CUDA breaks transformers beside a CPU torch: they have a folder of their own.
# Where they cannot be installed, their models are left out. So are Lightning, which would bring a torch of its own, and
# TensorBoard, and torchft, of which there is no build for every system.
models: $(VENV)/.dev
	@test -d $(VENV)/models || $(PIP) --no-deps --target $(VENV)/models timm torchvision \
		|| { rm -rf $(VENV)/models; echo "timm cannot be installed: its models are left out"; }
	@test -d $(VENV)/frameworks || $(PIP) --no-deps --target $(VENV)/frameworks \
		lightning pytorch-lightning lightning-utilities torchmetrics \
		tensorboard tensorboard-data-server absl-py grpcio markdown protobuf werkzeug \
		|| { rm -rf $(VENV)/frameworks; echo "Lightning and TensorBoard cannot be installed: they are left out"; }
	@test -d $(VENV)/torchft || { $(PIP) --target $(VENV)/torchft opentelemetry-sdk opentelemetry-exporter-otlp-proto-http \
		&& $(PIP) --no-deps --target $(VENV)/torchft torchft; } \
		|| { rm -rf $(VENV)/torchft; echo "torchft cannot be installed: its tests are left out"; }
	@echo "Testing models and frameworks of other libraries"
	@PYTHONPATH=$(VENV)/models:$(VENV)/frameworks:$(VENV)/torchft $(RUN) -m pytest -q -n 2 -m models

lint: $(VENV)/.dev
	@echo "Linting"
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --quiet --check .

types: $(VENV)/.dev
	@echo "Checking types"
	@$(VENV)/bin/mypy --no-error-summary

bench: $(VENV)/.dev
	@$(RUN) benchmarks/run.py

docs: $(VENV)/.run
	@$(RUN) docs/generate.py

clean:
	@echo "Removing .venv and everything generated"
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage runs demo-out
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
