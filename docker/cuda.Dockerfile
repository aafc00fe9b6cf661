# mim3d on NVIDIA GPUs: `segment` (the default) and `embed`, from /input to /output with the weights in /weights.
# Build in the root of the repository: docker build -f docker/cuda.Dockerfile -t mim3d:cuda .
# The image runs offline and as a user without rights; docs/how-to/container.md says how.

FROM python:3.12.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/mim3d
ENV PATH="/opt/mim3d/bin:$PATH"
WORKDIR /src
COPY constraints.txt ./
# The build of the package index brings CUDA along; the host needs a driver and the NVIDIA Container Toolkit alone.
RUN pip install --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --constraint constraints.txt ".[dicom]"

FROM python:3.12.11-slim-bookworm AS run
COPY --from=build /opt/mim3d /opt/mim3d
COPY docker/segment docker/embed /usr/local/bin/
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin mim3d \
    && install --directory --owner mim3d /input /output /weights
# Any user may be named by `docker run --user`: what is cached goes where all may write, and libraries ask for a name.
ENV PATH="/opt/mim3d/bin:$PATH" HOME=/tmp USER=mim3d MPLCONFIGDIR=/tmp/matplotlib PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
WORKDIR /tmp

FROM run AS embed
ENTRYPOINT ["embed"]

FROM run AS segment
ENTRYPOINT ["segment"]
