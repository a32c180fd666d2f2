"""From an extended vocabulary to a run that trains its new rows alone, through train.py."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from safetensors.torch import load_file
from tiny_files import WORDS, TinyFiles
from train_runs import Zygote, overrides, records

from megatron_cgn.data.retokenize import retokenize
from megatron_cgn.hf.resize import resize_hf
from megatron_cgn.hf.resize_checkpoint import resize_checkpoint
from tokenizer.extend import open_extender
from tokenizer.extension import FILE_NAME, Extension
from tokenizer.filters import Rules
from tokenizer.words import WordCounter

NEW_TOKENS = 20
WARM_UP = (
    "optim.param_groups=[{name: new, parameters: [embeddings, output], rows: new, lr_mult: 2.0},"
    "{name: rest, parameters: [others], frozen_until_step: 2}]"
)
NEW_ALONE = (
    "optim.param_groups=[{name: new, parameters: [embeddings, output], rows: new},"
    "{name: rest, parameters: [others], trained_until_step: 0}]"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extended:
    """An extended model and a source indexed with its tokenizer."""

    model: Path
    sources: str
    old_vocab_size: int
    extension: Extension


@pytest.fixture(scope="module")
def extended(tiny: TinyFiles, tmp_path_factory: pytest.TempPathFactory) -> Extended:
    root = tmp_path_factory.mktemp("extended")
    draw = random.Random(1)
    extender = open_extender(tiny.model)
    counter = WordCounter(extender.splitter())
    counter.add([" ".join(draw.choices(WORDS["general"], k=20)) for _ in range(50)])
    extension = extender.extend(
        counter.words(),
        num_tokens=NEW_TOKENS,
        rules=Rules(min_frequency=2, min_spread=1, particles=True),
    )
    resize_hf(
        tiny.model,
        root / "model",
        extension,
        write_tokenizer=lambda directory: extender.write(extension, directory),
    )
    prefixes = []
    for name, prefix in (("domain", tiny.domain), ("general", tiny.general)):
        done = retokenize(
            prefix,
            old_tokenizer=tiny.model,
            tokenizer=root / "model",
            output_prefix=root / name,
        )
        assert name == "domain" or done.sidecar.tokens < done.old_tokens
        prefixes.append(f"{{name: {name}, path: {root / name}}}")
    return Extended(
        model=root / "model",
        sources=f"data.sources=[{','.join(prefixes)}]",
        old_vocab_size=extension.old_vocab_size,
        extension=extension,
    )


def _overrides(tiny: TinyFiles, extended: Extended, output: Path, *more: str) -> list[str]:
    model = f"model.hf_path={extended.model}"
    found = overrides(tiny, output, model, "train.train_iters=4", *more)
    return [extended.sources if text.startswith("data.sources=") else text for text in found]


def test_warm_up_of_new_rows_is_recorded_and_resumes(
    tiny: TinyFiles, extended: Extended, zygote: Zygote, tmp_path: Path
) -> None:
    whole = _overrides(tiny, extended, tmp_path / "whole", WARM_UP)
    ended = zygote.run(whole, stderr=tmp_path / "whole.log")
    assert ended.codes == [0], ended.stderr
    steps = [r for r in records(tmp_path / "whole") if "loss" in r]
    rates = [r["lr"] for r in steps]
    assert [r["lr/new"] for r in steps] == [pytest.approx(2 * rate) for rate in rates]
    assert [r["lr/rest"] for r in steps] == [0.0, 0.0, *rates[2:]]
    # The first half again, from its checkpoint, in the middle of what was frozen.
    resumed = tmp_path / "resumed"
    (resumed / "checkpoints").mkdir(parents=True)
    (tmp_path / "whole/checkpoints/step_0000002").rename(resumed / "checkpoints/step_0000002")
    ended = zygote.run(
        _overrides(tiny, extended, resumed, WARM_UP), stderr=tmp_path / "resumed.log"
    )
    assert ended.codes == [0], ended.stderr
    assert [r for r in records(resumed) if "loss" in r] == steps[2:]
    same = [
        load_file(tmp_path / name / "export/model.safetensors") for name in ("whole", "resumed")
    ]
    assert all(same[0][name].equal(weight) for name, weight in same[1].items())


def test_new_rows_alone_move_and_the_export_says_which_they_are(
    tiny: TinyFiles, extended: Extended, zygote: Zygote, tmp_path: Path
) -> None:
    ended = zygote.run(
        _overrides(
            tiny,
            extended,
            tmp_path / "run",
            NEW_ALONE,
            "parallel.tensor_model_parallel_size=2",
            "parallel.sequence_parallel=true",
        ),
        stderr=tmp_path / "log",
        ranks=2,
    )
    assert ended.codes == [0, 0], ended.stderr
    before = load_file(extended.model / "model.safetensors")
    after = load_file(tmp_path / "run/export/model.safetensors")
    first = extended.old_vocab_size
    for name, weight in before.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert after[name][:first].equal(weight[:first]), name
            moved = (after[name] != weight).any(dim=1)[first : first + NEW_TOKENS]
            assert moved.any(), name
        else:
            assert after[name].equal(weight), name
    written = json.loads((tmp_path / "run/export" / FILE_NAME).read_text("utf-8"))
    assert written["old_vocab_size"] == first


def test_a_checkpoint_with_its_optimizer_goes_into_a_run_on_new_data(
    tiny: TinyFiles, extended: Extended, zygote: Zygote, tmp_path: Path
) -> None:
    before = overrides(tiny, tmp_path / "before", "train.train_iters=3")
    ended = zygote.run(before, stderr=tmp_path / "before.log")
    assert ended.codes == [0], ended.stderr

    def write_tokenizer(directory: Path) -> None:
        open_extender(tiny.model).write(extended.extension, directory)

    resize_checkpoint(
        tmp_path / "before/checkpoints/step_0000003",
        tmp_path / "resized",
        extended.extension,
        write_tokenizer=write_tokenizer,
    )
    wanted = [f"model.hf_path={tmp_path / 'resized'}", "checkpoint.load_optimizer=true"]
    first_loss = {}
    for name, groups in (("warm-up", [WARM_UP]), ("without", [])):
        words = _overrides(tiny, extended, tmp_path / name, *wanted, *groups)
        words.remove(f"model.hf_path={extended.model}")
        ended = zygote.run(words, stderr=tmp_path / f"{name}.log")
        assert ended.codes == [0], ended.stderr
        warned = "embedding.word_embeddings.weight from row" in ended.stderr
        assert warned == (name == "without")
        assert ("group new: 2 parameter(s) (rows from" in ended.stderr) == (name == "warm-up")
        first_loss[name] = next(r["loss"] for r in records(tmp_path / name) if "loss" in r)
        last = tmp_path / name / "checkpoints/step_0000004"
        info = json.loads((last / "checkpoint.json").read_text("utf-8"))
        assert (info["step"], info["optimizer_steps"]) == (4, 3 + 4)
        if name == "warm-up":
            # The new rows in all four steps of this run; the others in three before and two of it.
            record = load_common_state_dict(last / "dist")["group_steps"]
            assert [entry["steps"] for entry in record] == [4, 3 + 2]
    assert first_loss["warm-up"] == first_loss["without"]


def test_faults_are_told_before_anything_is_built(
    tiny: TinyFiles, extended: Extended, zygote: Zygote, tmp_path: Path
) -> None:
    old_index = [
        tiny.sources() if text.startswith("data.sources=") else text
        for text in _overrides(tiny, extended, tmp_path / "a")
    ]
    groups = "optim.param_groups=[{name: a, parameters: [embedings], rows: new, lr: 1e-4}]"
    for words, parts in (
        (old_index, ["made with another tokenizer", "preprocess_data.py retokenize"]),
        (_overrides(tiny, extended, tmp_path / "b", groups), ["'embedings' matches nothing"]),
        (
            overrides(tiny, tmp_path / "c", groups.replace("embedings", "embeddings")),
            ["there is no vocab_extension.json beside the model"],
        ),
    ):
        ended = zygote.run(words, stderr=tmp_path / "log")
        assert ended.codes == [2]
        assert "Traceback" not in ended.stderr
        for part in parts:
            assert part in ended.stderr
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()
