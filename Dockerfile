# One file, two images:
#
#   docker build --target cli    --tag dat-deploy:cli .      # export, build, validate, bench on a GPU host
#   docker build --target server --tag dat-deploy:server .   # builds and validates its engine, then serves it
#
# The server's TensorRT is that of its base image, and engines run on the version that built them, so both images take
# TENSORRT_VERSION, and the build stops where the base image has another one.
#
# 26.09 is documented with CUDA 13.4.1 and compute capability 7.5 and later:
#   https://docs.nvidia.com/deeplearning/triton-inference-server/release-notes/rel-26-09.html
# Its TensorRT is taken to be 11.3.0.99, which NVIDIA's PyTorch container of 26.09 reports; the containers of a month have
# the same one (26.07: 11.1.0.106, 26.08: 11.2.1.2). The build checks it. All versions:
#   https://docs.nvidia.com/deeplearning/frameworks/support-matrix/index.html
# In 11.1 and 11.2.1 ahead-of-time plugins lose memory at each change of batch, so 26.07 and 26.08 are not for this:
#   https://github.com/NVIDIA/TensorRT/issues/4849
ARG TRITON_TAG=26.09-py3
ARG TENSORRT_VERSION=11.3.0.99
# CUDA of torch's wheels (constraints.txt); `base` has the runtime alone, torch brings cuBLAS, cuDNN and the rest itself
ARG CUDA_TAG=13.0.3-base-ubuntu24.04
# all three are Ubuntu 24.04 with Python 3.12: what is installed in one runs in the others
ARG UBUNTU_TAG=24.04


FROM ubuntu:${UBUNTU_TAG} AS packages
ENV PATH=/opt/dat-deploy/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
# hadolint ignore=DL3008  # Ubuntu's archive drops the old version when there is a new one; the tag pins the release
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/dat-deploy
WORKDIR /usr/src/dat-deploy
COPY constraints.txt ./
# torch alone first: a layer that changes with constraints.txt, not with the code
RUN pip install --constraint constraints.txt torch
# The Python half of TensorRT. --no-deps leaves out tensorrt-cu13-libs, which the server's base image has;
# constraints.txt has the version that tests run with, which is another.
ARG TENSORRT_VERSION
RUN pip install --no-deps "tensorrt-cu13==${TENSORRT_VERSION}" "tensorrt-cu13-bindings==${TENSORRT_VERSION}"
COPY LICENSE README.md pyproject.toml ./
COPY dat_deploy dat_deploy
RUN pip install --constraint constraints.txt '.[demo,onnxruntime,package]'


FROM packages AS packages-cli
ARG TENSORRT_VERSION
RUN pip install --no-deps "tensorrt-cu13-libs==${TENSORRT_VERSION}"


FROM nvidia/cuda:${CUDA_TAG} AS cli
LABEL org.opencontainers.image.title="dat-deploy cli" \
      org.opencontainers.image.description="Export, build, validate and bench DAT and DAT++ on a GPU host" \
      org.opencontainers.image.licenses="Apache-2.0"
# hadolint ignore=DL3008  # as above
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner=1000 --group=1000 /work /var/cache/dat-deploy
COPY --from=packages-cli /opt/dat-deploy /opt/dat-deploy
# ~/.cache holds what `tune` and `build --lowering auto` found
ENV HOME=/var/cache/dat-deploy \
    PATH=/opt/dat-deploy/bin:$PATH
VOLUME ["/var/cache/dat-deploy"]
WORKDIR /work
USER 1000:1000
HEALTHCHECK NONE
ENTRYPOINT ["dat-deploy"]
CMD ["doctor"]


FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG} AS server
ARG TRITON_TAG
ARG TENSORRT_VERSION
LABEL org.opencontainers.image.title="dat-deploy server" \
      org.opencontainers.image.description="Triton Inference Server that builds and validates its DAT engine first" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="nvcr.io/nvidia/tritonserver:${TRITON_TAG}"
# NVIDIA's image says its TensorRT in TRT_VERSION, such as 11.1.0.106
RUN if [ "${TRT_VERSION%%+*}" != "${TENSORRT_VERSION}" ]; then \
        echo "tritonserver:${TRITON_TAG} has TensorRT ${TRT_VERSION}, not ${TENSORRT_VERSION}; build with" \
            "--build-arg TENSORRT_VERSION=${TRT_VERSION%%+*}, or another --build-arg TRITON_TAG" >&2; \
        exit 1; \
    fi \
    && install --directory --owner=1000 --group=1000 /var/cache/dat-deploy /var/lib/dat-deploy
COPY --from=packages /opt/dat-deploy /opt/dat-deploy
# the Python half finds the base image's libraries, and dat-deploy takes that version
RUN ["/opt/dat-deploy/bin/python", "-I", "-c", \
     "from dat_deploy.engine.tensorrt.library import import_tensorrt; import_tensorrt('tensorrt')"]
ENV HOME=/var/cache/dat-deploy
VOLUME ["/var/cache/dat-deploy"]
EXPOSE 8000 8001 8002
# the base image's user triton-server
USER 1000:1000
STOPSIGNAL SIGTERM
# the first start builds an engine and validates it: minutes in which nothing answers yet
HEALTHCHECK --interval=10s --timeout=3s --start-period=30m --retries=3 \
    CMD ["curl", "--fail", "--silent", "--output", "/dev/null", "http://127.0.0.1:8000/v2/health/ready"]
# the base image's own entry point, which looks at the driver, and then becomes ours, which becomes tritonserver
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "/opt/dat-deploy/bin/python", "-I", "-m", "dat_deploy.serving.triton.entrypoint"]
