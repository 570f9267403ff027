# Two images from one file: `api` without torch, `worker` with it.
FROM python:3.12-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --create-home --uid 10001 depot
WORKDIR /app
COPY pyproject.toml constraints.txt README.md alembic.ini ./
COPY lora_core ./lora_core
COPY registry ./registry
COPY migrations ./migrations
COPY api ./api
COPY worker ./worker
COPY cli ./cli
COPY demo ./demo

FROM base AS api
RUN pip install --constraint constraints.txt --editable '.[api]' \
 && mkdir -p /var/lib/depot && chown depot /var/lib/depot
USER depot
# Uploads lie here until they are in the store.
ENV DEPOT_WORK_DIR=/var/lib/depot/work
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=6 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
CMD ["uvicorn", "--factory", "api.main:create_app", "--host", "0.0.0.0", "--port", "8000", "--http", "httptools", "--timeout-graceful-shutdown", "5"]

FROM base AS worker
# On Linux x86-64 this installs torch with CUDA. For a CPU-only image build with
#   --build-arg TORCH_INDEX=<the CPU wheel index that pytorch.org names>
ARG TORCH_INDEX=
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --editable '.[worker]' \
 && mkdir -p /var/lib/depot && chown depot /var/lib/depot
USER depot
ENV DEPOT_WORK_DIR=/var/lib/depot/work DEPOT_CACHE_DIR=/var/lib/depot/cache
# A file that the worker renews while all its slots go on; outages elsewhere do not make it sick.
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s --retries=2 CMD ["python", "-m", "worker.health"]
CMD ["celery", "-A", "worker.app", "worker", "-P", "threads", "-c", "2", \
     "--without-gossip", "--without-mingle", "--without-heartbeat"]
