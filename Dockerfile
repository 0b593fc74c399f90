# CPU:   docker build -t coconut_ds .
# CUDA:  docker build -t coconut_ds --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 --build-arg TORCH_BUILD=default .
#        docker run --gpus all --shm-size 2g -v "$PWD/runs:/coconut_ds/runs" coconut_ds bash launch/train.sh CONFIG
# GTX 10xx and drivers before 580: --build-arg TORCH_BUILD=cu126
ARG BASE=ubuntu:24.04
FROM ${BASE}

ARG TORCH_BUILD=default
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ numactl python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /coconut_ds
COPY . .
ENV TORCH_BUILD=${TORCH_BUILD}
RUN bash launch/setup.sh
ENV PATH=/coconut_ds/.venv/bin:${PATH}
CMD ["bash", "launch/quickstart.sh"]
