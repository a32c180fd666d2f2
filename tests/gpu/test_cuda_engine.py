"""The same training on one CUDA device as on the CPU, without Transformer Engine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cgn.parallel import cpu
from megatron_cgn.testing import tiny_hf_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FP32_DEVICE_RTOL = 1e-4
"""FP32 on two devices: other matrix kernels, over five steps. TF32 is off by default."""
BF16_DEVICE_RTOL = 2e-2
"""BF16 keeps 8 bits; losses near 7 over five steps."""

SCRIPT = """
import json, sys, torch
from megatron_cgn.config.schema import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from megatron_cgn.data.loader import collate
from megatron_cgn.engine.engine import Engine
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.load import load_weights
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel.state import initialize_parallel

path, precision, recompute, documents = sys.argv[1:]
run = RunConfig(
    precision=precision,
    model=ModelConfig(hf_path=path, backend="native"),
    data=DataConfig(seq_length=64),
    train=TrainConfig(global_batch_size=4, train_iters=5, recompute=recompute),
    optim=OptimConfig(lr=1e-3, min_lr=1e-4),
)
state = initialize_parallel(run.parallel)
architecture = read_architecture(path)
engine = Engine(run, architecture, state, total_steps=5)
load_weights(engine.chunks, path, architecture=architecture, groups=state.groups)
engine.prepare_training()
draw = torch.Generator().manual_seed(3)
losses = []
for _ in range(5):
    batches = []
    for _ in range(2):
        ids = torch.randint(0, 1000, (2, 65), generator=draw)
        ids[torch.rand(2, 65, generator=draw) < 0.1] = 2
        rows = [{
            "tokens": row[:-1], "labels": row[1:], "loss_mask": torch.ones(64),
            "position_ids": torch.arange(64),
        } for row in ids]
        batches.append(collate(rows, eod_id=2 if documents == "apart" else None))
    losses.append(engine.train_step(batches, NextToken()).metrics["loss"])
print("LOSSES " + json.dumps(losses))
"""


def _losses(
    path: Path, precision: str, *, cuda: bool, recompute: str = "none", documents: str = "joined"
) -> list[float]:
    environment = dict(os.environ)
    if not cuda:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), precision, recompute, documents],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    line = next(x for x in done.stdout.splitlines() if x.startswith("LOSSES "))
    losses: list[float] = json.loads(line.removeprefix("LOSSES "))
    return losses


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_model(tmp_path_factory.mktemp("model"), "qwen3")


def test_cpu_backend_stays_off_where_cuda_is() -> None:
    assert cpu.install() is False
    assert cpu.device().type == "cuda"


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_fp32_losses_equal_those_of_the_cpu(model: Path, recompute: str) -> None:
    on_cpu = _losses(model, "fp32", cuda=False)
    on_cuda = _losses(model, "fp32", cuda=True, recompute=recompute)
    assert on_cuda == pytest.approx(on_cpu, rel=FP32_DEVICE_RTOL)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_losses_stay_near_fp32(model: Path, precision: str) -> None:
    reference: Any = _losses(model, "fp32", cuda=False)
    assert _losses(model, precision, cuda=True) == pytest.approx(reference, rel=BF16_DEVICE_RTOL)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_documents_apart_have_the_losses_of_the_cpu(model: Path, precision: str) -> None:
    """FP32 goes document by document; half precision through the packed kernel, where it is."""
    apart = _losses(model, "fp32", cuda=False, documents="apart")
    joined = _losses(model, "fp32", cuda=False)
    tolerance = FP32_DEVICE_RTOL if precision == "fp32" else BF16_DEVICE_RTOL
    assert _losses(model, precision, cuda=True, documents="apart") == pytest.approx(
        apart, rel=tolerance
    )
    assert apart != pytest.approx(joined, rel=FP32_DEVICE_RTOL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_kernel_sees_its_own_sequences_only(dtype: torch.dtype) -> None:
    """The kernel against attention sequence by sequence, also for parts of a row."""
    from megatron_cgn.model import attention
    from megatron_cgn.model.packing import PackedRow, pack_row

    if attention._varlen_kernel() is None:
        pytest.skip("this PyTorch has no packed kernel with grouped queries")
    draw = torch.Generator(device="cuda").manual_seed(1)
    shapes = ((128, 6, 64), (128, 2, 64), (128, 2, 64))
    q, k, v = (torch.randn(s, generator=draw, device="cuda", dtype=dtype) for s in shapes)
    bounds = torch.tensor([0, 1, 40, 41, 100, 128], dtype=torch.int32)
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        packed = pack_row(
            bounds,
            position_ids=torch.arange(128 // size, device="cuda")[None],
            backend="native",
            cp_rank=rank,
            cp_size=size,
        )
        assert isinstance(packed, PackedRow)
        chunks = [0] if size == 1 else [rank, 2 * size - 1 - rank]
        for chunk, span in zip(chunks, packed.spans, strict=True):
            queries = q.split(sum(span.query_lengths))[chunk]
            args = (queries, k[span.keys], v[span.keys], span)
            ours = attention.attend_packed(*args, scale=None)
            plain = [x.float() for x in args[:3]]  # no kernel takes FP32: one by one
            expected = attention.attend_packed(plain[0], plain[1], plain[2], span, scale=None)
            torch.testing.assert_close(ours.float(), expected, rtol=2**-6, atol=2**-6)
