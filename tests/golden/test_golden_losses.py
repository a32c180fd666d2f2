"""Per-step losses of every family are those recorded in this directory.

A change here means that training changed. If it was meant to, `regenerate.py` writes new ones.
"""

import json
from pathlib import Path

import pytest
import torch
from golden_runs import FAMILIES, STEPS, batch_of, config_of, golden_file, run, write_model

LOSS_RTOL = 1e-5
GRAD_NORM_RTOL = 1e-4
"""Another machine's CPU kernels add in another order: `transformers`' other kernels move losses by
2e-7 and gradient norms by 2e-6 (tests/parity). The smallest mistakes move them by more: no weight
decay by 3e-5 and 3e-4, an Adam beta2 of 0.96 by 2e-5 and 2e-4, no clipping by 2e-4 and 2e-3."""


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_the_golden_ones(family: str, tmp_path: Path) -> None:
    golden = json.loads(golden_file(family).read_text("utf-8"))
    assert golden["config"] == config_of(family), "the model is not the recorded one"
    figures = run(write_model(tmp_path / family, family))
    assert len(golden["losses"]) == STEPS
    assert figures["losses"] == pytest.approx(golden["losses"], rel=LOSS_RTOL)
    assert figures["grad_norms"] == pytest.approx(golden["grad_norms"], rel=GRAD_NORM_RTOL)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_golden_loss_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    golden = json.loads(golden_file(family).read_text("utf-8"))
    directory = write_model(tmp_path / family, family)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    total, count = 0.0, 0.0
    with torch.no_grad():
        for batch in batch_of(0):
            logits = model(batch.tokens).logits
            nll = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), batch.labels, reduction="none"
            )
            total += float((nll * batch.loss_mask).sum())
            count += float(batch.loss_mask.sum())
    assert total / count == pytest.approx(golden["losses"][0], rel=1e-6)


def test_every_golden_file_belongs_to_a_family() -> None:
    found = {p.stem for p in golden_file("llama").parent.glob("*.json")}
    assert found == set(FAMILIES)
