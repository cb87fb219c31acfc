# A machine on which `make test` and `make reproduce` run: docker build -t lablog . && docker run -it lablog
FROM python:3.11-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends cmake g++ git make nodejs npm \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /lablog
COPY . .
RUN make setup
EXPOSE 8888
CMD ["bash"]
