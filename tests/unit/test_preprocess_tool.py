"""tools/preprocess_data.py from the outside: output, independence of workers, faults, kills."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_cgn.data.index_writer import ALL_SUFFIXES
from megatron_cgn.data.indexed import check_index, map_tokens
from megatron_cgn.data.pool import Pool
from megatron_cgn.data.preprocess import preprocess
from megatron_cgn.errors import DataError
from tests.unit.data_samples import TEXTS, byte_level_tokenizer
from tokenizer.wrapper import Tokenizer

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 2.5 MB in documents of very different lengths, some empty: several blocks."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for i in range(3000):
            text = "" if i % 100 == 7 else TEXTS[i % len(TEXTS)] * (1 + i % 30)
            stream.write(json.dumps({"body": text}, ensure_ascii=i % 2 == 0) + "\n")
    return path


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, **options
    )


def test_three_workers_write_what_one_writes(
    tmp_path: Path, tokenizer_dir: Path, corpus: Path
) -> None:
    again = tmp_path / "again.jsonl"
    again.write_bytes(corpus.read_bytes())
    common = ("--input", corpus, again, "--tokenizer", tokenizer_dir, "--field", "body")
    alone = run(*common, "--output-prefix", tmp_path / "a")
    shared = run(*common, "--output-prefix", tmp_path / "b", "--workers", 3)
    assert (alone.returncode, shared.returncode) == (0, 0), alone.stderr + shared.stderr
    for suffix in ALL_SUFFIXES:
        a, b = ((tmp_path / f"{name}{suffix}").read_bytes() for name in "ab")
        assert a == b, suffix

    # The truth, computed here: each non-empty text's own ids, then the end of the document.
    tokenizer = Tokenizer.from_pretrained(tokenizer_dir)
    texts = [json.loads(line)["body"] for line in corpus.read_text().split("\n") if line]
    ids = [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts if text] * 2
    info = check_index(tmp_path / "a", tokenizer_fingerprint=tokenizer.fingerprint())
    assert info.lengths.tolist() == [len(document) for document in ids]
    assert np.array_equal(map_tokens(info), np.concatenate(ids))
    assert info.sidecar.text_bytes == 2 * sum(len(text.encode()) for text in texts)
    assert [(s.name, s.documents) for s in info.sidecar.sources] == [
        ("corpus.jsonl", 2970),
        ("again.jsonl", 2970),
    ]
    assert "documents                  5,940" in alone.stdout
    assert "empty, skipped                60" in alone.stdout
    assert alone.stderr == shared.stderr == ""  # no bar off a terminal, no warnings
    assert len(list(tmp_path.iterdir())) == 1 + 2 * len(ALL_SUFFIXES)


def test_without_end_of_document(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = tmp_path / "c.jsonl"
    source.write_text(json.dumps({"text": TEXTS[0]}))
    preprocess(
        [source], tokenizer_dir=tokenizer_dir, output_prefix=tmp_path / "p", append_eod=False
    )
    tokenizer = Tokenizer.from_pretrained(tokenizer_dir)
    info = check_index(tmp_path / "p")
    assert map_tokens(info).tolist() == tokenizer.encode(TEXTS[0])
    assert info.sidecar.eod_id is None


def test_faults_end_with_one_message_and_leave_nothing(
    tmp_path: Path, tokenizer_dir: Path, corpus: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(corpus.read_bytes() + b'{"body": }\n')
    out = tmp_path / "out" / "p"
    common = ("--tokenizer", tokenizer_dir, "--output-prefix", out)
    for workers in (1, 2):
        result = run("--input", bad, *common, "--field", "body", "--workers", workers)
        assert result.returncode == 2
        assert "bad.jsonl, line 3001: not valid JSON" in result.stderr
        assert len(result.stderr.splitlines()) == 1 and result.stdout == ""
        assert list(out.parent.iterdir()) == []
    result = run("--input", corpus, *common)
    assert (result.returncode, "line 1: no field 'text'" in result.stderr) == (2, True)
    result = run("--input", tmp_path / "absent.jsonl", *common)
    assert (result.returncode, "there is no such input" in result.stderr) == (2, True)
    result = run("--input", corpus, "--tokenizer", tmp_path, "--output-prefix", out)
    assert (result.returncode, "no tokenizer here" in result.stderr) == (2, True)
    assert list(out.parent.iterdir()) == []


def test_a_damaged_tokenizer_is_named(tmp_path: Path, tokenizer_dir: Path, corpus: Path) -> None:
    """Whoever opens it first: with several processes, that is not the library itself."""
    definition = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    definition["model"]["merges"].append(["zzqq", "qqzz"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    common = ("--input", corpus, "--tokenizer", tmp_path, "--output-prefix", tmp_path / "p")
    result = run(*common, "--field", "body", "--workers", 2)
    assert (result.returncode, result.stdout) == (2, "")
    assert "not a readable tokenizer" in result.stderr and "zzqq" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_no_thread_is_there_when_a_process_is_copied(
    tmp_path: Path, tokenizer_dir: Path, corpus: Path
) -> None:
    """Neither at the start nor when processes that have grown are replaced."""
    script = (
        "import runpy, sys; from megatron_cgn.data import encode; encode._SPENT_BYTES = -1 << 40\n"
        f"sys.path.insert(0, {str(Path(COMMAND[1]).parent)!r})\n"
        f"runpy.run_path({COMMAND[1]!r}, run_name='__main__')"
    )
    command = [sys.executable, "-W", "always:This process", "-c", script, "--field", "body"]
    inputs = ["--input", corpus, "--workers", "2"]
    output = ["--tokenizer", tokenizer_dir, "--output-prefix", tmp_path / "p"]
    result = subprocess.run(
        [*command, *map(str, [*inputs, *output])], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_nothing_but_empty_documents_is_a_fault(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = tmp_path / "c.jsonl"
    source.write_text('{"text": ""}\n\n')
    with pytest.raises(DataError, match=r"c\.jsonl: no documents \(1 empty ones\)"):
        preprocess([source], tokenizer_dir=tokenizer_dir, output_prefix=tmp_path / "p")
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_a_disk_that_refuses_leaves_the_old_index(
    tmp_path: Path, tokenizer_dir: Path, corpus: Path
) -> None:
    small = tmp_path / "c.jsonl"
    small.write_text(json.dumps({"text": TEXTS[0]}))
    preprocess([small], tokenizer_dir=tokenizer_dir, output_prefix=tmp_path / "p")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    arguments = ("--input", corpus, "--tokenizer", tokenizer_dir, "--field", "body")
    output = ("--output-prefix", tmp_path / "p")
    result = run(*arguments, *output, "--overwrite", preexec_fn=limit)
    assert result.returncode == 2
    assert "cannot write the index (File too large)" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    result = run(*arguments, *output)
    assert (result.returncode, "exists already" in result.stderr) == (2, True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_termination_removes_what_was_begun(
    tmp_path: Path, tokenizer_dir: Path, workers: int
) -> None:
    pipe, out = tmp_path / "slow.jsonl", tmp_path / "out"
    os.mkfifo(pipe)
    arguments = ["--input", pipe, "--tokenizer", tokenizer_dir, "--output-prefix", out / "p"]
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments), "--workers", str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    with pipe.open("w") as stream:
        stream.write((json.dumps({"text": TEXTS[0]}) + "\n") * 40_000)
        stream.flush()
        deadline = time.monotonic() + 60
        while not out.exists() or not any(path.stat().st_size for path in out.iterdir()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    slow = (
        "preprocess_data: An input is a pipe: encoding it the slow way. Give a file to be faster."
    )
    assert errors == f"{slow}\npreprocess_data: interrupted; nothing was written.\n"
    assert list(out.iterdir()) == []


def test_a_kill_leaves_nothing_that_is_taken_for_an_index(
    tmp_path: Path, tokenizer_dir: Path, corpus: Path
) -> None:
    pipe, out = tmp_path / "slow.jsonl", tmp_path / "out"
    os.mkfifo(pipe)
    arguments = ["--tokenizer", tokenizer_dir, "--output-prefix", out / "p", "--workers", 2]
    command = [*COMMAND, "--input", str(pipe), *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    with pipe.open("w") as stream:
        stream.write((json.dumps({"text": TEXTS[0]}) + "\n") * 40_000)
        stream.flush()
        deadline = time.monotonic() + 60
        while not list(out.glob("p.documents.parquet.tmp-*")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait()
    assert all(".tmp-" in path.name or path.name == ".p.lock" for path in out.iterdir())
    with pytest.raises(DataError, match="there is no such file"):
        check_index(out / "p")
    result = run("--input", corpus, "--field", "body", *arguments)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == sorted(f"p{s}" for s in ALL_SUFFIXES)


def test_help_shows_an_example() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert "--output-prefix data/domain --workers 8" in result.stdout


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_an_input_is_never_written_over(
    tmp_path: Path, tokenizer_dir: Path, overwrite: bool, suffix: str
) -> None:
    source = tmp_path / f"domain{suffix}"
    source.write_text(json.dumps({"text": TEXTS[0]}))
    before = source.read_bytes()
    if suffix == ".jsonl":  # the same file under the name of an output
        (tmp_path / "domain.bin").hardlink_to(source)
    with pytest.raises(DataError, match=r"is an input, and --output-prefix .* would write over it"):
        preprocess(
            [source],
            tokenizer_dir=tokenizer_dir,
            output_prefix=tmp_path / "domain",
            overwrite=overwrite,
        )
    assert source.read_bytes() == before
    assert not (tmp_path / "domain.idx").exists()


def test_workers_that_are_no_number_are_explained(tmp_path: Path) -> None:
    arguments = ("--input", "c.jsonl", "--tokenizer", "t", "--output-prefix", "p")
    for value in ("x", "0", "1.5"):
        result = run(*arguments, "--workers", value)
        assert result.returncode == 2
        assert f"{value}: must be a whole number of at least 1" in result.stderr


def _negative(number: int) -> int:
    return -number


def test_a_worker_may_start_processes() -> None:
    """Parsers of PDF and HTML run in processes of their own, below those of the pool."""

    def answer(number: int) -> int:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=sys.exit, args=(number,))
        process.start()
        process.join()
        return process.exitcode or 0

    with Pool(lambda: answer, processes=1, start="fork") as pool:
        assert list(pool.map([3, 4], tasks_ahead=1)) == [3, 4]


def test_few_large_blocks_are_under_way() -> None:
    """Reading stops at a number of bytes, not at a number of blocks alone."""

    def most_under_way(size: int) -> int:
        taken = most = 0

        def items() -> Iterator[int]:
            nonlocal most
            for i in range(40):
                most = max(most, i - taken)  # those before this one whose results are not taken
                yield i

        found = []
        with Pool(lambda: _negative, processes=2, start="fork") as pool:
            for result in pool.map(
                items(), tasks_ahead=12, size_of=lambda i: size, bytes_ahead=16 << 20
            ):
                found.append(result)
                taken += 1
        assert found == [-i for i in range(40)]
        return most

    assert most_under_way(1 << 20) == 12
    assert most_under_way(8 << 20) == 2  # 16 MiB
    assert most_under_way(64 << 20) == 1


@pytest.mark.parametrize("processes", [0, 3])
def test_a_fault_in_a_process_ends_the_stream(processes: int) -> None:
    def fail(i: int) -> int:
        if i == 7:
            raise DataError("seven")
        return i

    found = []
    with (
        pytest.raises(DataError, match="seven"),
        Pool(lambda: fail, processes=processes, start="fork") as pool,
    ):
        for result in pool.map(range(100), tasks_ahead=9):
            found.append(result)
    assert found == list(range(7))


def test_large_tasks_and_results_do_not_wait_for_each_other() -> None:
    """Both are more than a pipe holds."""
    texts = [f"{i}" * 200_000 for i in range(20)]
    with Pool(lambda: str.upper, processes=2, start="fork") as pool:
        assert list(pool.map(texts, tasks_ahead=8)) == texts


def test_a_spent_process_is_replaced() -> None:
    class Once:
        def __call__(self, number: int) -> tuple[int, int]:
            return number, os.getpid()

        def spent(self) -> bool:
            return True

    with Pool(Once, processes=2, start="fork") as pool:
        results = list(pool.map(range(12), tasks_ahead=6))
    assert [number for number, _ in results] == list(range(12))
    assert len({process for _, process in results}) >= 6  # each may have held one more already


def test_an_error_that_nobody_catches_does_not_hang() -> None:
    """It keeps the pool open; processes that wait for tasks must not be waited for."""
    script = (
        "from megatron_cgn.data.pool import Pool\n"
        "def run():\n"
        "    with Pool(lambda: abs, processes=2, start='fork') as pool:\n"
        "        yield from pool.map(range(100), tasks_ahead=4)\n"
        "for _ in (results := run()):\n"
        "    raise RuntimeError('a bug')\n"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert result.returncode == 1 and result.stderr.endswith("RuntimeError: a bug\n")


def test_a_killed_process_is_told_and_nothing_hangs() -> None:
    def work(number: int) -> int:
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    pool = Pool(lambda: work, processes=2, start="fork", describe=lambda i: f"task {i}")
    with pytest.raises(DataError, match="a worker process was killed.*task 5") as caught, pool:
        list(pool.map(range(100), tasks_ahead=6))
    assert "Run the same command again with fewer --workers." in str(caught.value)


def test_what_cannot_be_sent_is_told() -> None:
    with (
        pytest.raises(RuntimeError, match="cannot be sent"),
        Pool(lambda: lambda number: lambda: number, processes=1, start="fork") as pool,
    ):
        list(pool.map([1], tasks_ahead=1))
