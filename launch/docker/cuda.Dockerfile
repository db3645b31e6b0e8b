# NVIDIA GPUs. CUDA comes with jax's wheels; the host provides the driver.
#   docker build --file launch/docker/cuda.Dockerfile --tag jaxtune:cuda .
#   docker run --rm --gpus all --shm-size 16g --volume /data:/runs jaxtune:cuda \
#     train --config /runs/config.py --workdir /runs/mine
FROM python:3.12.12-slim-bookworm

RUN useradd --create-home --uid 1000 jaxtune
WORKDIR /opt/jaxtune
COPY launch/docker/constraints.txt pyproject.toml README.md LICENSE ./
COPY jaxtune jaxtune
RUN pip install --no-cache-dir --constraint constraints.txt ".[cuda12]"

USER 1000
WORKDIR /home/jaxtune
# Unbuffered output; the exit code is that of jaxtune.
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["jaxtune"]
