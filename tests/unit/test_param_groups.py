"""What ``optim.param_groups`` means for a model: which parameters, which rows, when."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cgn.config.load import typed_config
from megatron_cgn.config.schema import ModelConfig, OptimConfig, ParamGroupConfig, RunConfig
from megatron_cgn.engine.group_selection import configured_groups, first_new_id, resolve_groups
from megatron_cgn.engine.param_groups import (
    END,
    Group,
    Grouping,
    uncorrected_moments,
    with_new_rows,
)
from megatron_cgn.errors import ConfigError, DataError
from megatron_cgn.model.architecture import Architecture
from tokenizer.extension import FILE_NAME, Extension, NewToken

LLAMA = Architecture(
    family="llama",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=1024,
    max_position_embeddings=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    tie_word_embeddings=False,
    qkv_bias=True,
    qk_norm=True,
    initializer_range=0.02,
)
EMBEDDING, HEAD = (None, "embedding.word_embeddings.weight"), (None, "output_layer.weight")
LAST_NORM = (None, "decoder.final_layernorm.weight")
ATTENTION, MLP = "decoder.layers.self_attention", "decoder.layers.mlp"
NORMS = (
    f"{ATTENTION}.linear_qkv.layer_norm_weight",
    f"{ATTENTION}.q_layernorm.weight",
    f"{ATTENTION}.k_layernorm.weight",
    f"{MLP}.linear_fc1.layer_norm_weight",
)
MATRICES = (f"{ATTENTION}.linear_qkv.weight", f"{ATTENTION}.linear_proj.weight")
MLP_MATRICES = (f"{MLP}.linear_fc1.weight", f"{MLP}.linear_fc2.weight")
LAYER = {*NORMS, *MATRICES, *MLP_MATRICES, f"{ATTENTION}.linear_qkv.bias"}
"""The parameters of a layer, written out."""


def _resolve(
    *groups: dict[str, Any], first_new: int | None = None, model: Architecture = LLAMA
) -> Grouping:
    grouping = resolve_groups(
        OptimConfig(param_groups=tuple(ParamGroupConfig(**group) for group in groups)),
        model,
        first_new=first_new,
    )
    assert grouping is not None
    return grouping


def _fault(*groups: dict[str, Any], **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        _resolve(*groups, **options)
    return str(caught.value)


def _group(name: str, *parameters: str, **rest: Any) -> dict[str, Any]:
    return {"name": name, "parameters": parameters, **rest}


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("embeddings", {EMBEDDING}),
        ("output", {HEAD}),
        ("norms", {LAST_NORM, *((layer, name) for layer in (0, 1) for name in NORMS)}),
        ("blocks", {(layer, name) for layer in (0, 1) for name in LAYER}),
        ("model.norm.weight", {LAST_NORM}),
        ("model.layers.*.mlp.*", {(layer, name) for layer in (0, 1) for name in MLP_MATRICES}),
        (
            "model.layers.1.self_attn.[qkv]_proj.weight",
            {(1, f"{ATTENTION}.linear_qkv.weight")},
        ),
        ("*.bias", {(layer, f"{ATTENTION}.linear_qkv.bias") for layer in (0, 1)}),
    ],
)
def test_selectors_choose(selector: str, expected: set[Any]) -> None:
    chosen, rest = _resolve(_group("a", selector, lr_mult=2.0)).groups
    assert set(chosen.rows) == expected
    assert set(rest.rows) == {
        EMBEDDING,
        HEAD,
        LAST_NORM,
        *((layer, name) for layer in (0, 1) for name in LAYER),
    } - set(expected)
    assert set(chosen.rows.values()) == set(rest.rows.values()) == {(0, END)}
    assert (chosen.name, chosen.lr_mult, rest.name, rest.lr_mult) == ("a", 2.0, "", 1.0)


def test_new_rows_and_others_part_the_embedding() -> None:
    new, rest = _resolve(
        _group("new", "embeddings", "output", rows="new"),
        _group("rest", "others", frozen_until_step=3),
        first_new=900,
    ).groups
    assert dict(new.rows) == {EMBEDDING: (900, END), HEAD: (900, END)}
    assert rest.rows[EMBEDDING] == rest.rows[HEAD] == (0, 900)
    assert rest.rows[LAST_NORM] == (0, END) and len(rest.rows) == 3 + 2 * len(LAYER)
    assert [rest.trains(step) for step in (1, 3, 4, 1000)] == [False, False, True, True]
    assert all(new.trains(step) for step in (1, 1000))
    assert rest.differs and not new.differs


def test_rows_from_goes_before_what_the_extension_says_and_gaps_are_the_rests() -> None:
    grouping = _resolve(
        _group("old", "embeddings", rows="old", rows_from=100, lr=5e-6),
        _group("new", "embeddings", rows="new", trained_until_step=2),
        first_new=900,
    )
    assert [(g.name, *span) for g, *span in grouping.of(EMBEDDING)] == [
        ("old", 0, 100),
        ("", 100, 900),
        ("new", 900, END),
    ]
    old, new, _ = grouping.groups
    assert old.lr_mult == 0.5  # of the default 1e-5
    assert [new.trains(step) for step in (1, 2, 3)] == [True, True, False]


FAULTS: dict[str, tuple[tuple[dict[str, Any], ...], dict[str, Any], list[str]]] = {
    "nothing": (
        (_group("a", "embedings", lr=1.0),),
        {},
        ["'embedings' matches nothing", "mean embeddings?"],
    ),
    "nothing-by-glob": (
        (_group("a", "model.layers.*.ffn.*", lr=1.0),),
        {},
        ["'model.layers.*.ffn.*' matches nothing", "did you mean model.layers."],
    ),
    "nothing-like-it": (
        (_group("a", "ß", lr=1.0),),
        {},
        ["matches nothing", "choose from embeddings"],
    ),
    "fused": (
        (_group("a", "*.q_proj.weight", lr=1.0),),
        {},
        ["leaves out model.layers.0.self_attn.k_proj.weight, model.layers.0.self_attn.v_proj"],
    ),
    "overlap": (
        (_group("a", "blocks", lr=1.0), _group("b", "norms", lr=2.0)),
        {},
        ["[b].parameters: overlaps 'a' in 8 parameter(s)", "decoder.layers.0.mlp.linear_fc1"],
    ),
    "overlapping-rows": (
        (_group("a", "embeddings", lr=1.0), _group("b", "embeddings", rows="new", lr=2.0)),
        {"first_new": 900},
        ["[b].parameters: overlaps 'a' in 1 parameter(s)", "rows=old and rows=new"],
    ),
    "rows-of-a-layer": (
        (_group("a", "model.layers.*.mlp.*", rows="new", rows_from=5, lr=1.0),),
        {},
        ["[a].rows: new", "model.layers.0.mlp.gate_proj.weight are not those of tokens"],
    ),
    "not-extended": (
        (_group("a", "embeddings", rows="new", lr=1.0),),
        {},
        ["[a].rows: new", "no vocab_extension.json", "rows_from"],
    ),
    "beyond": (
        (_group("a", "embeddings", rows="new", rows_from=1024, lr=1.0),),
        {},
        ["[a].rows_from: 1024", "has 1024 rows", "at most 1023"],
    ),
    "model-not-extended": (
        (_group("a", "embeddings", rows="new", lr=1.0),),
        {"first_new": 2000},
        ["vocab_extension.json names: 2000", "has 1024 rows"],
    ),
    "others-of-nothing": (
        (_group("a", "*", lr=1.0), _group("b", "others", lr=2.0)),
        {},
        ["[b].parameters: others is nothing"],
    ),
    "others-twice": (
        (_group("a", "others", lr=1.0), _group("b", "others", lr=2.0)),
        {},
        ["[b].parameters: others is nothing"],
    ),
    "decay-of-norms": (
        (_group("a", "norms", weight_decay=1.0),),
        {},
        ["[a].weight_decay: 1.0 has no effect"],
    ),
    "all-frozen-at-first": (
        (_group("a", "*", frozen_until_step=2),),
        {},
        ["step 1 would train nothing"],
    ),
    "all-frozen-later": (
        (
            _group("a", "embeddings", trained_until_step=4),
            _group("b", "others", frozen_until_step=6),
        ),
        {},
        ["step 5 would train nothing"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_told_with_its_remedy(name: str) -> None:
    groups, options, parts = FAULTS[name]
    message = _fault(*groups, **options)
    assert len(message.splitlines()) == 1
    assert message.startswith("optim.param_groups")
    for part in parts:
        assert part in message


def test_all_faults_are_told_at_once() -> None:
    message = _fault(
        _group("a", "embedings", "*.up_proj.weight", lr=1.0),
        _group("b", "embeddings", rows="new", lr=1.0),
    )
    assert len(message.splitlines()) == 3


def test_a_tied_model_has_no_output_of_its_own() -> None:
    from dataclasses import replace

    tied = replace(LLAMA, tie_word_embeddings=True)
    message = _fault(_group("a", "embeddings", "output", lr=1.0), model=tied)
    assert "the model's output layer is its embedding" in message
    assert message.count("\n") == 0


def _write_extension(directory: Path) -> None:
    token = NewToken(
        id=900, token="ab", text="ab", old_ids=(1, 2), frequency=1, spread=1, origin="corpus"
    )
    extension = Extension(
        old_vocab_size=900, new_tokens=(token,), old_fingerprint="a", new_fingerprint="b"
    )
    directory.mkdir(exist_ok=True)
    (directory / FILE_NAME).write_text(json.dumps(extension.to_json()), "utf-8")


@pytest.mark.parametrize("checkpoint", [False, True])
def test_new_rows_are_found_beside_the_model(tmp_path: Path, checkpoint: bool) -> None:
    _write_extension(tmp_path / "hf" if checkpoint else tmp_path)
    if checkpoint:
        (tmp_path / "checkpoint.json").write_text("{}")
    groups = (ParamGroupConfig(name="new", parameters=("embeddings",), rows="new", lr=1e-4),)
    run = RunConfig(
        model=ModelConfig(hf_path=str(tmp_path)), optim=OptimConfig(param_groups=groups)
    )
    grouping = configured_groups(run, LLAMA)
    assert grouping is not None and grouping.groups[0].rows == {EMBEDDING: (900, END)}
    assert configured_groups(RunConfig(), LLAMA) is None


def test_a_damaged_extension_is_named(tmp_path: Path) -> None:
    assert first_new_id(tmp_path) is None
    for content in ("{", "[]", '{"version": 9}'):
        (tmp_path / FILE_NAME).write_text(content)
        with pytest.raises(DataError, match=str(tmp_path / FILE_NAME)):
            first_new_id(tmp_path)


def test_updates_return_by_parameter_and_row() -> None:
    grouping = _resolve(
        _group("new", "embeddings", rows="new", rows_from=900),
        _group("rest", "others", frozen_until_step=3),
    )
    record = json.loads(json.dumps(grouping.record({"new": 7, "rest": 4})))
    assert grouping.restored_steps(record, 7) == {"new": 7, "rest": 4}
    other = Grouping(
        (
            Group(name="mlp", rows={(0, MLP_MATRICES[0]): (0, END)}),
            Group(name="rows", rows={EMBEDDING: (950, END)}),
            Group(name="both", rows={EMBEDDING: (800, 950)}),
        )
    )
    assert other.restored_steps(record, 9) == {"mlp": 4, "rows": 7, "both": 7}
    assert other.restored_steps(None, 9) == {"mlp": 9, "rows": 9, "both": 9}


@pytest.mark.parametrize("recorded", [False, True])
def test_new_rows_of_a_resized_checkpoint_are_counted_from_zero(recorded: bool) -> None:
    """Whether or not the run before had groups, one of which is cut by the new rows."""
    before = _resolve(_group("a", "embeddings", rows="new", rows_from=500, lr_mult=2.0))
    given = before.record({"a": 5, "": 8}) if recorded else None
    record = with_new_rows(given, {EMBEDDING[1]: 900, HEAD[1]: 900}, 8)
    warm_up = _resolve(
        _group("new", "embeddings", "output", rows="new", rows_from=900),
        _group("rest", "others", frozen_until_step=3),
    )
    assert warm_up.restored_steps(record, 8) == {"new": 0, "rest": 8}
    ranges = Grouping(
        (
            Group(name="first", rows={EMBEDDING: (0, 500)}),
            Group(name="second", rows={EMBEDDING: (500, 900)}),
            Group(name="third", rows={EMBEDDING: (900, END), HEAD: (900, END)}),
        )
    )
    assert with_new_rows(given, {}, 8) is given
    counts = {"first": 8, "second": 5 if recorded else 8, "third": 0}
    assert ranges.restored_steps(record, 8) == counts


def test_adam_without_its_correction_is_told() -> None:
    """Moments of one gradient g are (1-b1) g and (1-b2) g², so that their ratio is known."""
    record: list[dict[str, Any]] = [
        {"steps": 1000, "rows": [[None, EMBEDDING[1], 0, 900]]},
        {"steps": 0, "rows": [[None, EMBEDDING[1], 900, END]]},
    ]
    # 0.1 / sqrt(0.05), and 0.1 / sqrt(0.001 / (1 - 0.999**1001)): not yet the 3.16 of many more.
    for beta2, figure in ((0.95, "0.45"), (0.999, "2.52")):
        optim = OptimConfig(adam_beta2=beta2)
        told = uncorrected_moments(record, None, {"": 1000}, optim=optim)
        assert told is not None and f"{figure} of the learning rate" in told
        assert f"{EMBEDDING[1]} from row 900 on" in told
    groups = _resolve(_group("new", "embeddings", rows="new", rows_from=900, lr_mult=2.0))
    optim = OptimConfig()
    assert uncorrected_moments(record, groups, {"new": 0, "": 1000}, optim=optim) is None
    assert uncorrected_moments(None, None, {"": 1000}, optim=optim) is None
    whole = _resolve(_group("all", "embeddings", lr_mult=2.0))
    assert uncorrected_moments(record, whole, {"all": 1000, "": 1000}, optim=optim)
    # A group that has just been frozen so far, and goes on as it is.
    frozen = [{"steps": 0, "rows": [[None, EMBEDDING[1], 0, END]]}]
    assert uncorrected_moments(frozen, whole, {"all": 0, "": 9}, optim=optim) is None


def test_groups_are_described() -> None:
    grouping = _resolve(
        _group("new", "embeddings", "output", rows="new", rows_from=900, lr_mult=3.0),
        _group("rest", "others", frozen_until_step=100, weight_decay=0.0),
    )
    assert list(grouping.describe(lr=2e-5, weight_decay=0.1)) == [
        "group new: 2 parameter(s) (rows from 900 on), peak learning rate 6e-05, weight decay 0.1",
        f"group rest: {len(LAYER) * 2 + 3} parameter(s) (rows 0 to 899 of 2 of them), "
        "peak learning rate 2e-05, weight decay 0, frozen until step 100",
    ]
    alone = _resolve(_group("norms", "norms", trained_until_step=0))
    first, second = alone.describe(lr=1e-5, weight_decay=0.1)
    assert first.endswith("never trained")
    assert second.startswith("group of all else: ")


def test_groups_are_read_from_yaml_values() -> None:
    values = {"name": "new", "parameters": ["embeddings"], "rows": "new", "rows_from": 900}
    run = typed_config({"optim": {"param_groups": [values]}})
    assert run.optim.param_groups == (
        ParamGroupConfig(name="new", parameters=("embeddings",), rows="new", rows_from=900),
    )
    with pytest.raises(ConfigError, match="param_groups.0.lrmult: unknown key; did you mean "):
        typed_config({"optim": {"param_groups": [{**values, "lrmult": 2.0}]}})
