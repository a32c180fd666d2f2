"""Every recipe composes, and is valid on the number of processes that its first lines name."""

from pathlib import Path

import pytest

from megatron_cgn.config.load import CONFIG_DIR, load_config
from megatron_cgn.config.validate import validate, validate_architecture
from megatron_cgn.engine.group_selection import resolve_groups
from megatron_cgn.model.architecture import Architecture

RECIPES = sorted(p.stem for p in (CONFIG_DIR / "experiment").glob("*.yaml"))
PROCESSES = {
    "quickstart": 2,
    "cpt_llama3_8b": 8,
    "cpt_llama3_70b": 64,
    "cpt_extended_vocab": 8,
}
SAID = {"quickstart": "two CPU processes"}  # where a recipe does not say "start N processes"
GIVEN = [
    "model.hf_path=models/base",
    "data.sources=[{name: domain, path: data/domain}]",
    "data.validation_fraction=0.01",
]
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


def test_every_recipe_is_known_here() -> None:
    assert set(RECIPES) == set(PROCESSES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_valid(name: str) -> None:
    run = load_config(["+stage=cpt", f"+experiment={name}", *GIVEN])
    validate(run, world_size=PROCESSES[name])
    text = (Path(CONFIG_DIR) / "experiment" / f"{name}.yaml").read_text("utf-8")
    assert run.stage == "cpt"
    assert SAID.get(name, f"start {PROCESSES[name]} processes") in text


def test_extended_vocabulary_fits_an_untied_model_with_new_rows() -> None:
    run = load_config(["+stage=cpt", "+experiment=cpt_extended_vocab", *GIVEN])
    grouping = resolve_groups(run.optim, LLAMA3_70B, first_new=128_000)
    assert grouping is not None
    new, rest = grouping.groups
    assert (new.trains(1), rest.trains(100), rest.trains(101)) == (True, False, True)


def test_70b_layout_cuts_the_model() -> None:
    run = load_config(["+stage=cpt", "+experiment=cpt_llama3_70b", *GIVEN])
    validate_architecture(run, LLAMA3_70B)
