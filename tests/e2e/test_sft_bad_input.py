"""What a user can get wrong about conversations and adapters: one message, exit code 2."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_chats import CHATML, TinyChats
from train_runs import Ended, Zygote, records, sft_overrides

from megatron_cgn.testing import tiny_hf_model

LORA = ("+lora=default", "lora.rank=4")
QUIET = ("samples.count=0", "samples.max_new_tokens=128")
SHORT = ("train.train_iters=1", "export.enabled=false", *QUIET)


def _refused(ended: Ended, output: Path, *texts: str) -> None:
    """Every rank exits 2; standard error is the one message; nothing was left behind."""
    assert set(ended.codes) == {2}, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    assert sum(line.startswith("error: ") for line in ended.stderr.splitlines()) == 1, ended.stderr
    for text in texts:
        assert text in ended.stderr, ended.stderr
    if output.is_dir():
        # Only encoded conversations, which are whole and keyed by what they are of.
        assert [p.name for p in output.iterdir()] in ([], ["cache"])
        assert not [p for p in output.rglob("*") if ".tmp" in p.name or ".partial" in p.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something wrong, and what the message must say."""

    texts: tuple[str, ...]
    settings: tuple[str, ...] = ()
    break_it: Callable[[TinyChats], object] = lambda _: None
    ranks: int = 1


def _add(*records: Any) -> Callable[[TinyChats], object]:
    """Append records to the file of the source ``domain``, which has 30."""

    def add(chats: TinyChats) -> None:
        with chats.domain.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    return add


def _template(text: str) -> Callable[[TinyChats], object]:
    return lambda chats: (chats.model / "chat_template.jinja").write_text(text, "utf-8")


def _said(role: str, content: str) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": role, "content": content}, {"role": "user", "content": "b"}]}


