"""Read a configuration: Hydra composes it, types are checked, unknown keys get a suggestion.

The only module that knows Hydra and OmegaConf. What comes out is a frozen `RunConfig`.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from megatron_cgn.config.corpus import CorpusConfig
from megatron_cgn.config.schema import RunConfig
from megatron_cgn.errors import ConfigError

CONFIG_DIR = Path(__file__).resolve().parents[2] / "hydra_conf"
_GROUPS = ("stage", "model", "data", "parallel", "optim", "lora", "experiment")


def compose_config(overrides: Sequence[str], *, config_dir: Path = CONFIG_DIR) -> dict[str, Any]:
    """Compose defaults, chosen groups and overrides into one plain dictionary.

    Args:
        overrides: Hydra's, e.g. ``["+stage=cpt", "optim.lr=1e-5"]``.
        config_dir: Where ``config.yaml`` and the groups are.

    Returns:
        Nested dictionaries and lists, interpolations resolved.

    Raises:
        ConfigError: If an override or a file is wrong; for an unknown key the nearest is named.
    """
    # YAML holds choices; names and defaults are the dataclasses'.
    ConfigStore.instance().store("schema", _defaults())
    faults: list[str] = []
    remaining = list(overrides)
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        while True:
            try:
                composed = compose("config", overrides=remaining)
                assert isinstance(composed, DictConfig)
                container = OmegaConf.to_container(composed, resolve=True)
                break
            # Hydra checks some overrides with plain ValueErrors.
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                faults.append(_explain(error, config_dir))
                # Hydra stops at the first unknown key: look for others without it.
                fewer = _without(remaining, str(error))
                if len(fewer) == len(remaining):
                    raise ConfigError("\n".join(faults)) from error
                remaining = fewer
    if faults:
        raise ConfigError("\n".join(faults))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def load_config(overrides: Sequence[str], *, config_dir: Path = CONFIG_DIR) -> RunConfig:
    """Compose and type a configuration.

    Args:
        overrides: Hydra's, e.g. ``["+stage=cpt", "optim.lr=1e-5"]``.
        config_dir: Where ``config.yaml`` and the groups are.

    Returns:
        The configuration. Rules across fields are `validate.py`'s.

    Raises:
        ConfigError: Naming every unknown key and every value of a wrong type.
    """
    return typed_config(compose_config(overrides, config_dir=config_dir))


def typed_config(values: dict[str, Any]) -> RunConfig:
    """Turn a composed dictionary into a `RunConfig`.

    Args:
        values: From `compose_config`, or read back from a run's ``config.yaml``.

    Returns:
        The configuration.

    Raises:
        ConfigError: Naming every unknown key and every value of a wrong type.
    """
    return _typed(values, RunConfig)


def load_corpus_config(
    overrides: Sequence[str],
    *,
    file: str | Path | None = None,
    values: Mapping[str, Any] | None = None,
) -> CorpusConfig:
    """Read the settings of ``prepare_corpus.py``.

    Args:
        overrides: ``step.name=value``, the value as in YAML; they win over the file.
        file: A YAML file of settings, or the name of one in ``hydra_conf/corpus/``.
        values: Further settings by their paths, which win over all.

    Returns:
        The settings. Rules are `CorpusConfig.faults`'s.

    Raises:
        ConfigError: Naming every unknown key and every value of a wrong type.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override}: not a setting; write step.name=value.")
    try:
        merged = OmegaConf.load(_corpus_file(file)) if file is not None else OmegaConf.create({})
        if not isinstance(merged, DictConfig):
            raise ConfigError(f"{file}: holds no settings; write groups as in clean: ….")
        merged.merge_with_dotlist(list(overrides))
        for path, value in (values or {}).items():
            OmegaConf.update(merged, path, value)
        container = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file or ' '.join(overrides)}: cannot be read ({error}).") from error
    assert isinstance(container, dict)
    # A group that is named and left empty keeps its defaults.
    named = {str(key): {} if value is None else value for key, value in container.items()}
    return _typed(named, CorpusConfig)


def _corpus_file(file: str | Path) -> Path:
    path = Path(file)
    if path.exists():
        return path
    known = CONFIG_DIR / "corpus" / f"{file}.yaml"
    if known.is_file():
        return known
    # Those with a dot, such as patterns.example.yaml, are no settings.
    names = ", ".join(sorted(p.stem for p in known.parent.glob("*.yaml") if "." not in p.stem))
    raise ConfigError(
        f"{file}: there is no such file of settings. Give a YAML file"
        + (f", or one of: {names}." if names else ".")
    )


