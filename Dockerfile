# dsv4 on a machine with an NVIDIA GPU: runs and serves packed stores, with compiled kernels inside.
#
#   docker build --build-arg ARCH=sm_90a --tag dsv4 .
#   docker run --gpus all --ulimit memlock=-1 -it -v ./packed:/packed:ro dsv4 run /packed
#
# The host brings the driver and NVIDIA's container toolkit; torch brings its CUDA libraries. Which
# driver it wants depends on its version: TORCH chooses another one.

FROM python:3.11-slim AS kernels
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ARG TORCH="torch==2.13.0"
ARG TORCH_INDEX="https://download.pytorch.org/whl/cpu"
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$TORCH"
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY dsv4 dsv4
RUN pip install --no-cache-dir ".[kernels]" "setuptools>=77"
ARG ARCH="sm_90a"
ARG EXPERTS="104,160"
RUN dsv4 kernels build --arch "$ARCH" --experts "$EXPERTS" --out /kernels \
    && dsv4 kernels wheel --arch "$ARCH" --from /kernels --out /wheels

FROM python:3.11-slim
ARG TORCH="torch==2.13.0"
RUN pip install --no-cache-dir "$TORCH"
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY dsv4 dsv4
COPY --from=kernels /wheels /wheels
RUN pip install --no-cache-dir ".[run,serve]" /wheels/*.whl && rm -r /source/dsv4 /wheels
RUN useradd --create-home dsv4
USER dsv4
WORKDIR /home/dsv4
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 8000
ENTRYPOINT ["dsv4"]
CMD ["--help"]
