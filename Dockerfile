# For GPUs: Transformer Engine and Apex come with the base image, built for its CUDA and PyTorch.
#
#     docker build -t megatron-cgn .
#     docker run --gpus all --ipc host -v /data:/data megatron-cgn \
#         torchrun --nproc-per-node 8 train.py +stage=cpt output_dir=/data/runs/cpt …

ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE_IMAGE}

WORKDIR /opt/megatron-cgn

# Dependencies first: they change less often than the code. What the image has already (its own
# build of PyTorch, and what was compiled against it) stays as it is; the rest gets our versions.
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY megatron_cgn/__init__.py megatron_cgn/__init__.py
COPY tokenizer/__init__.py tokenizer/__init__.py
RUN pip list --format freeze | awk -F == '{print "^" $1 "=="}' > /tmp/installed \
    && grep -vif /tmp/installed constraints.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt --editable '.[corpus,fast]' \
    && rm /tmp/installed /tmp/constraints.txt

COPY . .

RUN useradd --create-home trainer && chown trainer /opt/megatron-cgn
USER trainer
ENV HF_HUB_OFFLINE=1
