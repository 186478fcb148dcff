# The engine as an image: `docker build -t omnisearchsage .` then
#   docker run -v $PWD/store:/store -p 50051:50051 -p 9464:9464 omnisearchsage serve --store /store --host 0.0.0.0 --insecure
# (--insecure: whoever reaches the ports may ask; better: --tokens, see docs/howto/tls_and_tokens.md)
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python -m venv /opt/omni \
    && /opt/omni/bin/pip install --no-cache-dir -c constraints.txt torch \
    && /opt/omni/bin/pip install --no-cache-dir -c constraints.txt '.[redis,otel]'

FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* && useradd --create-home omni
COPY --from=build /opt/omni /opt/omni
ENV PATH=/opt/omni/bin:$PATH
USER omni
ENTRYPOINT ["omni"]
CMD ["--help"]
