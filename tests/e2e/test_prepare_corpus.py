"""``tools/prepare_corpus.py`` as users run it: bad input, kills, full disks, two at once."""

import contextlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from corpus_samples import read_shards, record, tree, write_jsonl

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "prepare_corpus.py"
# Parts of a few documents, so that there are many moments to be killed at.
# Cleaning and redaction are not what is interrupted here, and take long to start in each process.
QUICK = ("clean.enabled=false", "redact.enabled=false")
SMALL = ("read.part_mib=0.02", "split.validation_fraction=0.1", *QUICK)


def _command(*words: str | Path) -> list[str]:
    return [sys.executable, str(TOOL), *map(str, words)]


_STARTED: list["subprocess.Popen[str]"] = []


@pytest.fixture(autouse=True)
def end_what_was_started() -> Iterator[None]:
    """A test that fails leaves no run behind, nor its workers."""
    yield
    for run in _STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    _STARTED.clear()


def _start(*words: str | Path) -> "subprocess.Popen[str]":
    run = subprocess.Popen(
        _command(*words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=ROOT,
    )
    _STARTED.append(run)
    return run


def _run(*words: str | Path, code: int = 0) -> str:
    """Run to the end; returns what a user reads, of standard error if something was wrong."""
    done = subprocess.run(_command(*words), capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr if code else done.stdout


Call = Callable[..., str]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """`_run` without a process of its own, most of whose time goes into imports."""
    spec = importlib.util.spec_from_file_location("prepare_corpus", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*words: str | Path, code: int = 0) -> str:
        capsys.readouterr()
        assert tool.main([*map(str, words)]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty files of ten documents."""
    folder = tmp_path_factory.mktemp("in")
    for number in range(30):
        rows = [
            {"id": f"{number}-{row}", "text": record(number * 10 + row) * 2} for row in range(10)
        ]
        write_jsonl(folder / f"{number:02d}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def expected(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The output of a run that nothing disturbed, in one process."""
    output = tmp_path_factory.mktemp("out") / "corpus"
    _run("--input", f"domain={inputs}", "--output", output, "--workers", "1", *SMALL)
    return tree(output)


def test_killed_at_any_moment(inputs: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Main process and workers are killed again and again; each time the same command follows."""
    output, moments = tmp_path / "corpus", random.Random(0)
    words = ("--input", f"domain={inputs}", "--output", output, "--workers", "2", *SMALL)
    kills = 0
    while not (output / "manifest.json").exists():
        run = _start(*words)
        # Counted in what is done rather than in seconds: so it comes as far on a slow machine.
        goal, deadline = _num_results(output) + moments.randrange(4, 30), time.monotonic() + 60
        while run.poll() is None and _num_results(output) < goal and time.monotonic() < deadline:
            time.sleep(0.002)
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            kills += 1
        run.wait()
        run.communicate()
    assert kills >= 2
    if set(os.listdir(output)) & {".work", ".work.old"}:  # it was killed while it tidied up
        _start(*words).communicate()
    assert tree(output) == expected


def _num_results(output: Path) -> int:
    return sum(1 for _ in (output / ".work").rglob("tally.json"))


def test_a_termination_and_a_killed_worker_are_told(
    inputs: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "corpus"
    words = ("--input", f"domain={inputs}", "--output", output, "--workers", "2", *SMALL)
    run = _started(words, output, results=1)
    run.send_signal(signal.SIGTERM)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 130, stderr
    assert "goes on where it stopped" in stderr and "Traceback" not in stderr

    run = _started(words, output, results=_num_results(output) + 1)
    os.kill(_workers(run.pid)[0], signal.SIGKILL)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 2, stderr
    assert "a worker process was killed" in stderr and "Traceback" not in stderr

    assert not (output / "manifest.json").exists()
    _run(*words)
    assert tree(output) == expected


def _started(
    words: tuple[str | Path, ...], output: Path, *, results: int
) -> "subprocess.Popen[str]":
    """A run that has come so far."""
    run = _start(*words)
    while _num_results(output) < results:
        assert run.poll() is None, run.communicate()
        time.sleep(0.002)
    return run


def _workers(parent: int) -> list[int]:
    """Children that a pool spawned."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [
        int(child)
        for child in children
        if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()
    ]


def test_two_runs_on_one_output(inputs: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "corpus"
    words = ("--input", f"domain={inputs}", "--output", output, "--workers", "1", *SMALL)
    run = _start(*words)
    while not (output / ".work").exists() and run.poll() is None:
        time.sleep(0.002)
    assert "another run is writing" in _run(*words, code=2)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 0, stderr
    assert tree(output) == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where mounting one is allowed."""
    target = tmp_path / "disk"
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(target)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield target
    subprocess.run(["umount", str(target)], check=True)


def test_a_full_disk(inputs: Path, expected: dict[str, bytes], small_disk: Path) -> None:
    """Told without a traceback, however little room there is; with room the run goes on."""
    words = ("--input", f"domain={inputs}", "--output", small_disk / "corpus", "--workers", "1")
    filler = small_disk / "filler"
    for free_kib in (0, 300):
        filler.write_bytes(bytes(0))
        room = os.statvfs(small_disk)
        filler.write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - free_kib * 1024)))
        message = _run(*words, *SMALL, code=2)
        told = [line for line in message.splitlines() if "going on" not in line]
        assert len(told) == 1 and "No space left on device" in told[0], message
        assert not (small_disk / "corpus" / "manifest.json").exists()
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    _run(*words, *SMALL)
    assert tree(small_disk / "corpus") == expected


BAD: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "unknown setting": (["clean.min_charcters=5"], ("clean.min_charcters", "clean.min_characters")),
    "unknown group": (["cleaning.min_characters=5"], ("cleaning", "did you mean clean?")),
    "wrong type": (["clean.min_characters=many"], ("clean.min_characters", "many")),
    "faulty setting": (["split.validation_fraction=2"], ("split.validation_fraction: 2",)),
    "missing config": (["--config", "nothing.yaml"], ("nothing.yaml",)),
    "twice": (["--field", "body", "read.field=text"], ("read.field", "given twice")),
    "no setting": (["clean"], ("clean",)),
    "no such source": (["--license", "web=MIT"], ("--license web=MIT", "domain")),
    "wrong field": (["--field", "body"], ("no field 'body'", "'text'", "30")),
    "bad limit": (["--max-bad-lines", "few"], ("read.max_bad", "few")),
    "no earlier corpus": (["--against", "/nowhere"], ("/nowhere",)),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_user_can_get_wrong(inputs: Path, tmp_path: Path, name: str, call: Call) -> None:
    more, texts = BAD[name]
    words = ("--output", tmp_path / "corpus", *more, "--workers", "1", "--input", inputs)
    message = call(*words, code=2)
    assert message.startswith("prepare_corpus: ")
    for text in texts:
        assert text in message, message


def test_a_fault_ends_the_process_without_a_traceback(inputs: Path, tmp_path: Path) -> None:
    message = _run("--input", inputs, "--output", tmp_path / "corpus", "clean.x=1", code=2)
    assert message.startswith("prepare_corpus: clean.x: unknown key")


def test_a_reader_that_has_had_enough(tmp_path: Path) -> None:
    """Such as ``head``: no complaint, and the corpus is there."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": record(1)}])
    theirs, ours = os.pipe()
    os.close(theirs)
    words = ("--input", path, "--output", tmp_path / "corpus", "--workers", "1", *QUICK)
    command = _command(*words)
    done = subprocess.run(command, stdout=ours, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(ours)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "corpus" / "manifest.json").exists()


def test_options_settings_and_trace(tmp_path: Path, call: Call) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"body": record(1)}, "{broken", {"body": record(1)}])
    (tmp_path / "in" / "规程.txt").write_bytes(record(2).encode("gb18030"))
    (tmp_path / "settings.yaml").write_text("split:\n  validation_fraction: 0\nclean:\n")
    output = tmp_path / "corpus"
    summary = call(
        *("--input", f"domain={tmp_path / 'in'}", "deduplicate.near=false", "--output", output),
        *("--field", "body", "--max-bad-lines", "1", "--config", tmp_path / "settings.yaml"),
        *("--license", "domain=MIT", "write.shard_mib=7", "--workers", "1"),
        *("--classification", "内部", "deduplicate.seed=3"),
    )
    assert "read/broken_line" in summary and "duplicate/exact" in summary
    lines = {line["id"]: line for line in read_shards(output / "train")}
    assert lines["domain/规程.txt"]["text"] == record(2)
    assert {(line["license"], line["classification"]) for line in lines.values()} == {
        ("MIT", "内部")
    }
    settings = json.loads((output / "manifest.json").read_text())["settings"]
    assert settings["deduplicate"]["near"] is False
    assert (settings["write"]["shard_mib"], settings["deduplicate"]["seed"]) == (7, 3)
    assert settings["split"]["validation_fraction"] == 0

    kept = call("trace", "--document", "domain/规程.txt", "--in", output)
    assert "train/domain-00000.jsonl.zst, row 1" in kept
    dropped = call("trace", "--document", "domain/a.jsonl#3", "--in", output)
    assert "duplicate/exact" in dropped and "domain/a.jsonl#1" in dropped
    broken = call("trace", "--document", "domain/a.jsonl#2", "--in", output)
    assert "read/broken_line" in broken
    assert "nothing/here" in call("trace", "--document", "nothing/here", "--in", output, code=2)


def test_an_option_given_twice_adds_to_the_first(tmp_path: Path, call: Call) -> None:
    for number, name in enumerate(("a", "b"), 1):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": record(number)}])
    call(
        *("--input", f"a={tmp_path / 'a.jsonl'}", "--input", f"b={tmp_path / 'b.jsonl'}"),
        *("--output", tmp_path / "corpus", "--workers", "1", *QUICK),
        *("--license", "a=MIT", "--license", "b=CC0-1.0", "split.validation_fraction=0"),
    )

    lines = read_shards(tmp_path / "corpus" / "train")
    assert {(line["source"], line["license"]) for line in lines} == {("a", "MIT"), ("b", "CC0-1.0")}
