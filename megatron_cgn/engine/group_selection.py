"""Which parameters ``optim.param_groups`` means, held against a model's table of parameters.

Every fault is found before anything is built, and told at once.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_cgn.config.optim_rules import OTHERS
from megatron_cgn.config.schema import LoraConfig, OptimConfig, ParamGroupConfig, RunConfig
from megatron_cgn.engine.checkpoint import is_checkpoint
from megatron_cgn.engine.param_groups import END, Group, Grouping, Key
from megatron_cgn.errors import ConfigError, DataError
from megatron_cgn.hf.adapter_names import module_name
from megatron_cgn.hf.families import HEAD_KEY, Parameter, Rows, parameter_table
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.lora import ADAPTERS, adapter_entries
from tokenizer.extension import FILE_NAME, Extension

_EMBEDDINGS, _OUTPUT = "embedding.word_embeddings.weight", HEAD_KEY
_WORDS = ("embeddings", "output", "norms", "blocks", OTHERS)
_ADAPTERS = f"{ADAPTERS}."

Span = tuple[int, int]
"""First row and row behind the last."""


def configured_groups(run: RunConfig, architecture: Architecture) -> Grouping | None:
    """Find what ``optim.param_groups`` means for a run's model.

    Args:
        run: The configuration.
        architecture: The model.

    Returns:
        The groups, or None if there are none.

    Raises:
        ConfigError: If they do not fit the model, naming all faults.
        DataError: If ``vocab_extension.json`` beside the model is needed and damaged.
    """
    if not run.optim.param_groups:
        return None
    start = Path(run.model.hf_path or ".")
    directory = start / "hf" if is_checkpoint(start) else start
    asks = any(g.rows != "all" and g.rows_from is None for g in run.optim.param_groups)
    first_new = first_new_id(directory) if asks else None
    lora = run.lora if run.lora.rank is not None else None
    return resolve_groups(run.optim, architecture, first_new=first_new, lora=lora)


def first_new_id(directory: Path) -> int | None:
    """Read where a model's vocabulary was extended.

    Args:
        directory: Of the model's configuration and tokenizer.

    Returns:
        Id of the first new token, or None if there is no ``vocab_extension.json``.

    Raises:
        DataError: If the file is damaged.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}). Extend the vocabulary again."
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: damaged (no object). Extend the vocabulary again.")
    return Extension.from_json(content, name=str(path)).old_vocab_size


def resolve_groups(
    optim: OptimConfig,
    architecture: Architecture,
    *,
    first_new: int | None,
    lora: LoraConfig | None = None,
) -> Grouping | None:
    """Find the parameters of each group.

    Args:
        optim: Settings, which the rules without a model have passed.
        architecture: The model.
        first_new: Id of its first new token, if its vocabulary was extended.
        lora: Adapters, which groups are then of, and of what is trained whole beside them.

    Returns:
        The groups, or None if the configuration has none.

    Raises:
        ConfigError: Naming all faults.
    """
    if not optim.param_groups:
        return None
    resolver = _Resolver(optim, architecture, first_new, lora)
    grouping = resolver.resolve()
    if resolver.faults:
        raise ConfigError("\n".join(resolver.faults))
    return grouping


