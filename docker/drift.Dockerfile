# The drift service: checks the request log on a schedule (docs/docker.md).
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim

FROM ${PYTHON_IMAGE} AS packages
WORKDIR /build
RUN python -m venv --without-pip /opt/venv
COPY pyproject.toml constraints.txt docker/requirements.py ./
RUN python requirements.py drift gs > requirements.txt \
    && pip --python /opt/venv/bin/python install --no-cache-dir -c constraints.txt -r requirements.txt
# hadolint ignore=DL3003
RUN cd /opt/venv/lib/python3*/site-packages \
    && find numpy pandas pyarrow scipy sklearn statsmodels -type d -name tests -prune -exec rm -r {} +

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

FROM ${PYTHON_IMAGE}
ENV PATH=/opt/sodaops/bin:/opt/venv/bin:$PATH PYTHONPATH=/opt/sodaops PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp USER=sodaops PORT=8080 SODAOPS_DRIFT_HOST=0.0.0.0 SODAOPS_DRIFT_OUTPUT_DIR=/tmp/drift
WORKDIR /app
COPY docker/healthcheck.py ./
COPY --from=packages /opt/venv /opt/venv
COPY --from=code /opt/sodaops /opt/sodaops
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "healthcheck.py", "/healthz", "SODAOPS_DRIFT_PORT"]
ENTRYPOINT ["python", "-m", "sodaops.drift"]
