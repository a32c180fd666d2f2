"""The import contracts: each rule breaks on the import it forbids, on a tree of stubs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A tree that uses every import the contracts allow.
ALLOWED = {
    "batch": "",
    "errors": "",
    "testing": "import megatron_cgn.stages.cpt",
    "config.schema": "import megatron_cgn.errors",
    "config.load": "import hydra, omegaconf",
    "parallel.state": "import megatron.core",
    "model.build": "import megatron.core, megatron_cgn.parallel.state",
    "hf.load": "import megatron.core, megatron_cgn.model.build",
    "data.pretrain": "import megatron.core, tokenizer.wrapper, megatron_cgn.batch",
    "objectives.base": "import megatron_cgn.batch",
    "objectives.next_token": "import megatron_cgn.objectives.base",
    "engine.engine": "import megatron.core, megatron_cgn.hf.load, megatron_cgn.objectives.base",
    "rollout.source": "import megatron_cgn.engine.engine, megatron_cgn.data.pretrain",
    "eval.harness": "import megatron_cgn.engine.engine",
    "stages.cpt": "import megatron_cgn.engine.engine, megatron_cgn.objectives.next_token",
}


def _lint(tree: Path, **modules: str) -> subprocess.CompletedProcess[str]:
    """Run the linter on ``tree`` after writing ``modules`` into it, `__` standing for a dot."""
    sources = {f"megatron_cgn.{name}": text for name, text in ALLOWED.items()}
    sources["tokenizer.wrapper"] = "import megatron_cgn.errors"
    sources |= {name.replace("__", "."): text for name, text in modules.items()}
    for name, text in sources.items():
        file = tree.joinpath(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        for package in file.relative_to(tree).parents[:-1]:
            (tree / package / "__init__.py").touch()
    shutil.copy(ROOT / "pyproject.toml", tree)
    return subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-logo", "--no-cache"],
        cwd=tree,
        env={"PYTHONPATH": str(tree), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def test_allowed_imports_pass(tmp_path: Path) -> None:
    done = _lint(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_a_tree_with_most_packages_missing_passes(tmp_path: Path) -> None:
    for name in ("megatron_cgn", "tokenizer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    for name in ("errors.py", "testing.py", "config/__init__.py", "model/__init__.py"):
        file = tmp_path / "megatron_cgn" / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    (tmp_path / "megatron_cgn" / "parallel").mkdir()
    (tmp_path / "megatron_cgn" / "parallel" / "__init__.py").touch()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-logo", "--no-cache"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "text", "rule"),
    [
        ("megatron_cgn__engine__fit", "import megatron_cgn.stages.cpt", "Imports point down"),
        ("megatron_cgn__model__x", "import megatron_cgn.hf.load", "Imports point down"),
        ("megatron_cgn__objectives__dpo", "import megatron_cgn.engine.engine", "Imports point"),
        ("megatron_cgn__objectives__dpo", "import megatron_cgn.model.build", "Objectives and data"),
        ("megatron_cgn__data__sft", "import megatron_cgn.parallel.state", "Objectives and data"),
        ("megatron_cgn__engine__fit", "import megatron_cgn.objectives.next_token", "The engine"),
        ("megatron_cgn__engine__fit", "import megatron_cgn.data.pretrain", "The engine"),
        ("megatron_cgn__config__validate", "import megatron_cgn.data.pretrain", "Configuration"),
        ("megatron_cgn__stages__sft", "import megatron.core", "megatron.core is imported only"),
        ("megatron_cgn__stages__sft", "import omegaconf", "Only config.load"),
        ("tokenizer__chat", "import megatron_cgn.batch", "tokenizer stands alone"),
        ("megatron_cgn__stages__sft", "import megatron_cgn.testing", "Only tests use"),
    ],
)
def test_a_forbidden_import_breaks_its_rule(
    tmp_path: Path, module: str, text: str, rule: str
) -> None:
    done = _lint(tmp_path, **{module: text})
    assert done.returncode == 1, done.stdout
    broken = [line for line in done.stdout.splitlines() if " BROKEN" in line]
    assert any(line.startswith(rule) for line in broken), done.stdout
