# `make demo` and `make test` do everything, set-up included.
PYTHON ?= python3.11
PIP_FLAGS ?= --disable-pip-version-check
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CPP := $(wildcard trainer/kernels/*.cpp trainer/kernels/*.h)
# Compiled operators belong to this checkout: another one, or a build that was killed elsewhere, cannot get in its way.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions

.PHONY: install demo gpu test test-slow test-peers lint format lock clean

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -q torch==$$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.lock)
	$(BIN)/python -m pip install $(PIP_FLAGS) -q -r requirements.lock
	$(BIN)/python -m pip install $(PIP_FLAGS) -q --no-deps -e .
	touch $(STAMP)

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash configs/demo.sh

# On a machine with a CUDA device, by the Python that has torch there: nothing is installed.
gpu:
	@$(or $(wildcard $(BIN)/python),python3) -m tests.gpu.check

# A file's tests stay together: they share folders of runs. Most are one thread, or processes that wait for each other.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile

test: lint
	$(PYTEST) -m "not slow"

test-slow: install
	$(PYTEST) -m slow --durations=25

# Round trips with other trainers, which live in an environment of their own: they pin packages that this one does not.
PEERS := .venv-peers
test-peers: install $(PEERS)/.installed
	ALIGNSAE_PEERS_PYTHON=$(CURDIR)/$(PEERS)/bin/python $(BIN)/pytest tests/peers

$(PEERS)/.installed: Makefile
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install $(PIP_FLAGS) -q torch==$$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.lock)
	$(PEERS)/bin/python -m pip install $(PIP_FLAGS) -q sae-lens==6.54.12 eai-sparsify==1.3.3
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

# Pins what a fresh environment resolves to, beside the torch that is pinned already; commit the result.
lock:
	rm -rf .lock-venv && $(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install $(PIP_FLAGS) -q torch==$$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.lock)
	.lock-venv/bin/python -m pip install $(PIP_FLAGS) -q ".[dev,remote]"
	.lock-venv/bin/python -m pip freeze --exclude alignsae > .lock-venv/found
	echo "# Exact versions, read by pip; written by 'make lock'." > requirements.lock
	sed -e 's/+cpu//' -e "s/^triton==.*/&; platform_system == 'Linux'/" .lock-venv/found >> requirements.lock
	rm -rf .lock-venv build

clean:
	rm -rf $(VENV) $(PEERS) runs data models .pytest_cache .ruff_cache .mypy_cache
