"""The steps of `lora_runs` with `peft`, `transformers` and PyTorch alone."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_runs import global_batch, plain_rate
from lora_runs import CLIP, TIMES, Share
from torch import Tensor

from megatron_cgn.config.schema import LoraConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftOutcome:
    """Figures of every step, what `peft` drew, and what it trained, by our names."""

    losses: list[float]
    grad_norms: list[float]
    drawn: dict[str, Tensor]
    after: dict[int, dict[str, Tensor]]
    """By number of steps."""


def peft_loop(
    path: Path,
    lora: LoraConfig,
    first: Mapping[str, Share],
    *,
    steps: Collection[int],
    first_row: int = 0,
) -> PeftOutcome:
    """Train adapters that begin like ours.

    Args:
        path: The model's Hugging Face directory.
        lora: Settings.
        first: Our adapters before the first step, whole.
        steps: After which of the schedule's steps the weights are kept; the last ends it.
        first_row: Rows of the matrices trained whole before this one stay as they are.

    Returns:
        The outcome.
    """
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    # A wrapper copies the matrices that are trained whole, which unties them unless told.
    tied = base.config.tie_word_embeddings and bool(lora.modules_to_save)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model: Any = peft.get_peft_model(
            base,
            peft.LoraConfig(
                r=lora.rank,
                lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,
                target_modules=list(lora.targets),
                use_rslora=lora.use_rslora,
                use_dora=lora.use_dora,
                modules_to_save=list(lora.modules_to_save) or None,
                task_type="CAUSAL_LM",
                **({"ensure_weight_tying": True} if tied else {}),
            ),
        )
    trained = {_our_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    drawn = {name: p.detach().clone() for name, p in trained.items()}
    for name, share in first.items():
        if name.startswith("adapters."):
            trained[name].data.copy_(torch.from_numpy(share.value))
    whole = [p for n, p in trained.items() if not n.startswith("adapters.")]
    kept = [p.detach()[:first_row].clone() for p in whole]
    matrices = [p for p in trained.values() if p.dim() > 1]
    vectors = [p for p in trained.values() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.0,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    model.train()
    losses, norms = [], []
    after: dict[int, dict[str, Tensor]] = {}
    for step in range(max(steps)):
        batch = global_batch(step)
        logits = model(input_ids=batch.tokens, use_cache=False).logits.float()
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), reduction="none"
        )
        mask = batch.loss_mask.flatten()
        loss = (nll * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        for p in whole:
            assert p.grad is not None
            p.grad[:first_row] = 0.0
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = plain_rate(step) * TIMES
        optimizer.step()
        for p, rows in zip(whole, kept, strict=True):
            p.data[:first_row] = rows
        losses.append(loss.item())
        if step + 1 in steps:
            after[step + 1] = {name: p.detach().clone() for name, p in trained.items()}
    return PeftOutcome(losses=losses, grad_norms=norms, drawn=drawn, after=after)


def _our_name(name: str) -> str:
    """Name of one of `peft`'s parameters in our checkpoints."""
    parts = name.split(".")
    if "lora_A" in parts or "lora_B" in parts or "lora_magnitude_vector" in parts:
        place = parts.index("layers")
        return f"adapters.layers.{parts[place + 1]}.{parts[place + 3]}.{parts[place + 4]}"
    return "output_layer.weight" if "lm_head" in parts else "embedding.word_embeddings.weight"
