"""The one table of tensors: Hugging Face names and layouts against Megatron-Core's.

Loading, export and the streaming conversion are all derived from `parameter_table`. Each
Megatron parameter is a list of *parts*; each part is a list of row ranges of Hugging Face
tensors and is split evenly over the tensor-parallel ranks. So

- a column-parallel matrix has one part of one range, split by rows;
- the fused query/key/value matrix has one part of ``3 × groups`` ranges ``[q…q k v]``;
- the fused gate/up matrix has two parts, so that every rank holds a half of each;
- a row-parallel matrix is split by columns; norms are not split.

Names are those of Megatron's *checkpoints*, which are Transformer Engine's module names.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_cgn.model.architecture import Architecture

LAYER_PREFIX = "decoder.layers."
HEAD_KEY = "output_layer.weight"
"""Key of whatever stands at the end: the rows of the vocabulary, or a scalar head's one row."""
SCORE_NAME = "score.weight"
"""A scalar head in Hugging Face's sequence classifiers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Consecutive rows of one Hugging Face tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one rank's parameter and one Hugging Face tensor have in common.

    Attributes:
        name: Hugging Face tensor.
        rows: Rows of the Hugging Face tensor.
        columns: Columns of the Hugging Face tensor, or None for all (or if it is a vector).
        local_rows: Rows of the rank's parameter that hold them.
    """

    name: str
    rows: slice
    columns: slice | None
    local_rows: slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One Megatron parameter and what it is made of.

    Attributes:
        key: Name in Megatron's checkpoints, with ``{layer}`` left out: ``decoder.layers.mlp…``.
        layer: Global index of the layer, or None outside the layers.
        parts: Row ranges; every part is split over the tensor-parallel ranks by itself.
        columns: Width of the matrix, or None for a vector.
        tp_dim: Dimension split over the tensor-parallel ranks; None if replicated.
        vocabulary: Whether rows are vocabulary entries, padded with zeros at the end.
    """

    key: str
    layer: int | None = None
    parts: tuple[tuple[Rows, ...], ...]
    columns: int | None
    tp_dim: int | None
    vocabulary: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of the whole tensor, without padding."""
        return sum(rows.stop - rows.start for part in self.parts for rows in part)

    def hf_names(self) -> tuple[str, ...]:
        """The Hugging Face tensors this parameter is made of, in order."""
        return tuple(dict.fromkeys(rows.name for part in self.parts for rows in part))

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Those tensors and their shapes, in order."""
        num_rows = dict.fromkeys(self.hf_names(), 0)
        for part in self.parts:
            for rows in part:
                num_rows[rows.name] = max(num_rows[rows.name], rows.stop)
        tail = () if self.columns is None else (self.columns,)
        return {name: (count, *tail) for name, count in num_rows.items()}

    def local_shape(self, *, tp_size: int, padded_vocab_size: int) -> tuple[int, ...]:
        """Shape of one tensor-parallel rank's share."""
        num_rows = padded_vocab_size if self.vocabulary else self.num_rows
        num_rows = num_rows // tp_size if self.tp_dim == 0 else num_rows
        if self.columns is None:
            return (num_rows,)
        return (num_rows, self.columns // tp_size if self.tp_dim == 1 else self.columns)

    def pieces(
        self, *, tp_rank: int = 0, tp_size: int = 1, padded_vocab_size: int
    ) -> Iterator[Piece]:
        """What one rank's share is made of; rows that no piece covers are zero padding.

        Args:
            tp_rank: Rank in the tensor-parallel group.
            tp_size: Size of that group.
            padded_vocab_size: Vocabulary rows of the whole padded embedding.

        Yields:
            Pieces in the order of the rank's rows.
        """
        columns = None
        if self.tp_dim == 1 and self.columns is not None and tp_size > 1:
            width = self.columns // tp_size
            columns = slice(tp_rank * width, (tp_rank + 1) * width)
        local_start = 0
        for part in self.parts:
            part_rows = sum(rows.stop - rows.start for rows in part)
            part_rows = padded_vocab_size if self.vocabulary else part_rows
            share = part_rows // tp_size if self.tp_dim == 0 else part_rows
            first = tp_rank * share if self.tp_dim == 0 else 0
            position = 0
            for rows in part:
                low = max(position, first)
                high = min(position + rows.stop - rows.start, first + share)
                if low < high:
                    yield Piece(
                        name=rows.name,
                        rows=slice(rows.start + low - position, rows.start + high - position),
                        columns=columns,
                        local_rows=slice(local_start + low - first, local_start + high - first),
                    )
                position += rows.stop - rows.start
            local_start += share


def parameter_table(architecture: Architecture) -> tuple[Parameter, ...]:
    """Every parameter of a model, in Hugging Face order: embedding, layers, norm, head.

    Args:
        architecture: The model.

    Returns:
        The whole model's parameters. A tied output layer is not one of them.
    """
    a = architecture
    vocabulary = dict(columns=a.hidden_size, tp_dim=0, vocabulary=True)
    table = [
        Parameter(
            key="embedding.word_embeddings.weight",
            parts=_whole("model.embed_tokens.weight", a.vocab_size),
            **vocabulary,  # type: ignore[arg-type]
        )
    ]
    for layer in range(a.num_layers):
        table += _layer(a, layer)
    table.append(_norm("decoder.final_layernorm.weight", "model.norm.weight", a.hidden_size))
    if a.head == "score":
        table.append(
            Parameter(
                key=HEAD_KEY,
                parts=_whole(SCORE_NAME, 1),
                columns=a.hidden_size,
                tp_dim=None,
            )
        )
    elif not a.ties_output:
        table.append(
            Parameter(
                key=HEAD_KEY,
                parts=_whole("lm_head.weight", a.vocab_size),
                **vocabulary,  # type: ignore[arg-type]
            )
        )
    return tuple(table)


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of a model and its shape, in Hugging Face order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in parameter_table(architecture):
        shapes |= parameter.hf_shapes()
    return shapes


def module_spelling(name: str) -> str:
    """Bring a module parameter's name to the spelling of Megatron's checkpoints.

    Layers without Transformer Engine hold their norms as modules of their own; checkpoints
    name them as Transformer Engine's fused modules do.

    Args:
        name: Name within one layer or outside the layers, e.g. ``input_layernorm.weight``.

    Returns:
        The name used in `Parameter.key`, without the layer prefix.
    """
    return {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }.get(name, name)


def _whole(name: str, num_rows: int) -> tuple[tuple[Rows, ...], ...]:
    return ((Rows(name=name, start=0, stop=num_rows),),)


def _norm(key: str, name: str, width: int) -> Parameter:
    return Parameter(key=key, parts=_whole(name, width), columns=None, tp_dim=None)


def _layer(a: Architecture, layer: int) -> list[Parameter]:
    """The parameters of one decoder layer."""
    hf = f"model.layers.{layer}."
    attention, mlp = f"{LAYER_PREFIX}self_attention.", f"{LAYER_PREFIX}mlp."
    query_width = a.num_attention_heads * a.head_dim
    result = [
        _norm(
            f"{attention}linear_qkv.layer_norm_weight", f"{hf}input_layernorm.weight", a.hidden_size
        ),
        Parameter(
            key=f"{attention}linear_qkv.weight",
            parts=_query_key_value(a, f"{hf}self_attn.", "weight"),
            columns=a.hidden_size,
            tp_dim=0,
        ),
    ]
    if a.qkv_bias:
        bias = _query_key_value(a, f"{hf}self_attn.", "bias")
        result.append(
            Parameter(key=f"{attention}linear_qkv.bias", parts=bias, columns=None, tp_dim=0)
        )
    if a.qk_norm:
        for kind in "qk":
            names = f"{attention}{kind}_layernorm.weight", f"{hf}self_attn.{kind}_norm.weight"
            result.append(_norm(*names, a.head_dim))
    result += [
        Parameter(
            key=f"{attention}linear_proj.weight",
            parts=_whole(f"{hf}self_attn.o_proj.weight", a.hidden_size),
            columns=query_width,
            tp_dim=1,
        ),
        _norm(
            f"{mlp}linear_fc1.layer_norm_weight",
            f"{hf}post_attention_layernorm.weight",
            a.hidden_size,
        ),
        Parameter(
            key=f"{mlp}linear_fc1.weight",
            parts=_whole(f"{hf}mlp.gate_proj.weight", a.ffn_hidden_size)
            + _whole(f"{hf}mlp.up_proj.weight", a.ffn_hidden_size),
            columns=a.hidden_size,
            tp_dim=0,
        ),
        Parameter(
            key=f"{mlp}linear_fc2.weight",
            parts=_whole(f"{hf}mlp.down_proj.weight", a.hidden_size),
            columns=a.ffn_hidden_size,
            tp_dim=1,
        ),
    ]
    return [dataclasses.replace(parameter, layer=layer) for parameter in result]


def _query_key_value(a: Architecture, hf: str, kind: str) -> tuple[tuple[Rows, ...], ...]:
    """Rows of the fused projection: per key/value head its query heads, the key, the value."""
    queries = a.num_attention_heads // a.num_key_value_heads * a.head_dim
    rows = []
    for group in range(a.num_key_value_heads):
        for name, size in (("q", queries), ("k", a.head_dim), ("v", a.head_dim)):
            full = f"{hf}{name}_proj.{kind}"
            rows.append(Rows(name=full, start=group * size, stop=(group + 1) * size))
    return (tuple(rows),)
