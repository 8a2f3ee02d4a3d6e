# The server, on CPU, or on an accelerator with another JAX:
#
#   docker build -f launch/serve.Dockerfile -t variator-serve .
#   docker build -f launch/serve.Dockerfile --build-arg JAX='jax[cuda12]' -t variator-serve .
#   docker run --rm -p 127.0.0.1:8080:8080 -v "$PWD/models:/models:ro" -v variator-cache:/cache \
#       -e VARIATOR_TOKEN variator-serve --backbone /models/backbone --plugins /models/plugins
#
# Inside it listens on all interfaces: publish the port to where it is wanted, and set a token.
FROM python:3.12-slim

ARG JAX=jax
WORKDIR /src
COPY setup.py pyproject.toml README.md LICENSE ./
COPY gin_configs gin_configs
COPY variator_jax variator_jax
RUN pip install --no-cache-dir "${JAX}" '.[serve]' && rm -rf /src

# Compiled programs, so that a restart need not compile them again.
ENV JAX_COMPILATION_CACHE_DIR=/cache PYTHONUNBUFFERED=1
RUN useradd --uid 1000 variator && mkdir /cache && chown variator /cache
USER 1000
WORKDIR /home/variator
VOLUME /cache
EXPOSE 8080
ENTRYPOINT ["variator", "serve", "--host", "0.0.0.0"]
