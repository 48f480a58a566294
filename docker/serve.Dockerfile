# The service: serves a bundle over HTTP, without torch (docs/docker.md).
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim

# The packages, pinned by constraints.txt. This stage does not depend on the code.
FROM ${PYTHON_IMAGE} AS packages
WORKDIR /build
RUN python -m venv --without-pip /opt/venv
COPY pyproject.toml constraints.txt docker/requirements.py ./
RUN python requirements.py serve otel gs > requirements.txt \
    && pip --python /opt/venv/bin/python install --no-cache-dir --no-compile -c constraints.txt -r requirements.txt
# Delete what the service does not load: tests, headers and sources, Arrow's Flight and S3 and second copies of its
# libraries, ONNX Runtime's C library (the Python module has its own) and tools, the hub's client, and debug symbols
# (numpy comes stripped).
# hadolint ignore=DL3003,DL3008
RUN apt-get update -q && apt-get install -y -q --no-install-recommends binutils && rm -rf /var/lib/apt/lists/* \
    && cd /opt/venv/lib/python3*/site-packages \
    && find numpy pyarrow -type d \( -name tests -o -name include \) -prune -exec rm -r {} + \
    && find pyarrow numpy -type f \( -name '*.py[xd]' -o -name '*.px[di]' -o -name '*.a' \) -delete \
    && rm -r pyarrow/*flight* pyarrow/*_s3* huggingface_hub* hf_xet* httpx2* httpcore2* \
        onnxruntime/capi/libonnxruntime.so.* onnxruntime/transformers onnxruntime/tools onnxruntime/quantization \
    && rm -r pyarrow/lib*.so.*.*.* pyarrow/lib*_python*.so \
    && find . -name '*.so*' -not -path './numpy*' -exec strip --strip-unneeded {} + \
    && /opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash .

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
ENV PATH=/opt/sodaops/bin:/opt/venv/bin:$PATH PYTHONPATH=/opt/sodaops PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp USER=sodaops \
    PORT=8080 SODAOPS_HOST=0.0.0.0 SODAOPS_BUNDLE=/bundle
WORKDIR /app
COPY docker/healthcheck.py ./
COPY --from=packages /opt/venv /opt/venv
COPY --from=code /opt/sodaops /opt/sodaops
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "healthcheck.py", "/readyz", "SODAOPS_PORT"]
ENTRYPOINT ["python", "-m", "sodaops.serving"]
