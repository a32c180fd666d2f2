"""Reading a configuration: composition, types, unknown keys in every spelling, all at once."""

import dataclasses
import re

import pytest
from omegaconf import OmegaConf

from megatron_cgn.config.load import (
    compose_config,
    dump_config,
    key_paths,
    load_config,
    typed_config,
)
from megatron_cgn.config.schema import FileConfig, ParallelConfig, RunConfig, SourceConfig
from megatron_cgn.errors import ConfigError

CPT = "+stage=cpt"


def _fault(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    return str(caught.value)


def test_defaults_are_those_of_the_schema() -> None:
    run = load_config([CPT])
    assert run == dataclasses.replace(RunConfig(), stage="cpt")


def test_overrides_arrive_with_their_types() -> None:
    run = load_config(
        [
            CPT,
            "optim.lr=2e-5",
            "parallel.tensor_model_parallel_size=2",
            "parallel.sequence_parallel=true",
            "train.epochs=1.5",
            "output_dir=runs/x",
            "data.sources=[{name: a, path: p/a, weight: 0.8}, {name: b, path: p/b}]",
        ]
    )
    assert run.optim.lr == 2e-5
    assert run.parallel == ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    assert run.train.epochs == 1.5
    assert run.output_dir == "runs/x"
    assert run.data.sources == (
        SourceConfig(name="a", path="p/a", weight=0.8),
        SourceConfig(name="b", path="p/b", weight=None),
    )


def test_a_mix_and_phases_arrive_and_read_back() -> None:
    run = load_config(
        [
            CPT,
            "data.mix={domain: 0.8, general: 2}",
            "data.phases=[{until: 0.9, mix: {a: 1}}, {until: 100, mix: {b: 2.5}}, {mix: {c: 1}}]",
            "data.sources=[{name: a, files: [{path: x, weight: 2}, {path: y}]}]",
        ]
    )
    assert run.data.mix == {"domain": 0.8, "general": 2.0}
    first, second, third = run.data.phases
    assert (first.until, second.until, third.until) == (0.9, 100, None)
    assert isinstance(second.until, int)
    assert second.mix == {"b": 2.5}
    assert run.data.sources[0].files == (
        FileConfig(path="x", weight=2.0),
        FileConfig(path="y", weight=None),
    )
    values = OmegaConf.to_container(OmegaConf.create(dump_config(run)))
    assert isinstance(values, dict)
    assert typed_config({str(k): v for k, v in values.items()}) == run
    typed = typed_config({"data": {"mix": {"核电": 0.8}}})  # as a file may have it
    assert typed.data.mix == {"核电": 0.8}


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.sources=[{name: a, files: [{pth: x}]}]", "data.sources.0.files.0.pth"),
        ("data.phases=[{untl: 1, mix: {a: 1}}]", "data.phases.0.untl"),
    ],
)
def test_unknown_keys_of_lists_are_named(override: str, key: str) -> None:
    near = re.sub(r"\.\d+", "", key).replace("pth", "path").replace("untl", "until")
    assert _fault(CPT, override) == f"{key}: unknown key; did you mean {near}?"


def test_dumped_configuration_reads_back_to_itself() -> None:
    run = load_config(
        [CPT, "data.sources=[{name: '核电', path: 'a b', weight: 3}]", "checkpoint.keep_last=2"]
    )
    values = OmegaConf.to_container(OmegaConf.create(dump_config(run)))
    assert isinstance(values, dict)
    assert typed_config({str(k): v for k, v in values.items()}) == run


@pytest.mark.parametrize("form", ["{}", "+{}", "++{}"])
@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train.micro_batchsize", "train.micro_batch_size"),
        ("sed", "seed"),
        ("optim.global_batch_size", "train.global_batch_size"),
        ("checkpoint.keep_lst", "checkpoint.keep_last"),
    ],
)
def test_unknown_key_is_named_with_the_nearest(form: str, key: str, near: str) -> None:
    message = _fault(CPT, form.format(key) + "=1")
    assert message == f"{key}: unknown key; did you mean {near}?"


def test_unknown_section_is_named_with_the_nearest() -> None:
    key = "paralel.context_parallel_size"
    assert _fault(CPT, f"{key}=1").endswith("did you mean parallel.context_parallel_size?")
    assert _fault(CPT, f"+{key}=1") == "paralel: unknown key; did you mean parallel?"


def test_unknown_key_like_nothing_gets_no_suggestion() -> None:
    assert _fault(CPT, "+zzzzqqqq=1") == "zzzzqqqq: unknown key."


def test_unknown_key_in_a_list_is_named_with_its_place() -> None:
    message = _fault(CPT, "data.sources=[{name: a, path: b}, {name: c, path: d, wieght: 2}]")
    assert message == "data.sources.1.wieght: unknown key; did you mean data.sources.weight?"


@pytest.mark.parametrize("plus", ["", "+"])
def test_all_unknown_keys_are_named_at_once(plus: str) -> None:
    lines = _fault(CPT, f"{plus}optim.adam_beta3=1", f"{plus}sed=1", f"{plus}data.seq_len=4")
    found = {line.partition(":")[0] for line in lines.splitlines()}
    assert found == {"optim.adam_beta3", "sed", "data.seq_len"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=abc", ["optim.lr", "number", "'abc'"]),
        ("train.micro_batch_size=1.5", ["train.micro_batch_size", "integer", "1.5"]),
        ("parallel.sequence_parallel=2", ["parallel.sequence_parallel", "boolean", "2"]),
        ("precision=fp8", ["precision", "'bf16', 'fp16' or 'fp32'", "'fp8'"]),
        ("train.recompute=true", ["train.recompute", "'selective'", "True"]),
        ("train.micro_batch_size={a: 1}", ["train.micro_batch_size", "integer", "{'a': 1}"]),
        ("seed={a: 1}", ["seed", "integer"]),
        ("data.sources=abc", ["data.sources", "'abc'"]),
        ("data.sources=[{path: a}]", ["data.sources.0.name", "required"]),
        ("+seed.foo=1", ["seed"]),
    ],
)
def test_wrong_type_names_key_and_value(override: str, expected: list[str]) -> None:
    message = _fault(CPT, override)
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_all_wrong_types_are_told_at_once() -> None:
    lines = _fault(CPT, "optim.lr=a", "seed=b", "data.num_workers=c").splitlines()
    found = {line.partition(":")[0] for line in lines}
    assert found == {"optim.lr", "seed", "data.num_workers"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("+stage=ctp", "stage=ctp: there is no ctp.yaml; choose from cpt"),
        ("stage=cpt", "stage=…: a file is chosen with a plus sign: +stage=…"),
        ("optim=3", "optim"),
        ("output_dir=[a", "output_dir=[a: cannot be read as key=value"),
        ("output_dir=核电", "takes quotes of its own"),
        ("data.mix={核电: 0.8}", "go into a recipe of hydra_conf/experiment/"),
        ("model.hf_path=${nowhere}", "nowhere"),
    ],
)
def test_wrong_override_is_one_line(override: str, expected: str) -> None:
    message = _fault(override)
    assert expected in message
    assert "\n" not in message


def test_every_field_of_the_schema_is_a_key() -> None:
    paths = key_paths()
    assert len(paths) == len(set(paths))
    assert {"seed", "optim.lr", "parallel.context_parallel_size", "data.sources"} <= set(paths)
    values = compose_config([CPT])
    for path in paths:
        node: object = values
        for name in path.split("."):
            assert isinstance(node, dict) and name in node, path
            node = node[name]
