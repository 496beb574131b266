# make demo: the whole way on simulated particles.   make test: every test but the slow ones of make test-cluster.   make lint, make bench, make schema, make lock.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-cluster lint bench bench-quality schema lock clean-demo

# The lock is installed once, and again only when it has changed; no compiler is needed, every package is a wheel.
.venv/locked: envs/cpu.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r envs/cpu.lock
	touch $@

.venv/installed: .venv/locked pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

.venv: .venv/installed

demo: .venv/installed
	snakemake --profile cluster/local --configfile workflow/config/demo.yaml --quiet host reason
	cryospire summary demo

clean-demo:
	rm -rf demo

test: .venv/installed
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile -m "not slow"

# Everything that goes wrong on a cluster, on a real SLURM that the tests start, about a quarter of an hour.
test-cluster: .venv/installed
	OMP_NUM_THREADS=1 python -m pytest tests/cluster

lint: .venv/installed
	ruff check .
	mypy
	snakemake --lint --configfile workflow/config/demo.yaml

# Speed of training on this machine, a few minutes.
bench: .venv/installed
	cryospire bench --output bench.json

# The phantom at one level and one seed; every data set and level: workflow/benchmark/Snakefile without these.
bench-quality: .venv/installed
	snakemake --snakefile workflow/benchmark/Snakefile --cores all --config datasets='[phantom]' levels='[hard]' seeds='[0]'

schema: .venv/installed
	python -c 'import json; from cryospire import config; print(json.dumps(config.schema(), indent=1))' > workflow/schemas/config.schema.json

# After a change of pyproject.toml: a fresh environment from its ranges, written down.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet '.[test]'
	.venv-lock/bin/python -m pip freeze --exclude cryospire --exclude setuptools | sed 's/^\(torch==[0-9.]*\)+.*/\1/' > envs/cpu.lock
	rm -rf .venv-lock
