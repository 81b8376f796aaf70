# Trainer, server and client in one image.
#
#   docker build -t gpt_dist .
#   docker build -t gpt_dist:cuda --build-arg BASE_IMAGE=nvidia/cuda:12.9.1-runtime-ubuntu24.04 .
#   docker run -v "$PWD/work:/work" gpt_dist train --config shakespeare-char-cpu
#   docker run -v "$PWD/work:/work" -p 127.0.0.1:50051:50051 gpt_dist \
#     serve --checkpoint runs/shakespeare-char-cpu --allow-insecure
#   docker run --network host gpt_dist client generate "ROMEO:" --stream
#
# Any Debian or Ubuntu base with Python 3.11 or newer to install will do. A torch that the base
# brings along is used where it fits the pin. PIP_ARGS goes to pip, for another package index.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS base
# g++ stays in the image: kernels and torch.compile are compiled on the machine that
# runs them, for its CPU or GPU.
RUN if ! command -v g++ || ! python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))'; \
    then apt-get update \
      && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
         g++ python3 python3-venv python3-dev \
      && rm -rf /var/lib/apt/lists/*; \
    fi

FROM base AS build
ARG PIP_ARGS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# Dependencies first: this layer stays when only the source changes.
COPY pyproject.toml constraints.txt ./
RUN python3 -m venv --system-site-packages /opt/gpt_dist \
 && python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
 && /opt/gpt_dist/bin/pip install ${PIP_ARGS} -c constraints.txt -r requirements.txt
COPY README.md LICENSE ./
COPY configs configs
COPY gpt_dist gpt_dist
COPY serve serve
RUN /opt/gpt_dist/bin/pip install ${PIP_ARGS} -c constraints.txt --no-deps .

FROM base
RUN useradd --create-home --user-group gpt && mkdir /work && chown gpt:gpt /work
COPY --from=build /opt/gpt_dist /opt/gpt_dist
COPY launch/local.sh launch/container/entrypoint.sh launch/container/health.sh /usr/local/bin/
ENV PATH=/opt/gpt_dist/bin:$PATH PYTHONUNBUFFERED=1 GPT_DIST_SERVE_HOST=0.0.0.0
USER gpt
WORKDIR /work
EXPOSE 50051 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 CMD ["health.sh"]
ENTRYPOINT ["entrypoint.sh"]
CMD ["help"]
