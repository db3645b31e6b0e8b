# Cloud TPU, as on GKE. The TPU runtime (libtpu) comes with jax's wheels.
#   docker build --file launch/docker/tpu.Dockerfile --tag jaxtune:tpu .
FROM python:3.12.12-slim-bookworm

RUN useradd --create-home --uid 1000 jaxtune
WORKDIR /opt/jaxtune
COPY launch/docker/constraints.txt pyproject.toml README.md LICENSE ./
COPY jaxtune jaxtune
RUN pip install --no-cache-dir --constraint constraints.txt ".[tpu]"

USER 1000
WORKDIR /home/jaxtune
# Unbuffered output; the exit code is that of jaxtune.
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["jaxtune"]
