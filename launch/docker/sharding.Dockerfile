# One worker of a CPU fleet that packs videos: small, no CUDA. Build from the root of the checkout:
#   docker build -f launch/docker/sharding.Dockerfile -t cliplift:sharding .
FROM python:3.12-slim-bookworm

ARG TORCH="torch==2.13.0"
ARG TORCH_INDEX="https://download.pytorch.org/whl/cpu"
ARG EXTRAS="s3,gcs"

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_NUM_THREADS=1 \
    DS_ACCELERATOR=cpu

# Sharding itself never imports torch; the CPU build keeps pip from drawing the CUDA one as a dependency.
# hadolint ignore=DL3013
RUN pip install "${TORCH}" --index-url "${TORCH_INDEX}"

WORKDIR /opt/cliplift
COPY pyproject.toml README.md LICENSE __init__.py ./
COPY configs configs
COPY models models
COPY sharding sharding
COPY pipelines pipelines
COPY launch launch
# hadolint ignore=DL3013
RUN pip install ".[${EXTRAS}]" && cliplift --version

RUN useradd --create-home --uid 1000 cliplift
USER 1000
WORKDIR /work
ENTRYPOINT []
CMD ["cliplift", "doctor"]
