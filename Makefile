# Finds a Python >= 3.12 that runs, makes .venv with everything in it, and runs the project's jobs.
.DELETE_ON_ERROR:
EXAMPLES := digits_vae two_causes unimodal nile repair
.PHONY: demo test slow bench calibration lint types docs examples clean $(EXAMPLES:%=example-%)

VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready
# one thread for each process: two of torch on small tensors are no faster, and fight on a busy machine
SHARED := OMP_NUM_THREADS=1

demo: $(READY)
	$(RUN)/python examples/digits_vae.py

test: $(READY)
	$(SHARED) $(RUN)/python -m pytest -n auto --dist worksteal -m "not slow"

slow: $(READY)
	$(SHARED) $(RUN)/python -m pytest -n auto --dist worksteal -m slow

bench: $(READY)
	$(RUN)/python -m pip install --quiet --editable ".[bench]"
	$(RUN)/python -m benchmarks gradients
	$(RUN)/python -m benchmarks throughput
	$(RUN)/python -m benchmarks widths --vaes 64-64-4
	$(RUN)/python -m benchmarks scaling
	$(RUN)/python -m benchmarks recording

# resumable: what was measured lies in out/calibration, and the next call goes on from there
calibration: $(READY)
	$(SHARED) $(RUN)/python -m benchmarks.calibration --out out/calibration --save benchmarks/results/calibration.json \
		--page docs/calibration.md

lint: $(READY)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: $(READY)
	$(RUN)/mypy

docs: $(READY)
	$(RUN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

# small budgets: that each runs from end to end
digits_vae := --images 100 --epochs 20 --reference-steps 50 --out out/ci
two_causes := --units 60 --steps 100 --out out/ci
unimodal := --units 20 --steps 10 --out out/ci
nile := --steps 200 --guide-steps 100 --temperatures 3 --out out/ci
repair := --steps 200 --guide-steps 100

examples: $(EXAMPLES:%=example-%)

$(EXAMPLES:%=example-%): example-%: $(READY)
	$(SHARED) $(RUN)/python examples/$*.py $($*)

$(READY): pyproject.toml .ci/find_python
	PYTHON="$$(sh .ci/find_python)" && "$$PYTHON" -m venv --clear $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) out docs/_build