def _typed[T: (RunConfig, CorpusConfig)](values: dict[str, Any], cls: type[T]) -> T:
    faults = [_unknown(path, cls) for path in _unknown_keys(values, cls)]
    if not faults:
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            faults = [
                f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}; "
                f"got {fault['input']!r}."
                for fault in error.errors()
            ]
    raise ConfigError("\n".join(faults))


def dump_config(run: RunConfig) -> str:
    """Write a configuration as YAML.

    Args:
        run: The configuration.

    Returns:
        Text that `typed_config` reads back to the same.
    """
    return OmegaConf.to_yaml(OmegaConf.create(_plain(dataclasses.asdict(run))))


def key_paths() -> list[str]:
    """Every dotted configuration key."""
    return list(_paths(RunConfig))


def _defaults() -> dict[str, Any]:
    plain = _plain(dataclasses.asdict(RunConfig()))
    assert isinstance(plain, dict)
    # "+stage=cpt" chooses a file of the group "stage", which then sets the key.
    del plain["stage"]
    return plain


def _plain(value: Any) -> Any:
    """Tuples become lists, all the way down: YAML has no tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _paths(cls: type, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(cls):
        path = f"{prefix}{field.name}"
        yield path
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from _paths(field.type, f"{path}.")


def _item_class(field: dataclasses.Field[Any]) -> type | None:
    """The dataclass of which a field holds a tuple, if it does."""
    item = next(iter(get_args(field.type)), None)
    return item if isinstance(item, type) and dataclasses.is_dataclass(item) else None


def _item_paths(cls: type, prefix: str = "") -> Iterator[str]:
    """Keys of what the fields that hold tuples of dataclasses hold."""
    for field in dataclasses.fields(cls):
        inner = _item_class(field)
        if inner is not None:
            yield from _paths(inner, f"{prefix}{field.name}.")
            yield from _item_paths(inner, f"{prefix}{field.name}.")
        elif isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from _item_paths(field.type, f"{prefix}{field.name}.")


def _unknown_keys(values: dict[str, Any], cls: type, prefix: str = "") -> Iterator[str]:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in fields:
            yield path
        elif isinstance(value, list) and (item_class := _item_class(fields[key])):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    yield from _unknown_keys(item, item_class, f"{path}.{index}.")
        elif isinstance(value, dict):
            section = fields[key].type
            # A scalar's type is no dataclass: the type check tells that fault.
            if isinstance(section, type) and dataclasses.is_dataclass(section):
                yield from _unknown_keys(value, section, f"{path}.")


def _unknown(path: str, cls: type = RunConfig) -> str:
    known = [*_paths(cls), *_item_paths(cls)]
    plain = re.sub(r"\.\d+\.", ".", path)
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
    if not near:
        # A wrong section hides the likeness of the last word.
        last = plain.rpartition(".")[2]
        near = [p for p in known if p.rpartition(".")[2] == last][:1]
    return f"{path}: unknown key{f'; did you mean {near[0]}?' if near else '.'}"


_UNKNOWN_KEY = re.compile(r"Could not override '([^']+)'")


def _without(overrides: list[str], message: str) -> list[str]:
    """The overrides but for the one whose key Hydra does not know."""
    unknown = _UNKNOWN_KEY.search(message)
    if unknown is None:
        return overrides
    return [o for o in overrides if o.partition("=")[0] != unknown.group(1)]


def _explain(error: Exception, config_dir: Path) -> str:
    """Say what was wrong with an override in one line, without Hydra's advice."""
    message = str(error)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: cannot be read as key=value. Text other than plain Latin words "
            "takes quotes of its own, as in 'output_dir=\"runs/核电\"'; names of sources in a mix "
            "cannot have them, and go into a recipe of hydra_conf/experiment/ instead."
        )
    unknown = _UNKNOWN_KEY.search(message)
    if unknown:
        key = unknown.group(1)
        if key in _GROUPS:
            return f"{key}=…: a file is chosen with a plus sign: +{key}=…"
        return _unknown(key)
    choice = re.search(r"Could not find '([\w/]+)/([\w.-]+)'", message)
    if choice:
        group, name = choice.groups()
        names = sorted(p.stem for p in (config_dir / group).glob("*.yaml"))
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        choices = f"choose from {', '.join(names)}." if names else f"{group} has no files yet."
        return f"{group}={name}: there is no {name}.yaml; {choices}{hint}"
    if "Config group override" in message:
        return f"{', '.join(_GROUPS)}: these take the name of a file, as in +stage=cpt. {message}"
    return message.strip().splitlines()[0]