@dataclass(slots=True)
class _Resolver:
    """One resolution: what is taken, and what was wrong."""

    optim: OptimConfig
    architecture: Architecture
    first_new: int | None
    lora: LoraConfig | None
    faults: list[str] = field(default_factory=list)

    def resolve(self) -> Grouping:
        table = _trained(self.architecture, self.lora)
        named = [g for g in self.optim.param_groups if OTHERS not in g.parameters]
        rows = {id(g): self._rows(g, table) for g in named}
        if self.faults:  # nothing can be said of what is left
            return Grouping(())
        self._overlaps([(g.name, rows[id(g)]) for g in named])
        rest = _left(table, list(rows.values()))
        groups = []
        for g in self.optim.param_groups:
            if OTHERS in g.parameters:
                mine, rest = rest, {}
                if not mine:
                    self.faults.append(
                        f"optim.param_groups[{g.name}].parameters: others is nothing, since other "
                        "groups have everything; remove it."
                    )
            else:
                mine = rows[id(g)]
            groups.append(_group(g, mine, self.optim))
        self._vectors(groups, table)
        if rest:
            groups.append(Group(name="", rows=rest))
        self._idle(groups)
        return Grouping(tuple(groups))

    def _rows(self, group: ParamGroupConfig, table: Sequence[Parameter]) -> dict[Key, Span]:
        where = f"optim.param_groups[{group.name}]"
        chosen: dict[Key, Parameter] = {}
        for selector in group.parameters:
            found = self._select(f"{where}.parameters", selector, table)
            chosen |= {(p.layer, p.key): p for p in found}
        span = self._span(where, group, chosen.values())
        return dict.fromkeys(chosen, span)

    def _select(self, where: str, selector: str, table: Sequence[Parameter]) -> list[Parameter]:
        """The parameters that one selector means."""
        if selector == "output" and self.architecture.ties_output:
            self.faults.append(
                f"{where}: output, but the model's output layer is its embedding "
                "(tie_word_embeddings); name embeddings alone."
            )
            return []
        found = [p for p in table if _is(selector, p)]
        if not found and any(_is(selector, p) for p in parameter_table(self.architecture)):
            self.faults.append(
                f"{where}: {selector!r} stays as it is, since lora.rank trains adapters; groups "
                f"may be of {ADAPTERS}, of their names, and of what lora.modules_to_save adds."
            )
        elif not found:
            self.faults.append(f"{where}: {selector!r} matches nothing{_nearest(selector, table)}")
        for parameter in found if selector not in (*_WORDS, ADAPTERS) else ():
            left_out = [n for n in parameter.hf_names() if not fnmatchcase(n, selector)]
            if left_out:
                self.faults.append(
                    f"{where}: {selector!r} leaves out {', '.join(left_out)}, which Megatron keeps "
                    "in one parameter with what it matches; choose them together."
                )
                break
        return found

    def _span(
        self, where: str, group: ParamGroupConfig, parameters: Iterable[Parameter]
    ) -> tuple[int, int]:
        """First row and row behind the last."""
        if group.rows == "all":
            return 0, END
        wrong = [p.hf_names()[0] for p in parameters if not p.vocabulary]
        first = group.rows_from if group.rows_from is not None else self.first_new
        size = self.architecture.vocab_size
        if wrong:
            self.faults.append(
                f"{where}.rows: {group.rows}, but the rows of {wrong[0]} are not those of tokens; "
                "only embeddings and output have them."
            )
        if first is None:
            self.faults.append(
                f"{where}.rows: {group.rows}, but there is no {FILE_NAME} beside the model; "
                "extend its vocabulary with tools/extend_vocab.py, or set rows_from to the id of "
                "the first new token."
            )
        elif first >= size:
            source = "rows_from" if group.rows_from is not None else f"rows: {FILE_NAME} names"
            self.faults.append(
                f"{where}.{source}: {first}; the model's vocabulary has {size} rows, so the first "
                f"new one is at most {size - 1}."
            )
        boundary = first or 0
        return (boundary, END) if group.rows == "new" else (0, boundary)

    def _overlaps(self, groups: Sequence[tuple[str, Mapping[Key, Span]]]) -> None:
        for index, (name, rows) in enumerate(groups):
            for other, others in groups[:index]:
                common = [
                    key
                    for key in rows.keys() & others.keys()
                    if rows[key][0] < others[key][1] and others[key][0] < rows[key][1]
                ]
                if common:
                    names = sorted(_spelling(key) for key in common)
                    self.faults.append(
                        f"optim.param_groups[{name}].parameters: overlaps {other!r} in "
                        f"{len(names)} parameter(s), e.g. {names[0]}; a parameter belongs to one "
                        "group. Rows of embeddings are parted by rows=old and rows=new."
                    )

    def _vectors(self, groups: Sequence[Group], table: Sequence[Parameter]) -> None:
        """Refuse a weight decay of what has none."""
        matrices = {(p.layer, p.key) for p in table if p.columns is not None}
        for group in groups:
            if group.weight_decay is not None and not matrices & group.rows.keys():
                self.faults.append(
                    f"optim.param_groups[{group.name}].weight_decay: {group.weight_decay} has no "
                    "effect: norms and biases have no weight decay. Remove it."
                )

    def _idle(self, groups: Sequence[Group]) -> None:
        """Refuse steps that would train nothing."""
        ends = {1, *(g.trained_until + 1 for g in groups if g.trained_until is not None)}
        for step in sorted(ends):
            if not any(group.trains(step) for group in groups):
                self.faults.append(
                    f"optim.param_groups: step {step} would train nothing, since every parameter "
                    "is frozen then; change frozen_until_step or trained_until_step."
                )
                return


