"""The head's loss over tensor-parallel ranks, against dense PyTorch, and the gradients too."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megatron_cgn.model import linear_cross_entropy as module
from megatron_cgn.model.linear_cross_entropy import NOT_PREDICTED, HeadCall, score_labels
from megatron_cgn.testing import run_distributed

SEQUENCES, LENGTH, WIDTH = 2, 6, 8
PADDED, VOCABULARY = 32, 29
"""Of two ranks' 16 rows each, the second's last three are no ids."""
FP32_RTOL = 1e-6
"""Sums of at most 32 terms in another order."""
FP64_RTOL = 1e-12
"""Likewise in FP64."""
HALF_RTOL = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Two roundings to 8 or 11 bits."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One way of calling the head."""

    dtype: torch.dtype = torch.float32
    frozen: bool = False
    main_grad: bool = False
    overlap: bool = False
    counted: bool = True
    sequence_parallel: bool = False
    predict: bool = True


CASES = {
    "trained": Case(),
    "trained-fp64": Case(dtype=torch.float64),
    "frozen": Case(frozen=True),
    "frozen-fp64": Case(frozen=True, dtype=torch.float64),
    "main-grad": Case(main_grad=True),
    "main-grad-overlap": Case(main_grad=True, overlap=True, predict=False),
    "main-grad-bf16": Case(main_grad=True, dtype=torch.bfloat16),
    "frozen-bf16": Case(frozen=True, dtype=torch.bfloat16),
    "frozen-fp16": Case(frozen=True, dtype=torch.float16),
    "all-tokens": Case(counted=False),
    "sequence-parallel": Case(sequence_parallel=True),
    "sequence-parallel-frozen": Case(sequence_parallel=True, frozen=True),
}


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, all rows of the matrix, labels, what counts, and losses' gradients."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(LENGTH, SEQUENCES, WIDTH, generator=generator, dtype=torch.float64)
    matrix = torch.randn(PADDED, WIDTH, generator=generator, dtype=torch.float64) * 2
    # Two columns are equal, on different ranks: the lower must be predicted.
    matrix[20] = matrix[3]
    hidden[1, 0] = 3 * matrix[3]
    # A label so improbable that its probability is zero in FP32.
    hidden[2, 1] = 30 * matrix[4]
    labels = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    counted = torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.7
    counted[0, 1] = counted[1, 2] = True
    by_nll = torch.rand(SEQUENCES, LENGTH, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), matrix.to(dtype), labels, counted, by_nll


def _run(case: Case) -> dict[str, Any]:
    """This rank's answers."""
    group = dist.group.WORLD
    assert group is not None
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, matrix, labels, counted, by_nll = _inputs(case.dtype)
    width = PADDED // size
    weight = torch.nn.Parameter(matrix[rank * width : (rank + 1) * width].clone())
    weight.requires_grad_(not case.frozen)
    if case.main_grad:  # one micro-batch has been here before
        weight.main_grad = torch.ones(weight.shape)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    if case.sequence_parallel:
        hidden = hidden.chunk(size)[rank].clone()
    gathered: list[Any] = []
    layer = SimpleNamespace(
        tp_group=group,
        weight=weight,
        sequence_parallel=case.sequence_parallel,
        num_valid=min(max(VOCABULARY - rank * width, 0), width),
        _forward_pre_hooks={"gather": lambda module, args: gathered.append(module)},
    )
    call = HeadCall(
        counted=counted if case.counted else None,
        predict=case.predict,
        overlap_grad_reduce=case.overlap,
    )
    hidden.requires_grad_()
    nll = score_labels(
        hidden_states=hidden, output_layer=layer, output_weight=None, labels=labels, context=call
    )
    assert gathered == [layer], "Megatron waits for gathered weights in the layer's hooks"
    nll.backward(by_nll.to(nll.dtype))
    by_weight = None if case.frozen else weight.grad
    if case.main_grad:
        if case.overlap:  # what Megatron's hook does with a gradient that is in its buffer
            assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
            assert weight.grad is not None and not weight.grad.any()
        else:
            assert weight.grad is None
        by_weight = weight.main_grad - 1.0  # type: ignore[attr-defined]
    with torch.no_grad():
        scored = score_labels(
            hidden_states=hidden,
            output_layer=layer,
            output_weight=None,
            labels=labels,
            context=HeadCall(counted=call.counted),
        )
    assert torch.equal(scored, nll)
    return {"nll": nll, "predicted": call.predicted, "hidden": hidden.grad, "weight": by_weight}


def _run_all(rows_of_a_chunk: int) -> dict[str, dict[str, Any]]:
    from megatron_cgn.parallel import cpu

    torch.set_num_threads(1)
    cpu.install()
    dist.init_process_group("gloo")
    module._CHUNK_LOGITS = {"cpu": rows_of_a_chunk * PADDED // dist.get_world_size()}
    return {
        name: {k: v if v is None else v.detach().double().numpy() for k, v in _run(case).items()}
        for name, case in CASES.items()
    }


@pytest.fixture(scope="module", params=[(1, 3), (2, 4), (2, 100)], ids=["alone", "tp2", "tp2-one"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, dict[str, Any]]]:
    """Every case's answers of each rank; processes, and rows of logits at a time."""
    world_size, rows = request.param
    return run_distributed(_run_all, world_size, rows)


def _dense(case: Case) -> dict[str, Tensor]:
    """The same in FP64 with all logits, from the rounded inputs."""
    hidden, matrix, labels, counted, by_nll = _inputs(case.dtype)
    hidden, matrix = hidden.double().requires_grad_(), matrix.double().requires_grad_()
    logits = (hidden @ matrix[:VOCABULARY].T).transpose(0, 1)
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    nll = nll.view_as(labels)
    predicted = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)  # the first of equals
    if case.counted:
        nll = torch.where(counted, nll, 0.0)
        predicted = torch.where(counted, predicted, NOT_PREDICTED)
    nll.backward(by_nll)
    assert hidden.grad is not None and matrix.grad is not None
    return {
        "nll": nll.detach(),
        "predicted": predicted,
        "hidden": hidden.grad,
        "weight": matrix.grad,
    }


@pytest.mark.parametrize("name", CASES)
def test_losses_predictions_and_gradients_are_those_of_all_logits(
    ranks: list[dict[str, dict[str, Any]]], name: str
) -> None:
    case, expected = CASES[name], _dense(CASES[name])
    answers = [{k: _tensor(v) for k, v in rank[name].items()} for rank in ranks]
    limit = HALF_RTOL.get(case.dtype, FP64_RTOL if case.dtype == torch.float64 else FP32_RTOL)
    for answer in answers:
        _assert_close(answer["nll"], expected["nll"], limit)
        if case.predict and case.dtype not in HALF_RTOL:
            assert torch.equal(answer["predicted"].long(), expected["predicted"])
        assert (answer["predicted"] is None) == (not case.predict)
        if not case.sequence_parallel:
            _assert_close(answer["hidden"], expected["hidden"], 10 * limit)
    if case.sequence_parallel:
        _assert_close(torch.cat([a["hidden"] for a in answers]), expected["hidden"], 10 * limit)
    if not case.frozen:
        rows = torch.cat([a["weight"] for a in answers])
        _assert_close(rows, expected["weight"], 10 * limit)
        assert not rows[VOCABULARY:].any()


def _tensor(array: Any) -> Any:
    return None if array is None else torch.from_numpy(array)


def _assert_close(value: Tensor, expected: Tensor, limit: float) -> None:
    """Compare on the scale of the largest: a difference of large numbers may be small."""
    assert float((value - expected).abs().max()) <= limit * float(expected.abs().max())