FAULTS = {
    "unknown role": Fault(
        break_it=_add({"messages": [{"role": "robot", "content": "a"}]}),
        texts=("domain.jsonl", "31", "robot", "assistant", "--validate"),
    ),
    "empty assistant turn": Fault(
        break_it=_add({"instruction": "a", "output": " "}),
        texts=("domain.jsonl", "31", "empty"),
        ranks=2,
    ),
    "special token in a text": Fault(
        break_it=_add({"instruction": "a<|im_end|>", "output": "b"}),
        texts=("domain.jsonl", "31", "<|im_end|>"),
    ),
    "several faults at once": Fault(
        break_it=_add({"messages": [{"role": "robot", "content": "a"}]}, [1], {"text": "a"}),
        texts=("31", "32", "33"),
    ),
    "no JSON": Fault(
        break_it=lambda chats: chats.domain.write_text("{oops\n"),
        texts=("domain.jsonl", "1"),
    ),
    "no conversation": Fault(
        break_it=lambda chats: chats.domain.write_text(""), texts=("domain.jsonl",)
    ),
    "no file": Fault(break_it=lambda chats: chats.domain.unlink(), texts=("domain.jsonl",)),
    "longer than the sequence": Fault(
        settings=("chat.truncation=error", "data.seq_length=48"),
        texts=("chat.truncation=error", "domain.jsonl", "data.seq_length=48", "keep_start"),
    ),
    "all longer than the sequence": Fault(
        settings=("data.seq_length=4",), texts=("domain", "data.seq_length")
    ),
    "no template": Fault(
        break_it=lambda chats: (chats.model / "chat_template.jinja").unlink(),
        texts=("chat template", "chatml"),
        ranks=2,
    ),
    "template that is no Jinja": Fault(
        break_it=_template("{% for m in messages %}"), texts=("chat_template.jinja",)
    ),
    "template that fails": Fault(
        break_it=_template("{{ raise_exception('no, never') }}"),
        texts=("chat_template.jinja", "no, never"),
    ),
    "template without an end of turn": Fault(
        break_it=_template(CHATML.replace("<|im_end|>", "")), texts=("chat_template.jinja", "end")
    ),
    "template that nobody has": Fault(settings=("chat.template=llama9",), texts=("llama9",)),
    "targets that match no layer": Fault(
        settings=(*LORA, "lora.targets=[q_proj,w_proj]"),
        texts=("lora.targets: 'w_proj' matches no layer", "q_proj, k_proj"),
    ),
    "rank larger than the matrix": Fault(
        settings=(*LORA, "lora.rank=17"), texts=("lora.rank: 17", "k_proj [16, 32]", "at most 16")
    ),
    "prompt without room": Fault(
        settings=(f"samples.prompts=[{'coolant ' * 60}]", "samples.count=3"),
        texts=("samples.prompts.0", "max_position_embeddings=128"),
    ),
    "index of another stage": Fault(
        settings=("data.sources=[{name: domain, path: data/domain}]",),
        texts=("data.sources[domain].path: 'data/domain'", "no file of conversations"),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(chats: TinyChats, zygote: Zygote, tmp_path: Path, name: str) -> None:
    fault = FAULTS[name]
    shutil.copytree(chats.model.parent, tmp_path, dirs_exist_ok=True)
    broken = TinyChats(
        model=tmp_path / "model",
        domain=tmp_path / "domain.jsonl",
        general=tmp_path / "general.jsonl",
    )
    fault.break_it(broken)
    ended = zygote.run(
        sft_overrides(broken, tmp_path / "run", *fault.settings),
        stderr=tmp_path / "stderr",
        ranks=fault.ranks,
    )
    _refused(ended, tmp_path / "run", *fault.texts)


@pytest.mark.parametrize(
    ("policy", "text"),
    [("drop", "left out, longer"), ("keep_start", "truncated"), ("keep_end", "truncated")],
)
def test_conversations_longer_than_the_sequence_are_counted(
    chats: TinyChats, zygote: Zygote, tmp_path: Path, policy: str, text: str
) -> None:
    more = (f"chat.truncation={policy}", "data.seq_length=48", *SHORT)
    ended = zygote.run(sft_overrides(chats, tmp_path, *more), stderr=tmp_path / "stderr")
    assert ended.codes == [0], ended.stderr
    (line,) = (line for line in ended.stderr.splitlines() if text in line and "domain" in line)
    (source, _) = json.loads((tmp_path / "sft.json").read_text())["sources"]
    (file,) = source["files"]
    number = file["left_out_too_long" if policy == "drop" else "truncated"]
    assert number > 0 and f"of 30 conversations {number} " in line


@pytest.fixture(scope="module")
def adapter_of_another(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter directory that `peft` wrote, of a model of another width."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("other")
    tiny_hf_model(root / "model", vocab_size=390, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(str(root / "adapter"))
    return root / "adapter"


def test_adapter_of_another_model(
    chats: TinyChats, zygote: Zygote, adapter_of_another: Path, tmp_path: Path
) -> None:
    more = (*LORA, "lora.targets=[q_proj]", f"lora.adapter_path={adapter_of_another}")
    ended = zygote.run(
        sft_overrides(chats, tmp_path / "run", *more), stderr=tmp_path / "stderr", ranks=2
    )
    _refused(
        ended, tmp_path / "run", str(adapter_of_another), "(4, 64)", "(4, 32)", "another model"
    )


@pytest.fixture(scope="module")
def saved(chats: TinyChats, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run of adapters that ended after two steps."""
    output = tmp_path_factory.mktemp("saved")
    more = (*LORA, *QUIET, "train.train_iters=2", "lora.export=adapter")
    ended = zygote.run(sft_overrides(chats, output, *more), stderr=output / "stderr")
    assert ended.codes == [0], ended.stderr
    assert not (output / "export").exists() and (output / "adapter").is_dir()
    return output


def _other_weights(chats: TinyChats) -> None:
    from safetensors.torch import load_file, save_file

    path = chats.model / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] += 1.0
    save_file(weights, path, metadata={"format": "pt"})


CHANGES: dict[str, tuple[Sequence[str], Callable[[TinyChats], object], tuple[str, ...]]] = {
    "other rank": (
        ["lora.rank=2"],
        lambda _: None,
        ("lora.rank: checkpoint 4, this run 2",),
    ),
    "no adapters": (["lora.rank=null", "lora.alpha=null"], lambda _: None, ("adapters only",)),
    "other template": (
        [],
        _template(CHATML.replace("'\n' }}", "'\n\n' }}")),
        ("chat.template: checkpoint",),
    ),
    "other data": (
        [],
        _add({"instruction": "one more", "output": "answer"}),
        ("data.plan", "the conversations of the source 'domain' have changed"),
    ),
    "other weights": ([], _other_weights, ("model.hf_path", "are others")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_resuming_with_something_else(
    chats: TinyChats, zygote: Zygote, saved: Path, tmp_path: Path, name: str
) -> None:
    settings, change, texts = CHANGES[name]
    shutil.copytree(chats.model.parent, tmp_path, dirs_exist_ok=True)
    changed = TinyChats(
        model=tmp_path / "model",
        domain=tmp_path / "domain.jsonl",
        general=tmp_path / "general.jsonl",
    )
    change(changed)
    output = tmp_path / "run"
    shutil.copytree(saved, output, symlinks=True)
    before = records(output)
    more = (*LORA, *QUIET, "train.train_iters=4", "lora.export=adapter")
    if name == "no adapters":
        more = tuple(t for t in more if not t.startswith(("+lora", "lora.")))
    given = {text.partition("=")[0] for text in settings}
    kept = [text for text in more if text.partition("=")[0] not in given]
    ended = zygote.run(sft_overrides(changed, output, *kept, *settings), stderr=tmp_path / "stderr")
    assert ended.codes == [2], ended.stderr
    assert "Traceback" not in ended.stderr and ended.stderr.count("error: ") == 1, ended.stderr
    for text in ("step_0000002", *texts):
        assert text in ended.stderr, ended.stderr
    assert records(output) == before
    if name == "other template":  # all conversations differ then, which is not said as well
        assert "data.plan" not in ended.stderr, ended.stderr


def test_a_checkpoint_of_adapters_is_no_model(
    chats: TinyChats, zygote: Zygote, saved: Path, tmp_path: Path
) -> None:
    more = (f"model.hf_path={saved / 'checkpoints/latest'}",)
    ended = zygote.run(sft_overrides(chats, tmp_path / "run", *more), stderr=tmp_path / "stderr")
    _refused(ended, tmp_path / "run", "adapters only", "lora.adapter_path", "export")
