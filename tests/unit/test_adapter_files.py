"""Directories of `peft`: what is read, what is refused by name, and what is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import ALPHA, RANK, write_adapter
from hf_samples import write_sample
from safetensors.torch import load_file, save_file

from megatron_cgn.config.schema import LoraConfig
from megatron_cgn.errors import ConfigError, ModelError
from megatron_cgn.hf.adapter_card import adapter_card
from megatron_cgn.hf.adapter_config import config_json, read_config
from megatron_cgn.hf.adapter_file import AdapterFile, read_adapter_config
from megatron_cgn.hf.config import read_architecture


def _check(adapter: Path, model: Path) -> None:
    AdapterFile(adapter).check(read_architecture(model))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_reads_settings_and_accepts_the_model(tmp_path: Path, tied: bool, dora: bool) -> None:
    write_sample(tmp_path / "m", tied=tied)
    whole = ("embed_tokens",) if tied else ("embed_tokens", "lm_head")
    write_adapter(
        tmp_path / "a", dora=dora, whole=whole, tied=tied, use_rslora=True, lora_dropout=0.1
    )
    _check(tmp_path / "a", tmp_path / "m")
    assert read_adapter_config(tmp_path / "a") == LoraConfig(
        rank=RANK,
        alpha=ALPHA,
        dropout=0.1,
        targets=("q_proj", "v_proj", "down_proj"),
        use_rslora=True,
        use_dora=dora,
        modules_to_save=whole,
    )


@pytest.mark.parametrize(
    "patterns",
    [
        ["v_proj", "self_attn.q_proj", "mlp.down_proj"],
        [f"model.layers.{n}.self_attn.{m}_proj" for n in range(3) for m in "qv"] + ["down_proj"],
        r"model\.layers\.\d+\.(self_attn\.[qv]|mlp\.down)_proj",
        "all-linear",
    ],
)
def test_targets_are_those_with_tensors(tmp_path: Path, patterns: Any) -> None:
    write_adapter(tmp_path / "a", target_modules=patterns)
    assert read_adapter_config(tmp_path / "a").targets == ("q_proj", "v_proj", "down_proj")


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*self_attn.*"},
        {"exclude_modules": ["down_proj"]},
        {"exclude_modules": r".*\.2\.mlp\.down_proj"},
        {"target_modules": None},
    ],
)
def test_tensors_that_the_configuration_gives_no_place_are_refused(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    write_adapter(tmp_path / "a", **fields)
    with pytest.raises(ModelError, match=r"holds tensor .*_proj.*give model\.layers.* no adapter"):
        AdapterFile(tmp_path / "a")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, 'peft_type = "LOHA": only "LORA"'),
        ({"task_type": "TOKEN_CLS"}, 'task_type = "TOKEN_CLS"'),
        ({"bias": "lora_only"}, 'bias = "lora_only"'),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern = .*several ranks"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern = .*several scales"),
        ({"layers_to_transform": [0]}, r"layers_to_transform = \[0\]: .*some layers"),
        ({"layers_to_transform": 0}, "layers_to_transform = 0: .*some layers"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = true"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices = .*modules_to_save"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"lora_bias": True}, "lora_bias = true"),
        ({"use_qalora": True}, "use_qalora = true"),
        ({"megatron_config": {"a": 1}}, "megatron_config = .*unknown field"),
        ({"kasa_config": {"beta": 1}}, "kasa_config = .*unknown field"),
        ({"invented_later": 1}, "invented_later = 1: unknown field"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"modules_to_save": ["wte"]}, "modules_to_save = .*embed_tokens, lm_head, score"),
        ({"modules_to_save": "lm_head"}, "modules_to_save = .*list"),
        ({"modules_to_save": 5}, "modules_to_save = 5: expected a list"),
        ({"r": 0}, "r = 0: must be a positive integer"),
        ({"r": 4.5}, "r = 4.5: must be a positive integer"),
        ({"lora_alpha": "16"}, 'lora_alpha = "16": expected a number'),
        ({"use_dora": "yes"}, 'use_dora = "yes": expected true or false'),
        ({"target_modules": "(q_proj"}, "target_modules = .*not a regular expression"),
        ({"target_modules": [1]}, "target_modules = .*list of names"),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    write_adapter(tmp_path / "a", **fields)
    with pytest.raises(ModelError, match=message) as fault:
        read_config(tmp_path / "a")
    assert str(fault.value).startswith(f"{tmp_path / 'a' / 'adapter_config.json'}: ")


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", bias="all", lora_bias=True, r=-1)
    with pytest.raises(ModelError) as fault:
        read_config(tmp_path / "a")
    assert [line.split()[1] for line in str(fault.value).splitlines()[1:]] == [
        "bias",
        "lora_bias",
        "r",
    ]


def test_what_is_switched_off_or_only_began_the_training_is_accepted(tmp_path: Path) -> None:
    off: dict[str, Any] = {
        "kasa_config": None,
        "invented_later": False,
        "rank_pattern": {},
        "revision": "main",
    }
    write_adapter(tmp_path / "a", init_lora_weights="eva", eva_config={"rho": 2.0}, **off)
    assert read_adapter_config(tmp_path / "a").rank == RANK


def test_names_what_is_missing_or_unreadable(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a/adapter_config\.json: not found"):
        AdapterFile(tmp_path / "a")
    write_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin is a pickle"):
        AdapterFile(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.bin").unlink()
    for part in (1, 2):
        (tmp_path / "a" / f"adapter_model-0000{part}-of-00002.safetensors").touch()
    with pytest.raises(ModelError, match=r"00001-of-00002\.safetensors and 1 more found instead"):
        AdapterFile(tmp_path / "a")
    for file in (tmp_path / "a").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: not found; copy"):
        AdapterFile(tmp_path / "a")
    for text, message in (("{", "cannot be read as JSON"), ("[]", "holds a list")):
        (tmp_path / "a" / "adapter_config.json").write_text(text)
        with pytest.raises(ModelError, match=message):
            AdapterFile(tmp_path / "a")


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_names_a_truncated_file(tmp_path: Path, keep: int) -> None:
    write_adapter(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: (trunc|not a compl)"):
        AdapterFile(tmp_path / "a")


def test_tensors_of_another_model_are_named_with_both_shapes(tmp_path: Path) -> None:
    write_sample(tmp_path / "m")
    tensors = write_adapter(tmp_path / "a", whole=("lm_head",))
    file = tmp_path / "a" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    last = "base_model.model.model.layers.2."
    changes: list[tuple[dict[str, torch.Tensor], str]] = [
        (tensors | {name: torch.zeros(4, 48)}, r"lora_A.* has shape \(4, 48\).*\(4, 40\); .*base"),
        (
            tensors | {"base_model.model.lm_head.weight": torch.zeros(80, 24)},
            r"lm_head.* has shape \(80, 24\).*\(77, 24\)",
        ),
        ({n: t for n, t in tensors.items() if n != name}, rf"{name}' of shape .*is missing"),
        (
            {n: t for n, t in tensors.items() if not n.startswith(last)},
            r"adapters for 2 layers, but the model has 3; .*another model \(some/base\)",
        ),
        (tensors | {f"{last}mlp.up_proj.lora_A.weight": torch.zeros(4, 24)}, "no adapter"),
        (
            tensors | {f"{last}mlp.down_proj.lora_magnitude_vector": torch.zeros(24)},
            "lora_magnitude_vector' is not expected",
        ),
        (
            tensors | {"base_model.model.model.norm.weight": torch.zeros(24)},
            r"norm\.weight' is not supported: adapters may be on q_proj",
        ),
        (
            # What `peft` saves of adapters on an embedding.
            {"base_model.model.model.embed_tokens.base_layer.weight": torch.zeros(77, 24)},
            r"base_layer\.weight' is not supported: adapters may be on q_proj",
        ),
        (
            {n.replace("_A.weight", "_A.default.weight"): t for n, t in tensors.items()},
            r"\.default\.weight' is not supported: .*training state; save .*save_pretrained",
        ),
        (
            {n.removeprefix("base_model.model."): t for n, t in tensors.items()},
            r"'model\.layers.* is not supported: .*training state",
        ),
        (
            tensors | {"base_model.model.model.embed_tokens.weight": torch.zeros(77, 24)},
            r"embed_tokens\.weight' is not expected",
        ),
    ]
    for changed, message in changes:
        save_file(changed, file)
        with pytest.raises(ModelError, match=message):
            _check(tmp_path / "a", tmp_path / "m")
    save_file(tensors, file)
    _check(tmp_path / "a", tmp_path / "m")


def test_a_whole_matrix_that_is_not_named_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", whole=("embed_tokens",), modules_to_save=None)
    with pytest.raises(ModelError, match="modules_to_save in adapter_config.json names none"):
        AdapterFile(tmp_path / "a")


def test_a_rank_larger_than_the_matrix_is_refused(tmp_path: Path) -> None:
    write_sample(tmp_path / "m")
    write_adapter(tmp_path / "a", r=21)
    with pytest.raises(ModelError, match=r"r = 21 is larger than v_proj, which is 20 × 24"):
        _check(tmp_path / "a", tmp_path / "m")


@pytest.mark.parametrize("whole", ["embed_tokens", "lm_head"])
def test_an_adapter_that_unties_a_tied_model_is_refused(tmp_path: Path, whole: str) -> None:
    write_sample(tmp_path / "m", tied=True)
    write_adapter(tmp_path / "a", whole=(whole,))
    with pytest.raises(ModelError, match=rf"{whole}\.weight' alone, with ensure_weight_tying"):
        _check(tmp_path / "a", tmp_path / "m")


def test_two_copies_of_a_tied_matrix_must_be_equal(tmp_path: Path) -> None:
    write_sample(tmp_path / "m", tied=True)
    architecture = read_architecture(tmp_path / "m")
    write_adapter(tmp_path / "same", whole=("embed_tokens",), tied=True)
    # Trained as two though the model has one.
    write_adapter(tmp_path / "two", whole=("embed_tokens", "lm_head"))
    for name in ("same", "two"):
        adapter = AdapterFile(tmp_path / name)
        adapter.check(architecture)
        assert adapter.has_tied_copy(architecture)
        assert (adapter.tied_copy_fault() is None) == (name == "same")


def test_settings_that_differ_are_named_with_both_values(tmp_path: Path) -> None:
    write_sample(tmp_path / "m", tied=True)
    architecture = read_architecture(tmp_path / "m")
    write_adapter(tmp_path / "a", whole=("embed_tokens", "lm_head"))
    adapter = AdapterFile(tmp_path / "a")
    targets = ("down_proj", "q_proj", "v_proj")
    # The order of targets, the dropout and a tied matrix's second name make no difference.
    fitting = LoraConfig(
        rank=4, alpha=6, dropout=0.5, targets=targets, modules_to_save=("embed_tokens",)
    )
    adapter.check_settings(fitting, architecture)
    with pytest.raises(ConfigError) as fault:
        adapter.check_settings(LoraConfig(rank=8, targets=targets, use_dora=True), architecture)
    message = str(fault.value)
    assert "lora.rank: the adapter has 4, this run 8" in message
    assert "lora.alpha: the adapter has 6.0, this run 16.0" in message
    assert "lora.use_dora: the adapter has False, this run True" in message
    assert "lora.modules_to_save: the adapter has ('embed_tokens',), this run ()" in message
    assert "lora.targets" not in message


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=16),
        LoraConfig(rank=3, alpha=2.5, use_rslora=True, dropout=0.25, targets=("o_proj",)),
        LoraConfig(rank=8, alpha=8, use_dora=True, modules_to_save=("lm_head",)),
    ],
)
def test_a_written_configuration_says_the_same_to_peft(tmp_path: Path, lora: LoraConfig) -> None:
    from peft import LoraConfig as PeftConfig

    fields = config_json(lora, base="some/base", ties_weights=False)
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    theirs = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(theirs, PeftConfig)
    assert theirs.r == lora.rank
    assert theirs.lora_alpha == (32 if lora.alpha is None else lora.alpha)
    assert (theirs.use_rslora, theirs.use_dora) == (lora.use_rslora, lora.use_dora)
    assert set(theirs.target_modules or ()) == set(lora.targets)
    assert theirs.modules_to_save == (list(lora.modules_to_save) or None)
    assert theirs.lora_dropout == lora.dropout
    assert (theirs.bias, theirs.task_type) == ("none", "CAUSAL_LM")
    assert theirs.base_model_name_or_path == "some/base"
    ours = read_config(tmp_path)
    assert (ours.rank, ours.alpha, ours.ties_weights) == (theirs.r, theirs.lora_alpha, False)


def test_the_card_says_what_it_is_and_how_it_is_served() -> None:
    types = {"a": (torch.bfloat16, (4, 25)), "b": (torch.bfloat16, (28,))}
    plain = adapter_card(LoraConfig(rank=20, alpha=10), base="some/base", types=types)
    assert plain.startswith('---\nbase_model: "some/base"\n')
    assert "rank 20; alpha over the rank scales by 0.5" in plain
    assert "128 values in bfloat16" in plain
    # The next rank that the server knows.
    assert "vllm serve some/base --enable-lora --max-lora-rank 32" in plain
    for other in (
        LoraConfig(rank=4, use_dora=True),
        LoraConfig(rank=4, modules_to_save=("lm_head",)),
        LoraConfig(rank=600),
    ):
        card = adapter_card(other, base="some/base", types=types)
        assert "vllm serve" not in card
        assert "merge-adapter --model some/base" in card


def test_the_card_exports_a_base_that_only_training_opens(tmp_path: Path) -> None:
    lora, types = LoraConfig(rank=4), {"a": (torch.bfloat16, (4, 25))}
    assert "to-hf" not in adapter_card(lora, base=str(tmp_path), types=types)
    (tmp_path / "checkpoint.json").touch()
    card = adapter_card(lora, base=str(tmp_path), types=types)
    assert f"to-hf --input {tmp_path} --output EXPORTED_BASE" in card
    assert "from_pretrained('EXPORTED_BASE')" in card and "serve EXPORTED_BASE" in card


def test_tensors_are_the_files(tmp_path: Path) -> None:
    tensors = write_adapter(tmp_path / "a", whole=("lm_head",))
    opened = AdapterFile(tmp_path / "a").tensors
    for name, tensor in load_file(tmp_path / "a" / "adapter_model.safetensors").items():
        assert torch.equal(opened.view(name), tensor)
    assert torch.equal(
        opened.view("lm_head.weight", slice(3, 9)),
        tensors["base_model.model.lm_head.weight"][3:9],
    )
