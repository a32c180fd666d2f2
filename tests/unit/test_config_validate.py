"""Every rule of `validate.py` and its parts has a case that breaks it, and nothing else."""

import ast
import dataclasses
import inspect
import math
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from megatron_cgn.config import data_rules, optim_rules, sft_rules
from megatron_cgn.config import validate as validate_module
from megatron_cgn.config.schema import (
    DataConfig,
    FileConfig,
    ModelConfig,
    OptimConfig,
    ParamGroupConfig,
    PhaseConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from megatron_cgn.config.validate import validate, validate_architecture, validate_steps
from megatron_cgn.errors import ConfigError

VALID = RunConfig(
    stage="cpt",
    model=ModelConfig(hf_path="models/base"),
    data=DataConfig(sources=(SourceConfig(name="domain", path="data/domain"),), seq_length=64),
    train=TrainConfig(micro_batch_size=1, global_batch_size=8, train_iters=100),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Model:
    """What the rules ask of an architecture."""

    num_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    hidden_size: int = 64
    ffn_hidden_size: int = 96
    head_dim: int = 8
    tie_word_embeddings: bool = False
    head: str = "lm"
    max_position_embeddings: int = 64


def _changed(changes: dict[str, Any]) -> RunConfig:
    run = VALID
    for path, value in changes.items():
        section, _, name = path.rpartition(".")
        if section:
            part = dataclasses.replace(getattr(run, section), **{name: value})
            run = dataclasses.replace(run, **{section: part})
        else:
            run = dataclasses.replace(run, **{name: value})
    return run


def _source(**changes: Any) -> SourceConfig:
    return dataclasses.replace(SourceConfig(name="domain", path="data/domain"), **changes)


def _files(name: str, *paths: str, weights: tuple[float | None, ...] | None = None) -> SourceConfig:
    files = zip(paths, weights or (None,) * len(paths), strict=True)
    return SourceConfig(name=name, files=tuple(FileConfig(path=p, weight=w) for p, w in files))


def _phases(*phases: tuple[float | None, dict[str, float]]) -> tuple[PhaseConfig, ...]:
    return tuple(PhaseConfig(until=until, mix=mix) for until, mix in phases)


def _groups(*groups: dict[str, Any]) -> dict[str, Any]:
    """Groups of embeddings at half the rate, but for what is said."""
    plain = {"name": "g", "parameters": ("embeddings",), "lr_mult": 0.5}
    return {"optim.param_groups": tuple(ParamGroupConfig(**plain | group) for group in groups)}


GROUP = "optim.param_groups[g]"
EPOCHS = {"train.train_iters": None, "train.epochs": 2.0}
TP, PP, CP = (f"parallel.{n}_parallel_size" for n in ("tensor_model", "pipeline_model", "context"))
VP = "parallel.virtual_pipeline_model_parallel_size"
PP2 = {PP: 2, VP: 2}
SFT: dict[str, Any] = {"stage": "sft", "data.sources": (_source(path="a.jsonl"),)}
# Settings that differ from VALID, the number of processes, and what the one message says.
RULES: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "no-model": ({"model.hf_path": None}, 1, ["model.hf_path", "not set"]),
    "vocabulary-multiple": (
        {"model.make_vocab_size_divisible_by": 0},
        1,
        ["model.make_vocab_size_divisible_by: 0", "at least 1"],
    ),
    "nan": ({"optim.weight_decay": math.nan}, 1, ["optim.weight_decay: nan", "finite"]),
    "infinity": ({"train.train_iters": None, "train.epochs": math.inf}, 1, ["train.epochs: inf"]),
    "nan-in-a-list": (
        {"data.sources": (_source(weight=math.nan),)},
        1,
        ["data.sources.0.weight: nan", "finite"],
    ),
    "seed": ({"seed": -1}, 1, ["seed: -1", "at least 0"]),
    "tp-zero": ({TP: 0}, 1, [f"{TP}: 0", "at least 1"]),
    "cp-negative": ({CP: -1}, 1, [f"{CP}: -1", "at least 1"]),
    "world-size": ({TP: 2}, 3, ["3 process(es)", "2 × 1 × 1", "multiple of 2", "torchrun"]),
    "one-chunk": ({PP: 2, VP: 1}, 2, [f"{VP}: 1", "2 chunks"]),
    "interleaving-one-stage": ({VP: 2}, 1, [VP, "no effect", f"{PP}=1"]),
    "interleaving-without-overlap": (
        {**PP2, "parallel.overlap_p2p_comm": False},
        2,
        ["parallel.overlap_p2p_comm: false", "wrong", VP],
    ),
    "overlap-without-interleaving": (
        {"parallel.overlap_p2p_comm": True},
        1,
        ["parallel.overlap_p2p_comm: true", VP],
    ),
    "sequence-parallel-alone": (
        {"parallel.sequence_parallel": True},
        1,
        ["parallel.sequence_parallel: true", "no effect"],
    ),
    "gather-without-reduce": (
        {"parallel.overlap_param_gather": True},
        1,
        ["parallel.overlap_param_gather: true", "parallel.overlap_grad_reduce=true"],
    ),
    "timeout": ({"parallel.timeout_minutes": 0.0}, 1, ["parallel.timeout_minutes: 0", "above 0"]),
    "micro-batch": ({"train.micro_batch_size": 0}, 1, ["train.micro_batch_size: 0", "at least 1"]),
    "global-batch": (
        {"train.global_batch_size": 6, "train.micro_batch_size": 2},
        2,
        ["train.global_batch_size: 6", "2 × 2 = 4", "use 8"],
    ),
    "interleaved-micro-batches": (
        {**PP2, "train.global_batch_size": 3},
        2,
        ["train.global_batch_size", "3 micro-batches", f"{PP}=2"],
    ),
    "no-length": ({"data.seq_length": 0}, 1, ["data.seq_length: 0", "at least 1"]),
    "context-parallel-length": ({CP: 2, "data.seq_length": 62}, 2, ["data.seq_length: 62", "= 4"]),
    "sequence-parallel-length": (
        {TP: 2, "parallel.sequence_parallel": True, "data.seq_length": 63},
        2,
        ["data.seq_length: 63", f"{TP}=2"],
    ),
    "documents-apart-by-te-with-cp": (
        {"data.reset_attention_mask": True, "model.backend": "te", CP: 2},
        2,
        ["data.reset_attention_mask: true", f"{CP}=2", "model.backend=native"],
    ),
    "no-end": ({"train.train_iters": None}, 1, ["train.train_iters, train.epochs", "neither"]),
    "two-ends": ({"train.epochs": 1.0}, 1, ["train.train_iters, train.epochs", "both"]),
    "no-steps": ({"train.train_iters": 0}, 1, ["train.train_iters: 0", "at least 1"]),
    "no-epochs": (
        {"train.train_iters": None, "train.epochs": 0.0},
        1,
        ["train.epochs: 0.0", "above 0"],
    ),
    "log-interval": ({"train.log_interval_steps": 0}, 1, ["train.log_interval_steps: 0"]),
    "validation-interval": (
        {"train.validation_interval_steps": 0},
        1,
        ["train.validation_interval_steps: 0", "at least 1"],
    ),
    "no-sources": ({"data.sources": ()}, 1, ["data.sources", "at least one"]),
    "same-name": (
        {"data.sources": (_source(), _source(path="data/other"))},
        1,
        ["data.sources", "'domain'", "2 times"],
    ),
    "same-path": (
        {"data.sources": (_source(), _source(name="other"))},
        1,
        ["data.sources", "data/domain", "2 times"],
    ),
    "held-out-is-trained-on": (
        {"data.sources": (_source(validation_path="data/../data/domain"),)},
        1,
        ["validation_path", "also trained on"],
    ),
    "negative-weight": (
        {"data.sources": (_source(weight=-1.0), _source(name="b", path="b"))},
        1,
        ["weight=-1.0", "0 or more"],
    ),
    "weight-without-effect": (
        {"data.sources": (_source(weight=0.0), _source(name="b", path="b"))},
        1,
        ["[domain].weight=0", "no effect"],
    ),
    "no-weights": (
        {"data.sources": (_source(weight=0.0, validation_path="data/held_out"),)},
        1,
        ["data.sources", "every weight is 0"],
    ),
    "no-path": ({"data.sources": (_source(path=None),)}, 1, ["[domain]", "neither of path and"]),
    "path-and-files": (
        {"data.sources": (_source(files=(FileConfig(path="b"),)),)},
        1,
        ["[domain]", "both of path and files"],
    ),
    "same-path-as-a-file": (
        {"data.sources": (_source(), _files("b", "data/domain", "data/b"))},
        1,
        ["data/domain", "2 times"],
    ),
    "some-file-weights": (
        {"data.sources": (_files("a", "x", "y", weights=(1.0, None)),)},
        1,
        ["data.sources[a].files", "some have a weight"],
    ),
    "no-file-weight": (
        {"data.sources": (_files("a", "x", "y", weights=(1.0, 0.0)),)},
        1,
        ["data.sources[a].files[y].weight=0.0", "above 0"],
    ),
    "weight-and-mix": (
        {"data.sources": (_source(weight=1.0),), "data.mix": {"domain": 1.0}},
        1,
        ["data.sources[domain].weight=1.0", "Remove the weight"],
    ),
    "weight-and-phases": (
        {"data.sources": (_source(weight=0.0),), "data.phases": _phases((None, {"domain": 1.0}))}
        | {"data.validation_fraction": 0.1},
        1,
        ["data.sources[domain].weight=0.0", "Remove the weight"],
    ),
    "mix-and-phases": (
        {"data.mix": {"domain": 1.0}, "data.phases": _phases((None, {"domain": 1.0}))},
        1,
        ["data.mix, data.phases: both given"],
    ),
    "empty-mix": ({"data.mix": {}}, 1, ["data.mix: is empty", "{domain: 1.0}"]),
    "unknown-in-mix": (
        {"data.mix": {"domain": 0.8, "genral": 0.2}},
        1,
        ["data.mix.genral", "choose from 'domain'"],
    ),
    "zero-in-mix": ({"data.mix": {"domain": 0.0}}, 1, ["data.mix.domain: 0.0", "above 0"]),
    "nan-in-mix": ({"data.mix": {"domain": math.nan}}, 1, ["data.mix.domain: nan", "finite"]),
    "in-no-mix": (
        {"data.sources": (_source(), _source(name="b", path="b")), "data.mix": {"b": 1.0}},
        1,
        ["data.sources[domain]: is in no mix", "no effect"],
    ),
    "phase-without-end": (
        {"data.phases": _phases((None, {"domain": 1.0}), (None, {"domain": 1.0}))},
        1,
        ["data.phases.0.until: None", "only the last phase"],
    ),
    "first-phase-is-all": (
        {"data.phases": _phases((1.0, {"domain": 1.0}), (None, {"domain": 1.0}))},
        1,
        ["data.phases.0.until: 1.0", "only the last phase"],
    ),
    "last-phase-ends-early": (
        {"data.phases": _phases((0.5, {"domain": 1.0}), (0.9, {"domain": 1.0}))},
        1,
        ["data.phases.1.until: 0.9", "end of the run"],
    ),
    "phases-in-disorder": (
        {
            "data.phases": _phases(
                (0.5, {"domain": 1.0}), (0.5, {"domain": 1.0}), (1, {"domain": 1.0})
            )
        },
        1,
        ["data.phases.1.until: 0.5", "above 0.5"],
    ),
    "part-of-a-step": (
        {"data.phases": _phases((2.5, {"domain": 1.0}), (None, {"domain": 1.0}))},
        1,
        ["data.phases.0.until: 2.5", "whole number"],
    ),
    "fractions-and-steps": (
        {
            "data.phases": _phases(
                (0.5, {"domain": 1.0}), (90, {"domain": 1.0}), (None, {"domain": 1.0})
            )
        },
        1,
        ["data.phases", "one kind"],
    ),
    "epochs-of-without-epochs": (
        {"data.epochs_of": "domain", "data.mix": {"domain": 1.0}},
        1,
        ["data.epochs_of: 'domain'", "no effect without train.epochs"],
    ),
    "epochs-of-without-mix": (
        {"data.epochs_of": "domain", **EPOCHS},
        1,
        ["data.epochs_of: 'domain'", "no effect without data.mix"],
    ),
    "epochs-of-what": (
        {"data.sources": (_source(name="b"),), "data.mix": {"b": 1.0}, **EPOCHS},
        1,
        ["data.epochs_of: not set", "name one of 'b'"],
    ),
    "epochs-of-another": (
        {"data.epochs_of": "c", "data.mix": {"domain": 1.0}, **EPOCHS},
        1,
        ["data.epochs_of: c", "name one of 'domain'"],
    ),
    "epochs-that-never-end": (
        {
            "data.sources": (_source(), _source(name="b", path="b")),
            "data.phases": _phases((9, {"domain": 1.0}), (None, {"b": 1.0})),
            **EPOCHS,
        },
        1,
        ["data.epochs_of: 'domain'", "last phase", "train.train_iters"],
    ),
    "slash-in-name": (
        {"data.sources": (_source(name="a/b"),)},
        1,
        ["data.sources.0.name: 'a/b'", "slashes"],
    ),
    "fraction": ({"data.validation_fraction": 1.0}, 1, ["data.validation_fraction=1.0", "below 1"]),
    "fraction-without-effect": (
        {
            "data.validation_fraction": 0.1,
            "data.sources": (_source(validation_path="data/held_out"),),
        },
        1,
        ["data.validation_fraction=0.1", "no effect", "Set it to 0"],
    ),
    "workers": ({"data.num_workers": -1}, 1, ["data.num_workers: -1", "at least 0"]),
    "no-rate": (
        {"optim.lr": 0.0, "optim.min_lr": 0.0},
        1,
        ["optim.lr: 0.0", "above 0"],
    ),
    "floor-above-peak": ({"optim.min_lr": 1e-4}, 1, ["optim.min_lr: 0.0001", "optim.lr=1e-05"]),
    "negative-clip": ({"optim.clip_grad": -1.0}, 1, ["optim.clip_grad: -1.0", "at least 0"]),
    "beta": ({"optim.adam_beta2": 1.0}, 1, ["optim.adam_beta2: 1.0", "below 1"]),
    "epsilon": ({"optim.adam_eps": 0.0}, 1, ["optim.adam_eps: 0.0", "above 0"]),
    "loss-scale": (
        {"optim.initial_loss_scale": 0.5, "precision": "fp16"},
        1,
        ["optim.initial_loss_scale: 0.5"],
    ),
    "loss-scale-of-bf16": (
        {"optim.initial_loss_scale": 1024.0, "precision": "bf16"},
        1,
        ["optim.initial_loss_scale: 1024.0", "precision=bf16"],
    ),
    "validation-of-nothing": (
        {"train.validation_sequences": 3},
        1,
        ["train.validation_sequences: 3", "nothing is held out"],
    ),
    "export-type-of-nothing": (
        {"export.dtype": "fp16", "export.enabled": False},
        1,
        ["export.dtype: fp16", "export.enabled=false"],
    ),
    "checkpoints-without-optimizer": (
        {"checkpoint.save_optimizer": False, "checkpoint.interval_steps": 5},
        1,
        ["checkpoint.save_optimizer: false", "checkpoint.interval_steps"],
    ),
    "optimizer-of-other-weights": (
        {"checkpoint.load_optimizer": True, "model.init": "random"},
        1,
        ["checkpoint.load_optimizer: true", "model.init=random"],
    ),
    "wsd-without-decay": (
        {"optim.schedule": "wsd"},
        1,
        ["optim.decay_steps: None", "wsd"],
    ),
    "decay-without-wsd": (
        {"optim.decay_steps": 10},
        1,
        ["optim.decay_steps: 10", "no effect", "optim.schedule=cosine"],
    ),
    "decay-of-nothing": (
        {"optim.schedule": "wsd", "optim.decay_steps": 0},
        1,
        ["optim.decay_steps: 0", "at least 1"],
    ),
    "warm-up-too-long": (
        {"optim.warmup_steps": 101},
        1,
        ["optim.warmup_steps: 101", "100 steps of train.train_iters=100"],
    ),
    "warm-up-and-decay-too-long": (
        {"optim.schedule": "wsd", "optim.warmup_steps": 60, "optim.decay_steps": 60},
        1,
        ["60 warm-up and 60 decay", "train.train_iters=100"],
    ),
    "groups-of-one-name": (_groups({}, {}), 1, ["optim.param_groups: the name 'g'", "2 times"]),
    "group-without-name": (
        _groups({"name": ""}),
        1,
        ["optim.param_groups.0.name: ''", "without slashes"],
    ),
    "group-of-nothing": (
        _groups({"parameters": ()}),
        1,
        [f"{GROUP}.parameters: is empty", "model.layers.*.mlp.*"],
    ),
    "others-and-more": (
        _groups({"parameters": ("others", "norms")}),
        1,
        [f"{GROUP}.parameters: others", "with anything else"],
    ),
    "new-rows-of-all": (
        _groups({"rows_from": 5}),
        1,
        [f"{GROUP}.rows_from: 5", "no effect with rows=all"],
    ),
    "rows-of-norms": (
        _groups({"parameters": ("norms",), "rows": "new"}),
        1,
        [f"{GROUP}.rows: new", "norms", "only embeddings and output"],
    ),
    "rows-from-the-first": (
        _groups({"rows": "old", "rows_from": 0}),
        1,
        [f"{GROUP}.rows_from: 0", "at least 1"],
    ),
    "two-rates": (_groups({"lr": 1e-4}), 1, [f"{GROUP}: has both lr and lr_mult"]),
    "group-rate": (_groups({"lr_mult": 0.0}), 1, [f"{GROUP}.lr_mult: 0.0", "trained_until_step=0"]),
    "group-decay": (_groups({"weight_decay": -1.0}), 1, [f"{GROUP}.weight_decay: -1.0"]),
    "rate-of-what-is-frozen": (
        _groups({"trained_until_step": 0}),
        1,
        [f"{GROUP}.lr_mult: has no effect", "never trained"],
    ),
    "frozen-before-the-run": (
        _groups({"frozen_until_step": -1}),
        1,
        [f"{GROUP}.frozen_until_step: -1", "at least 0"],
    ),
    "trained-before-the-run": (
        _groups({"trained_until_step": -1}),
        1,
        [f"{GROUP}.trained_until_step: -1", "at least 0"],
    ),
    "never-trained": (
        _groups({"frozen_until_step": 5, "trained_until_step": 5}),
        1,
        [f"{GROUP}.trained_until_step: 5 is not after frozen_until_step=5"],
    ),
    "frozen-beyond-the-end": (
        _groups({"frozen_until_step": 100}),
        1,
        [f"{GROUP}.frozen_until_step: 100", "ends with step 100 (train.train_iters=100)"],
    ),
    "trained-beyond-the-end": (
        _groups({"trained_until_step": 100}),
        1,
        [f"{GROUP}.trained_until_step: 100 has no effect", "100 steps (train.train_iters=100)"],
    ),
    "group-without-effect": (
        _groups({"lr_mult": None, "lr": 1e-5, "weight_decay": 0.1}),
        1,
        [f"{GROUP}: has no effect", "like everything else", "remove it"],
    ),
    "checkpoint-interval": (
        {"checkpoint.interval_steps": 0},
        1,
        ["checkpoint.interval_steps: 0", "at least 1"],
    ),
    "keep-none": ({"checkpoint.keep_last": 0}, 1, ["checkpoint.keep_last: 0", "at least 1"]),
    "export-of-adapters-off": (
        {"lora.rank": 8, "lora.export": "merged", "export.enabled": False},
        1,
        ["lora.export: merged", "no effect with export.enabled=false"],
    ),
    "adapters-not-chosen": ({"lora.alpha": 8.0}, 1, ["lora.alpha: 8.0", "lora.rank"]),
    "adapters-on-unknown-layers": (
        {"lora.rank": 8, "lora.targets": ("query",)},
        1,
        ["lora.targets: 'query' matches no layer", "q_proj"],
    ),
    "chat-without-conversations": (
        {"chat.train_on_prompt": True},
        1,
        ["chat.train_on_prompt", "no effect with stage=cpt", "+stage=sft"],
    ),
    "samples-without-conversations": (
        {"samples.prompts": ("q",)},
        1,
        ["samples.prompts", "no effect with stage=cpt"],
    ),
    "packing-without-conversations": (
        {"data.packing": False},
        1,
        ["data.packing", "no effect with stage=cpt"],
    ),
    "conversations-apart-anyway": (
        {**SFT, "data.reset_attention_mask": True},
        1,
        ["data.reset_attention_mask: true", "no effect on conversations"],
    ),
    "conversations-in-phases": (
        {**SFT, "data.phases": _phases((None, {"domain": 1.0}))},
        1,
        ["data.phases", "one mix"],
    ),
    "conversations-from-an-index": (
        {"stage": "sft"},
        1,
        ["data.sources[domain].path: 'data/domain'", ".parquet", "no turns"],
    ),
    "held-out-conversations-from-an-index": (
        {"stage": "sft", "data.sources": (_source(path="a.jsonl", validation_path="b.txt"),)},
        1,
        ["data.sources[domain].validation_path: 'b.txt'", ".jsonl.gz"],
    ),
    "conversations-from-several-indices": (
        {"stage": "sft", "data.sources": (_files("b", "x.JSON", "y.bin"),)},
        1,
        ["data.sources[b].files.1.path: 'y.bin'"],
    ),
    "all-and-one-turn-count": (
        {**SFT, "chat.train_on_prompt": True, "chat.last_turn_only": True},
        1,
        ["chat.train_on_prompt, chat.last_turn_only: both true"],
    ),
    "answers-from-an-index": (
        {"stage": "dpo"},
        1,
        ["data.sources[domain].path: 'data/domain'", "no turns"],
    ),
    "loss-without-comparisons": (
        {**SFT, "loss.beta": 0.2},
        1,
        ["loss.beta: 0.2 has no effect with stage=sft", "+stage=dpo"],
    ),
    "option-of-another-loss": (
        {**SFT, "stage": "dpo", "loss.gamma": 0.2},
        1,
        ["loss.gamma: 0.2 has no effect with loss.type=sigmoid", "simpo"],
    ),
    "reward-model-that-answers": (
        {**SFT, "stage": "rm", "samples.prompts": ("q",)},
        1,
        ["samples.prompts: has no effect with stage=rm"],
    ),
    "empty-template": ({**SFT, "chat.template": " "}, 1, ["chat.template: is empty"]),
    "conversations-under-te-and-cp": (
        {**SFT, "model.backend": "te", CP: 2},
        2,
        ["model.backend: te", "keep conversations apart", f"{CP}=2", "native"],
    ),
    "samples-negative": ({**SFT, "samples.count": -1}, 1, ["samples.count: -1", "at least 0"]),
    "samples-counted-beside-prompts": (
        {**SFT, "samples.count": 2, "samples.prompts": ("q",)},
        1,
        ["samples.count: 2", "no effect beside samples.prompts"],
    ),
    "sample-prompt-empty": (
        {**SFT, "samples.prompts": ("q", "\n")},
        1,
        ["samples.prompts.1: is empty"],
    ),
    "samples-of-nothing-held-out": (
        {**SFT, "samples.count": 2},
        1,
        ["samples.count: 2 has no effect, since nothing is held out", "data.validation_fraction"],
    ),
    "length-of-samples-of-nothing-held-out": (
        {**SFT, "samples.max_new_tokens": 9},
        1,
        ["samples.max_new_tokens: 9 has no effect", "samples.prompts"],
    ),
    "samples-of-no-token": (
        {**SFT, "samples.max_new_tokens": 0},
        1,
        ["samples.max_new_tokens: 0", "at least 1"],
    ),
    "length-of-no-samples": (
        {**SFT, "samples.count": 0, "samples.max_new_tokens": 9},
        1,
        ["samples.max_new_tokens: 9", "no effect", "samples.count"],
    ),
}
CUTS: dict[str, tuple[dict[str, Any], _Model, list[str]]] = {
    "heads": ({TP: 3}, _Model(num_key_value_heads=3), [f"{TP}: 3", "8 attention heads", "1, 2, 4"]),
    "key-value-heads": ({TP: 8}, _Model(), [f"{TP}: 8", "4 key/value heads", "1, 2, 4"]),
    "columns": ({TP: 4}, _Model(ffn_hidden_size=98), [f"{TP}: 4", "98 feed-forward columns"]),
    "layers": ({PP: 3}, _Model(), [f"{PP}: 3", "8 layers"]),
    "virtual-layers": ({PP: 2, VP: 3}, _Model(), [f"{PP}: 2 × 3 virtual", "8 layers"]),
    "length": (
        {"data.seq_length": 65},
        _Model(),
        ["data.seq_length: 65", "max_position_embeddings=64"],
    ),
    "adapters": (
        {"lora.rank": 33},
        _Model(),
        ["lora.rank: 33", "k_proj [32, 64]", "at most 32"],
    ),
    "samples": (
        {**SFT, "samples.max_new_tokens": 128, "data.validation_fraction": 0.1},
        _Model(max_position_embeddings=128),
        ["samples.max_new_tokens: 128", "no room", "max_position_embeddings=128"],
    ),
}


def _message(call: Callable[[], None]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({}, 1),
        ({}, 8),
        ({TP: 2, "parallel.sequence_parallel": True, **PP2, CP: 2}, 8),
        ({"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True}, 2),
        ({"optim.schedule": "wsd", "optim.warmup_steps": 50, "optim.decay_steps": 50}, 1),
        ({"train.train_iters": None, "train.epochs": 0.5}, 1),
        (
            {"data.sources": (_source(weight=0.0), _source(name="b", path="b"))}
            | {"data.validation_fraction": 0.1},
            1,
        ),
        ({"optim.min_lr": 1e-5, "optim.schedule": "constant"}, 1),
        ({**SFT, "data.packing": False, "chat.last_turn_only": True, CP: 2}, 2),
        ({**SFT, "samples.prompts": ("q", "r", "s", "t"), "samples.max_new_tokens": 9}, 1),
        ({**SFT, "samples.count": 5, "data.validation_fraction": 0.1}, 1),
        ({**SFT, "samples.count": 0, "data.mix": {"domain": 1.0}}, 1),
        ({**SFT, "samples.prompts": ("q",), "train.validation_interval_steps": 5}, 1),
        (
            _groups(
                {"rows": "new", "lr_mult": None},
                {"name": "rest", "parameters": ("others",), "frozen_until_step": 99},
            ),
            1,
        ),
        (_groups({"trained_until_step": 0, "lr_mult": None}), 1),
        ({"data.mix": {"domain": 80.0}, **EPOCHS}, 1),
        ({"data.sources": (_files("b", "x", "y"),), "data.mix": {"b": 1.0}}, 1),
        (
            {
                "data.sources": (_files("b", "x", "y", weights=(1.0, 2.0)), _source()),
                "data.phases": _phases((9, {"b": 1.0}), (20, {"domain": 1.0}), (1, {"b": 1.0})),
                "data.epochs_of": "b",
                **EPOCHS,
            },
            1,
        ),
        (
            {
                "data.sources": (_source(), _source(name="b", path="b")),
                "data.phases": _phases((0.5, {"domain": 1.0}), (1.0, {"b": 1.0})),
                **EPOCHS,
            },
            1,
        ),
    ],
)
def test_valid_configurations_pass(changes: dict[str, Any], world_size: int) -> None:
    validate(_changed(changes), world_size=world_size)


@pytest.mark.parametrize("rule", RULES)
def test_rule_is_told_in_one_message(rule: str) -> None:
    changes, world_size, parts = RULES[rule]
    message = _message(lambda: validate(_changed(changes), world_size=world_size))
    faults = [line for line in message.splitlines() if all(part in line for part in parts)]
    assert len(faults) == 1, message
    assert faults[0].endswith((".", "}."))
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("rule", CUTS)
def test_cut_that_does_not_fit_the_model_is_refused(rule: str) -> None:
    changes, model, parts = CUTS[rule]
    validate_architecture(VALID, _Model())
    message = _message(lambda: validate_architecture(_changed(changes), model))
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_all_faults_are_told_at_once() -> None:
    run = _changed(
        {
            "model.hf_path": None,
            "train.micro_batch_size": 0,
            "train.global_batch_size": 0,
            "train.log_interval_steps": 0,
            "train.train_iters": None,
            "optim.lr": -1.0,
            "optim.param_groups": _groups({"rows_from": 5, "frozen_until_step": -1})[
                "optim.param_groups"
            ],
            "data.sources": (),
            "checkpoint.keep_last": 0,
            "parallel.sequence_parallel": True,
        }
    )
    found = {
        line.split()[0].rstrip(":,")
        for line in _message(lambda: validate(run, world_size=1)).splitlines()
    }
    assert found == {
        "model.hf_path",
        "train.micro_batch_size",
        "train.global_batch_size",
        "train.log_interval_steps",
        "train.train_iters",
        "optim.lr",
        "optim.min_lr",
        "optim.param_groups[g].rows_from",
        "optim.param_groups[g].frozen_until_step",
        "data.sources",
        "checkpoint.keep_last",
        "parallel.sequence_parallel",
    }


def test_every_rule_has_a_case() -> None:
    """Each `yield` of a message runs in some case above; a new rule without one fails here."""
    modules = (validate_module, data_rules, optim_rules, sft_rules)
    files = {module.__file__ for module in modules}
    reached: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        reached.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        for changes, world_size, _ in RULES.values():
            with pytest.raises(ConfigError):
                validate(_changed(changes), world_size=world_size)
        for changes, model, _ in CUTS.values():
            with pytest.raises(ConfigError):
                validate_architecture(_changed(changes), model)
    finally:
        sys.settrace(previous)
    found = []
    for module in modules:
        nodes = ast.walk(ast.parse(inspect.getsource(module)))
        for node in (n for n in nodes if isinstance(n, ast.Yield)):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found.append((module.__name__, lines, {(module.__file__, k) for k in lines}))
    assert len(found) > 70
    assert [(name, lines) for name, lines, places in found if not reached & places] == []


def test_a_schedule_longer_than_the_epochs_is_refused() -> None:
    run = RunConfig(
        train=TrainConfig(epochs=1.0), optim=OptimConfig(warmup_steps=60, decay_steps=60)
    )
    validate_steps(run, 120)
    with pytest.raises(ConfigError, match="60 warm-up and 60 decay steps do not fit into the 119"):
        validate_steps(run, 119)


def test_a_group_frozen_for_all_epochs_is_refused() -> None:
    groups = _groups({"frozen_until_step": 120})["optim.param_groups"]
    run = RunConfig(train=TrainConfig(epochs=1.0), optim=OptimConfig(param_groups=groups))
    validate_steps(run, 121)
    with pytest.raises(ConfigError, match="ends with step 120 .train.epochs=1.0., so that"):
        validate_steps(run, 120)
