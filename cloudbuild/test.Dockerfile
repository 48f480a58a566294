# The train image plus the tests' packages; the mounted checkout replaces its sodaops (cloudbuild/ci.yaml).
ARG TRAIN_IMAGE=sodaops-train
FROM ${TRAIN_IMAGE}
# Cloud Build mounts the checkout as root's, and this image stays in the build.
# hadolint ignore=DL3002
USER 0:0
WORKDIR /build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --no-install-recommends --yes git make && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml constraints.txt docker/requirements.py ./
RUN python requirements.py dev > requirements.txt \
    && /usr/local/bin/pip --python /opt/venv/bin/python install --no-cache-dir -c constraints.txt -r requirements.txt
# Tests import from the current folder; the sodaops command comes from the image.
ENV PYTHONPATH=/workspace:/opt/sodaops
ENTRYPOINT ["python", "-m", "pytest", "-n", "2", "--dist=worksteal", "-p", "no:cacheprovider"]
