"""The ``README.md`` of an adapter directory: what it is and how to open it, from facts alone."""

import json
import math
from pathlib import Path
from typing import Literal

from megatron_cgn.config.schema import LoraConfig
from megatron_cgn.hf.safetensors_io import TensorTypes
from megatron_cgn.model.lora_layout import scaling

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's ``--max-lora-rank``."""


def adapter_card(
    lora: LoraConfig, *, base: str, types: TensorTypes, head: Literal["lm", "score"] = "lm"
) -> str:
    """Write a model card.

    Args:
        lora: The adapters.
        base: The model that they belong to.
        types: Types and shapes of the tensors.
        head: What the model ends in with them.

    Returns:
        Markdown, with the header that model hubs read.
    """
    count = sum(math.prod(shape) for _, shape in types.values())
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in types.values())
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype, _ in types.values()})
    kind = "DoRA" if lora.use_dora else "LoRA"
    root = "the root of the rank (rsLoRA)" if lora.use_rslora else "the rank"
    scores = head == "score"
    saved = (*lora.modules_to_save, *(("score",) if scores else ()))
    whole = ", ".join(f"`{name}`" for name in saved)
    facts = [
        f"- base model: `{base}`; the adapter is of no use without it, or with another",
        f"- kind: {kind}, rank {lora.rank}; alpha over {root} scales by {scaling(lora):g}",
        f"- matrices with an adapter: {', '.join(f'`{name}`' for name in lora.targets)}",
        f"- matrices held whole: {whole or 'none'}",
        f"- {count:,} values in {', '.join(dtypes)}, {size / 2**20:.1f} MiB",
    ]
    is_checkpoint = (Path(base) / "checkpoint.json").is_file()
    opened = "EXPORTED_BASE" if is_checkpoint else base
    return "\n".join(
        [
            "---",
            f"base_model: {json.dumps(base, ensure_ascii=False)}",
            "library_name: peft",
            "tags:",
            "- lora",
            "---",
            "",
            f"# {kind} adapter{' of a reward model' if scores else ''}",
            "",
            *facts,
            "",
            *(_exporting(base, opened) if is_checkpoint else ()),
            "## Open it",
            "",
            "```python",
            *(_opening_scorer(opened) if scores else _opening(opened)),
            "```",
            "",
            *(_merging(opened) if scores else _serving(lora, opened)),
        ]
    )


def _exporting(base: str, exported: str) -> list[str]:
    return [
        "## Export the base",
        "",
        "The base is a checkpoint of training, which `peft` and servers cannot open. Export it "
        "once:",
        "",
        "```bash",
        f"python tools/convert_checkpoint.py to-hf --input {base} --output {exported}",
        "```",
        "",
    ]


def _opening(base: str) -> list[str]:
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({base!r})",
        'model = PeftModel.from_pretrained(base, "THIS_DIRECTORY")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")',
    ]


def _opening_scorer(base: str) -> list[str]:
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")',
        f"base = AutoModelForSequenceClassification.from_pretrained({base!r}, num_labels=1)",
        "base.config.pad_token_id = tokenizer.pad_token_id",
        'model = PeftModel.from_pretrained(base, "THIS_DIRECTORY")',
    ]


def _merging(base: str) -> list[str]:
    return [
        "## Merge it",
        "",
        "Merged into the base it is a reward model like any other:",
        "",
        *_merge_command(base),
    ]


def _merge_command(base: str) -> list[str]:
    return [
        "```bash",
        f"python tools/convert_checkpoint.py merge-adapter --model {base} \\",
        "    --adapter THIS_DIRECTORY --output MERGED",
        "```",
        "",
    ]


def _serving(lora: LoraConfig, base: str) -> list[str]:
    rank = _served_rank(lora)
    if lora.use_dora or lora.modules_to_save or rank is None:
        reason = "matrices held whole" if lora.modules_to_save else f"rank {lora.rank}"
        reason = "DoRA" if lora.use_dora else reason
        return [
            "## Serve it",
            "",
            f"Servers that load adapters at run time, such as vLLM, may refuse {reason}. Merged "
            "into the",
            "base it is a model like any other:",
            "",
            *_merge_command(base),
        ]
    return [
        "## Serve it",
        "",
        "With vLLM, beside the base model:",
        "",
        "```bash",
        f"vllm serve {base} --enable-lora --max-lora-rank {rank} \\",
        "    --lora-modules adapter=THIS_DIRECTORY",
        "```",
        "",
        "Or merged into the base:",
        "",
        *_merge_command(base),
    ]


def _served_rank(lora: LoraConfig) -> int | None:
    """The smallest of vLLM's ranks that holds the adapter, if one does."""
    assert lora.rank is not None
    return next((size for size in _VLLM_RANKS if size >= lora.rank), None)
