"""Every recipe composes, and is valid on the number of processes that its first lines name."""

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_cgn.config.load import CONFIG_DIR, load_config
from megatron_cgn.config.schema import RunConfig
from megatron_cgn.config.validate import validate, validate_architecture
from megatron_cgn.engine.group_selection import resolve_groups
from megatron_cgn.model.architecture import Architecture

RECIPES = sorted(p.stem for p in (CONFIG_DIR / "experiment").glob("*.yaml"))
PROCESSES = {
    "quickstart": 2,
    "cpt_llama3_8b": 8,
    "cpt_llama3_70b": 64,
    "cpt_extended_vocab": 8,
    "sft_quickstart": 2,
    "sft_llama3_8b": 8,
    "sft_qwen3_8b": 8,
    "sft_lora_llama3_8b": 8,
    "sft_lora_llama3_70b": 8,
    "sft_lora_qwen3_8b": 8,
    "sft_lora_qwen3_32b": 8,
    "dpo_quickstart": 2,
    "dpo_llama3_8b": 8,
    "dpo_qwen3_8b": 8,
    "dpo_lora_llama3_8b": 8,
    "dpo_lora_llama3_70b": 8,
    "dpo_lora_qwen3_8b": 8,
    "dpo_lora_qwen3_32b": 8,
    "rm_llama3_8b": 8,
    "rm_qwen3_8b": 8,
    "rm_lora_llama3_70b": 8,
    "rm_lora_qwen3_32b": 8,
}
# Where a recipe does not say "start N processes".
SAID = {"quickstart": "two CPU processes", "sft_quickstart": "two CPU", "dpo_quickstart": "two CPU"}
GIVEN = ["model.hf_path=models/base", "data.validation_fraction=0.01"]
INDEX = "data.sources=[{name: domain, path: data/domain}]"
FILE = "data.sources=[{name: domain, path: data/domain.jsonl}]"
LLAMA3_70B = Architecture(
    family="llama",
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=8192,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=None,
    tie_word_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
    initializer_range=0.02,
)
LLAMA3_8B = dataclasses.replace(
    LLAMA3_70B,
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
)
QWEN3_8B = dataclasses.replace(
    LLAMA3_8B,
    family="qwen3",
    num_layers=36,
    ffn_hidden_size=12288,
    vocab_size=151936,
    max_position_embeddings=40960,
)
QWEN3_32B = dataclasses.replace(
    QWEN3_8B, num_layers=64, hidden_size=5120, ffn_hidden_size=25600, num_attention_heads=64
)
MODELS = {
    "llama3_8b": LLAMA3_8B,
    "llama3_70b": LLAMA3_70B,
    "qwen3_8b": QWEN3_8B,
    "qwen3_32b": QWEN3_32B,
}
TUNING = sorted(
    n for n in RECIPES if n.startswith(("sft_", "dpo_", "rm_")) and not n.endswith("quickstart")
)


def _load(name: str) -> RunConfig:
    stage = next((s for s in ("sft", "dpo", "rm") if name.startswith(f"{s}_")), "cpt")
    sources = INDEX if stage == "cpt" else FILE
    return load_config([f"+stage={stage}", f"+experiment={name}", sources, *GIVEN])


def _text(name: str) -> str:
    """A recipe's comments as one line."""
    text = (Path(CONFIG_DIR) / "experiment" / f"{name}.yaml").read_text("utf-8")
    return " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line[0] == "#")


def _matrices(a: Architecture) -> dict[str, tuple[int, int]]:
    """Rows and columns of a layer's matrices."""
    heads, shared = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    wide, inner = a.hidden_size, a.ffn_hidden_size
    return {
        "q_proj": (heads, wide),
        "k_proj": (shared, wide),
        "v_proj": (shared, wide),
        "o_proj": (wide, heads),
        "gate_proj": (inner, wide),
        "up_proj": (inner, wide),
        "down_proj": (wide, inner),
    }


def test_every_recipe_is_known_here() -> None:
    assert set(RECIPES) == set(PROCESSES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_valid(name: str) -> None:
    run = _load(name)
    validate(run, world_size=PROCESSES[name])
    assert SAID.get(name, f"start {PROCESSES[name]} processes") in _text(name)


@pytest.mark.parametrize("name", TUNING)
def test_tuning_recipe_fits_its_model_and_its_gpus(name: str) -> None:
    """The figures of a recipe's comment are those of the closed forms."""
    run, text = _load(name), _text(name)
    stage, _, model = name.partition("_")
    a = MODELS[model.removeprefix("lora_")]
    if stage == "rm":
        a = dataclasses.replace(a, head="score")
    validate_architecture(run, a)
    tp, rank = run.parallel.tensor_model_parallel_size, run.lora.rank
    dp = PROCESSES[name] // tp
    matrices = _matrices(a)
    weights = a.num_layers * sum(r * c for r, c in matrices.values())
    # A reward model has no output layer.
    weights += (2 if a.head == "lm" else 1) * a.vocab_size * a.hidden_size
    named = weights if tp == 8 else weights / tp  # "an eighth of the …"
    assert f"{named / 1e9:.1f} × 10⁹ weights" in text
    if rank is None:
        share = weights / tp
        parts = [2 * share, 4 * share, 12 * share / dp]
    else:
        # Row-parallel matrices share A's columns and repeat B, the others the other way round.
        repeated = sum(r if n in ("o_proj", "down_proj") else c for n, (r, c) in matrices.items())
        everything = sum(r + c for r, c in matrices.values())
        adapters = a.num_layers * rank * everything
        held = a.num_layers * rank * (repeated + (everything - repeated) / tp)
        assert f"{adapters / 1e6:.0f} million ({100 * adapters / weights:.1f} %)" in text
        parts = [2 * weights / tp, held * (2 + 4 + 12 / dp)]
    activations = 34 * run.data.seq_length * a.hidden_size * a.num_layers / tp
    for part in (*parts, activations):
        shown = f"{part / 1e9:.0f}" if part > 2e9 else f"{part / 1e9:.1f}"
        assert re.search(rf"\b{re.escape(shown)} GB", text), (shown, text)
    total = sum(parts) + activations
    assert f"About {total / 1e9:.0f} GB in all" in text
    assert total < 80e9


def test_extended_vocabulary_fits_an_untied_model_with_new_rows() -> None:
    run = _load("cpt_extended_vocab")
    grouping = resolve_groups(run.optim, LLAMA3_70B, first_new=128_000)
    assert grouping is not None
    new, rest = grouping.groups
    assert (new.trains(1), rest.trains(100), rest.trains(101)) == (True, False, True)


def test_70b_layout_cuts_the_model() -> None:
    run = _load("cpt_llama3_70b")
    validate_architecture(run, LLAMA3_70B)