def _trained(architecture: Architecture, lora: LoraConfig | None) -> tuple[Parameter, ...]:
    """What can be in a group: the model's parameters, or those trained beside frozen weights."""
    table = parameter_table(architecture)
    if lora is None:
        return table
    saved, scores = lora.modules_to_save, architecture.head == "score"
    whole = {_EMBEDDINGS: "embed_tokens" in saved, _OUTPUT: "lm_head" in saved or scores}
    adapters = []
    for entry in adapter_entries(architecture, lora):
        name = f"{module_name(entry.layer, entry.target)}.{entry.part}"
        rows = Rows(name=f"{name}.weight", start=0, stop=entry.shape[0])
        columns = entry.shape[1] if len(entry.shape) > 1 else None
        adapters.append(
            Parameter(key=entry.key, parts=((rows,),), columns=columns, tp_dim=entry.tp_dim)
        )
    return (*(p for p in table if whole.get(p.key)), *adapters)


def _is(selector: str, parameter: Parameter) -> bool:
    match selector:
        case "embeddings":
            return parameter.key == _EMBEDDINGS
        case "output":
            return parameter.key == _OUTPUT
        case "norms":
            vector = parameter.columns is None and not parameter.key.endswith(".bias")
            return vector and not parameter.key.startswith(_ADAPTERS)
        case "blocks":
            return parameter.layer is not None
        case "adapters":
            return parameter.key.startswith(_ADAPTERS)
    return any(fnmatchcase(name, selector) for name in parameter.hf_names())


def _nearest(selector: str, table: Sequence[Parameter]) -> str:
    names = [*_WORDS, ADAPTERS, *(name for p in table for name in p.hf_names())]
    near = difflib.get_close_matches(selector, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; choose from {', '.join(_WORDS)}."


def _spelling(key: Key) -> str:
    """A parameter's name for messages."""
    layer, name = key
    return name if layer is None else name.replace("layers.", f"layers.{layer}.", 1)


def _left(table: Sequence[Parameter], taken: Sequence[Mapping[Key, Span]]) -> dict[Key, Span]:
    """What no group has taken. A weight is cut at one row, so one range of it is left."""
    left: dict[Key, Span] = {}
    for parameter in table:
        key = (parameter.layer, parameter.key)
        start, stop = 0, END
        for low, high in sorted(rows[key] for rows in taken if key in rows):
            if low <= start:
                start = max(start, high)
            else:
                stop = low
        if start < stop:
            left[key] = (start, stop)
    return left


def _group(settings: ParamGroupConfig, rows: Mapping[Key, Span], optim: OptimConfig) -> Group:
    mult = settings.lr_mult or 1.0
    return Group(
        name=settings.name,
        rows=rows,
        lr_mult=mult if settings.lr is None else settings.lr / optim.lr,
        weight_decay=settings.weight_decay,
        frozen_until=settings.frozen_until_step,
        trained_until=settings.trained_until_step,
    )
