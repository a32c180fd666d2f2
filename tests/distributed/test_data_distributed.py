"""Data in several processes: one order for all, one fault for all."""

from pathlib import Path

import torch.distributed as dist

from megatron_cgn.config.schema import DataConfig, RunConfig, SourceConfig, TrainConfig
from megatron_cgn.data import pretrain, sft, windows
from megatron_cgn.data.collective import together
from megatron_cgn.data.pretrain import build_pretraining_data, plan_pretraining
from megatron_cgn.data.sft import build_sft_data, plan_sft
from megatron_cgn.errors import DataError
from megatron_cgn.testing import run_distributed
from tests.unit.data_samples import byte_level_tokenizer, numbered_documents, write_index
from tests.unit.sft_samples import (
    chat_tokenizer,
    random_records,
    sft_run,
    source,
    write_records,
)
from tokenizer.chat import ChatTemplate
from tokenizer.wrapper import Tokenizer


def build(folder: Path, name: str, cache: str) -> list[list[int]]:
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    sources = (
        SourceConfig(name="a", path=str(folder / name), weight=0.7),
        SourceConfig(name="b", path=str(folder / "b"), weight=0.3),
    )
    run = RunConfig(
        data=DataConfig(sources=sources, seq_length=8, validation_fraction=0.1),
        train=TrainConfig(train_iters=60, global_batch_size=1),
        seed=3,
    )
    plan = together(lambda: plan_pretraining(run, tokenizer=tokenizer), None)
    data = build_pretraining_data(plan, eod_id=tokenizer.eod_id, cache_dir=folder / cache)
    return [data.train[i]["tokens"].tolist() for i in range(60)]


def every_rank(folder: Path) -> tuple[list[list[int]], list[str], list[list[str]], list[str]]:
    """Build once whole, then with faults that only one rank meets."""
    dist.init_process_group("gloo")
    conversations, chat_messages = every_rank_of_conversations(folder)
    rows = build(folder, "a", "cache")
    messages = []
    for name, cache in (
        (f"only-for-others-{dist.get_rank()}", "cache"),  # rank 1's source is missing
        ("a", "blocked/cache"),  # only rank 0 writes the cache
    ):
        try:
            build(folder, name, cache)
        except DataError as error:
            messages.append(str(error))
    messages += late_faults(folder)
    dist.destroy_process_group()
    return rows, messages, conversations, chat_messages


def conversations_of(folder: Path, name: str, cache: str) -> list[list[str]]:
    """Ids of the conversations of every sequence of a run."""
    directory = folder / "chat-tokenizer"
    run = sft_run([source("q", str(folder / name))], epochs=2, validation_fraction=0.1)
    plan = plan_sft(
        run,
        chat=ChatTemplate.open(directory),
        tokenizer=Tokenizer.from_pretrained(directory),
        cache=folder / cache,
    )
    data = build_sft_data(plan)
    ids = [data.train.record_ids(sequence) for sequence in range(len(data.train))]
    held_out = data.validation["q"]
    return ids + [held_out.record_ids(sequence) for sequence in range(len(held_out))]


def every_rank_of_conversations(folder: Path) -> tuple[list[list[str]], list[str]]:
    """Read conversations, then with faults that only one rank meets."""
    ids = conversations_of(folder, "q.jsonl", "chat-cache")
    messages = []
    real = sft.open_store

    def missing(store: Path) -> None:
        raise OSError(116, "Stale file handle")

    for name, cache in (
        ("faulty.jsonl", "chat-cache"),
        ("q.jsonl", "blocked/cache"),  # only rank 0 writes the cache
        ("q.jsonl", "chat-cache"),  # and here rank 1 alone cannot read it
    ):
        if len(messages) == 2 and dist.get_rank() == 1:
            sft.open_store = missing  # type: ignore[assignment]
        try:
            conversations_of(folder, name, cache)
        except DataError as error:
            messages.append(str(error))
    sft.open_store = real
    return ids, messages


def late_faults(folder: Path) -> list[str]:
    """Rank 1 alone loses what it reads, after the sources have been checked."""
    messages = []
    real = {"map_tokens": windows.map_tokens, "SampleReader": pretrain.SampleReader}

    def missing(*arguments: object, **more: object) -> None:
        raise DataError("held-out tokens are gone")

    def stale(*arguments: object, **more: object) -> None:
        raise OSError(116, "Stale file handle")

    for module, name, fault in (
        (windows, "map_tokens", missing),
        (pretrain, "SampleReader", stale),
    ):
        if dist.get_rank() == 1:
            setattr(module, name, fault)
        try:
            build(folder, "a", "cache")
        except DataError as error:
            messages.append(str(error))
        setattr(module, name, real[name])
    return messages


def test_ranks_agree_on_order_and_on_faults(tmp_path: Path) -> None:
    fingerprint = Tokenizer.from_pretrained(
        byte_level_tokenizer(tmp_path / "tokenizer")
    ).fingerprint()
    for name, start in (("a", 1), ("b", 500), ("only-for-others-0", 1)):
        documents = numbered_documents([7, 9, 3, 12, 8, 5, 6, 11, 4, 10], start=start)
        write_index(tmp_path / name, documents, fingerprint=fingerprint)
    (tmp_path / "blocked").write_text("a file where a directory should be")

    alone = build(tmp_path, "a", "other-cache")
    chat_tokenizer(tmp_path / "chat-tokenizer")
    write_records(tmp_path / "q.jsonl", random_records("q", 50))
    write_records(tmp_path / "faulty.jsonl", [{"text": "no conversation"}])
    alone_ids = conversations_of(tmp_path, "q.jsonl", "other-chat-cache")
    results = run_distributed(every_rank, 2, tmp_path)
    for rows, messages, ids, chat_messages in results:
        assert ids == alone_ids
        assert len(chat_messages) == 3
        assert "faulty.jsonl:1: " in chat_messages[0]
        assert "cannot write the encoded conversations" in chat_messages[1]
        assert chat_messages[2].startswith("cannot read or write the data: [Errno 116]")
        assert rows == alone
        assert len(messages) == 4
        assert "only-for-others-1.bin: there is no such file" in messages[0]
        assert "cannot write the shuffled indices" in messages[1]
        assert messages[2] == "held-out tokens are gone"
        assert messages[3].startswith("cannot read or write the data: [Errno 116]")
