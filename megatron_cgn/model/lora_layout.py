"""Which adapters a model has, what shape each is, and where it belongs in Megatron's layers.

An adapter belongs to one matrix of the Hugging Face model, whatever Megatron fuses. Column-parallel
layers (query, key, value; gate, up) have ``A`` on every tensor-parallel rank and ``B`` split by
rows; row-parallel ones (``o_proj``, ``down_proj``) have ``A`` split by columns and ``B`` on every
rank. So each rank computes with what it has, and only activations of the adapter's rank are sent.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_cgn.config.schema import LoraConfig
from megatron_cgn.model.architecture import Architecture

Part = Literal["lora_A", "lora_B", "lora_magnitude_vector"]
"""The matrices of an adapter, and the vector that DoRA adds, under the names of `peft`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterEntry:
    """One trained tensor of an adapter.

    Attributes:
        layer: Global index of the layer, from 0.
        target: The matrix it adapts: ``q_proj`` … ``down_proj``.
        part: Which of its tensors.
        shape: Shape of the whole tensor.
        tp_dim: Dimension split evenly over the tensor-parallel ranks; None if all have it whole.
    """

    layer: int
    target: str
    part: Part
    shape: tuple[int, ...]
    tp_dim: int | None

    @property
    def key(self) -> str:
        """Name in checkpoints."""
        return f"adapters.layers.{self.layer}.{self.target}.{self.part}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """One Megatron linear layer, and the matrices that it is made of.

    Attributes:
        path: The layer's module within a transformer layer.
        targets: The matrices, in the order of the fused rows.
        rows: Rows of each matrix in one group of the fused layer, over all ranks.
        groups: How often this order repeats over all ranks: once per key/value head in
            ``linear_qkv``, else once.
        columns: Width of the layer's input, over all ranks.
        parallel: Whether tensor parallelism splits its rows (``column``) or columns (``row``).
    """

    path: str
    targets: tuple[str, ...]
    rows: tuple[int, ...]
    groups: int
    columns: int
    parallel: Literal["column", "row"]

    @property
    def name(self) -> str:
        """Last part of the module's path, e.g. ``linear_qkv``."""
        return self.path.rpartition(".")[2]

    def entries(self, layer: int, lora: LoraConfig) -> Iterator[AdapterEntry]:
        """The trained tensors of this linear layer's adapters.

        Args:
            layer: Global index of the transformer layer.
            lora: Which matrices are adapted, and with what rank.

        Yields:
            ``lora_A``, ``lora_B`` and, with DoRA, the magnitudes of each adapted matrix.
        """
        assert lora.rank is not None
        column = self.parallel == "column"
        for target, rows in zip(self.targets, self.rows, strict=True):
            if target not in lora.targets:
                continue
            out = rows * self.groups
            shapes: list[tuple[Part, tuple[int, ...], int | None]] = [
                ("lora_A", (lora.rank, self.columns), None if column else 1),
                ("lora_B", (out, lora.rank), 0 if column else None),
            ]
            if lora.use_dora:
                shapes.append(("lora_magnitude_vector", (out,), 0 if column else None))
            for part, shape, tp_dim in shapes:
                yield AdapterEntry(
                    layer=layer, target=target, part=part, shape=shape, tp_dim=tp_dim
                )


def fusions(architecture: Architecture) -> tuple[Fusion, ...]:
    """The linear layers of a transformer layer that can have adapters.

    Args:
        architecture: The model.

    Returns:
        ``linear_qkv``, ``linear_proj``, ``linear_fc1``, ``linear_fc2``.
    """
    a = architecture
    queries = a.num_attention_heads * a.head_dim
    return (
        Fusion(
            path="self_attention.linear_qkv",
            targets=("q_proj", "k_proj", "v_proj"),
            rows=(queries // a.num_key_value_heads, a.head_dim, a.head_dim),
            groups=a.num_key_value_heads,
            columns=a.hidden_size,
            parallel="column",
        ),
        Fusion(
            path="self_attention.linear_proj",
            targets=("o_proj",),
            rows=(a.hidden_size,),
            groups=1,
            columns=queries,
            parallel="row",
        ),
        Fusion(
            path="mlp.linear_fc1",
            targets=("gate_proj", "up_proj"),
            rows=(a.ffn_hidden_size, a.ffn_hidden_size),
            groups=1,
            columns=a.hidden_size,
            parallel="column",
        ),
        Fusion(
            path="mlp.linear_fc2",
            targets=("down_proj",),
            rows=(a.hidden_size,),
            groups=1,
            columns=a.ffn_hidden_size,
            parallel="row",
        ),
    )


def adapter_entries(architecture: Architecture, lora: LoraConfig) -> Iterator[AdapterEntry]:
    """Every trained tensor of a model's adapters, over all ranks, in order of layers.

    Args:
        architecture: The model.
        lora: Settings with a rank.

    Yields:
        The tensors; none of ``lora.modules_to_save``, which are the model's own.
    """
    for layer in range(architecture.num_layers):
        for fusion in fusions(architecture):
            yield from fusion.entries(layer, lora)


def scaling(lora: LoraConfig) -> float:
    """What an adapter's product ``B A`` is multiplied by.

    ``alpha / rank``, or with rsLoRA ``alpha / sqrt(rank)``; ``alpha`` is twice the rank if None.
    """
    assert lora.rank is not None
    alpha = 2.0 * lora.rank if lora.alpha is None else lora.alpha
    return float(alpha / (lora.rank**0.5 if lora.use_rslora else lora.rank))
