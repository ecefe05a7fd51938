# One node of a GPU cluster: training and everything else. Build from the root of the checkout:
#   docker build -f launch/docker/gpu.Dockerfile -t cliplift:gpu .
# The CUDA libraries come with torch's wheel; the host gives the driver.
FROM python:3.12-slim-bookworm

# Another CUDA version than that of the wheel pip finds: pytorch.org/get-started names the index to give.
ARG TORCH="torch==2.13.0"
ARG TORCH_INDEX=""
ARG EXTRAS="teachers,s3,gcs"

# Versions are left to the release of Debian, so that security fixes arrive. g++: torch.compile and Triton need it.
# ssh and pdsh: the deepspeed launcher over several hosts.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libc6-dev openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_NUM_THREADS=1 \
    PDSH_RCMD_TYPE=ssh

# torch in a layer of its own: gigabytes that a change of our code does not move.
# hadolint ignore=DL3013
RUN pip install "${TORCH}" ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"}

WORKDIR /opt/cliplift
COPY pyproject.toml README.md LICENSE __init__.py ./
COPY configs configs
COPY models models
COPY sharding sharding
COPY pipelines pipelines
COPY launch launch
# hadolint ignore=DL3013
RUN pip install ".[${EXTRAS}]" && cliplift --version

# Not root: files on shared volumes should not be root's. Give --user, or runAsUser, of the files' owner.
RUN useradd --create-home --uid 1000 cliplift
USER 1000
WORKDIR /work
ENTRYPOINT []
CMD ["cliplift", "doctor"]
