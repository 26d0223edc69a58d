# Everything that preparation, training and evaluation need; torch's wheels bring their own CUDA libraries, the host its driver.
#
#   docker build -t carope .
#   docker run --rm carope                                                          # train.py --help
#   docker run --rm --gpus all --ipc=host -v "$PWD/data:/app/data" -v "$PWD/runs:/app/runs" carope table1.py --nproc 2
#
# data/ and runs/ of the host must be writable for user 1000; else add --user "$(id -u):$(id -g)".
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 \
    PATH=/opt/venv/bin:$PATH USER=carope HOME=/tmp/home HF_HOME=/app/data/.huggingface
# torch.compile needs a C++ compiler and Python's headers
RUN apt-get update && apt-get install -y --no-install-recommends build-essential git python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* && python3 -m venv /opt/venv

WORKDIR /app
COPY requirements.txt .
RUN pip install --disable-pip-version-check -r requirements.txt
COPY . .
# The image's user 1000 is called ubuntu; any other may run it too
RUN mkdir -p data runs /tmp/home && chmod 1777 data runs /tmp/home && chown 1000:1000 data runs
USER 1000

ENTRYPOINT ["python"]
CMD ["train.py", "--help"]
