"""Low-rank adapters on a built model, beside frozen weights.

The adapters of a chunk are its module ``adapters``; forward hooks on Megatron's linear layers
apply them, so names and checkpoints of the model itself stay what they are. Shapes and places are
`lora_layout.py`'s, the arithmetic `lora_linear.py`'s. Files in the format of `peft` are `hf/`'s.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_cgn.config.schema import LoraConfig
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.lora_layout import AdapterEntry as AdapterEntry
from megatron_cgn.model.lora_layout import adapter_entries as adapter_entries
from megatron_cgn.model.lora_layout import fusions
from megatron_cgn.model.lora_layout import scaling as scaling
from megatron_cgn.model.lora_linear import (
    REPLICATED_RNG,
    SHARDED_RNG,
    LinearAdapter,
    parameter_name,
)

ADAPTERS = "adapters"
"""Name of the module in a chunk; everything below it is the adapters'."""


class Adapters(nn.Module):
    """All adapters of one model chunk, by global layer and Megatron linear layer."""

    def __init__(self, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self._groups = groups
        self.layers = nn.ModuleDict()

    def add(self, layer: int, name: str, adapter: LinearAdapter) -> None:
        """Take in the adapters of a linear layer."""
        if str(layer) not in self.layers:
            self.layers[str(layer)] = nn.ModuleDict()
        of_layer = self.layers[str(layer)]
        assert isinstance(of_layer, nn.ModuleDict)
        of_layer[name] = adapter

    def find(self, layer: int, name: str) -> LinearAdapter | None:
        """The adapters of a linear layer, if it has any."""
        of_layer = self.layers[str(layer)] if str(layer) in self.layers else None
        if not isinstance(of_layer, nn.ModuleDict) or name not in of_layer:
            return None
        found = of_layer[name]
        assert isinstance(found, LinearAdapter)
        return found

    def linears(self) -> Iterator[tuple[str, LinearAdapter]]:
        """Every linear layer's adapters, with their module names, in order of layers."""
        for name, module in self.named_modules():
            if isinstance(module, LinearAdapter):
                yield name, module

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Describe the adapters for Megatron's checkpoints, by names that no layout changes."""
        assert not sharded_offsets
        result: ShardedStateDict = {}
        for name, adapter in self.linears():
            for entry, parameter in adapter.named_entries():
                made = make_sharded_tensors_for_checkpoint(
                    {entry.key: parameter},
                    "",
                    {} if entry.tp_dim is None else {entry.key: entry.tp_dim},
                    tp_group=self._groups.tp,
                    dp_cp_group=self._groups.dp_cp,
                )
                result[f"{prefix}{name}.{parameter_name(entry)}"] = made[entry.key]
        return result


def add_adapters(
    chunks: Sequence[nn.Module],
    *,
    architecture: Architecture,
    lora: LoraConfig,
    groups: ProcessGroupCollection,
    seed: int,
) -> None:
    """Freeze a model and add adapters that change nothing yet.

    Every ``A`` is drawn from the seed and its name, so that adapters begin alike on every layout;
    every ``B`` is zero. Call it once, before the model is wrapped for training. The matrices of
    ``lora.modules_to_save`` stay trainable: of a tied model ``embed_tokens`` is the output layer
    too, and stays so. A scalar head is always trained whole: it is new, or as good as new.

    Args:
        chunks: This rank's ``GPTModel`` chunks, of native layers.
        architecture: The model.
        lora: Settings with a rank.
        groups: Process groups; ``tp``, ``pp`` and ``dp_cp`` are used.
        seed: The run's seed.
    """
    for chunk in chunks:
        config: Any = chunk.config
        for parameter in chunk.parameters():
            parameter.requires_grad_(False)
        adapters = Adapters(groups)
        for layer in chunk.decoder.layers:  # type: ignore[union-attr]
            index = int(layer.layer_number) - 1
            for fusion in fusions(architecture):
                if not set(fusion.targets) & set(lora.targets):
                    continue
                base = layer.get_submodule(fusion.path)
                adapter = LinearAdapter(
                    fusion,
                    layer=index,
                    lora=lora,
                    base=base,
                    tp_group=groups.tp,
                    sequence_parallel=bool(config.sequence_parallel),
                    seed=seed,
                )
                adapters.add(index, fusion.name, adapter)
                base.register_forward_hook(_Add(adapter))
        chunk.adapters = adapters
        for _, parameter in _whole(chunk, architecture, lora):
            parameter.requires_grad_(True)
        if config.recompute_granularity == "full" and chunk.pre_process:
            # Recomputed layers are outside autograd's graph; without an input that needs a
            # gradient nothing would ever ask for those of the adapters inside.
            chunk.embedding.register_forward_hook(_need_gradient)  # type: ignore[union-attr]
    if lora.dropout > 0.0:
        _seed_dropout(groups, seed)


def start_magnitudes(chunks: Sequence[nn.Module]) -> None:
    """Give DoRA's magnitudes their first values. Collective over tp.

    Call it when the weights have been loaded. Magnitudes that have been loaded too stay; without
    DoRA there is nothing to do.

    Args:
        chunks: ``GPTModel`` chunks, possibly wrapped.
    """
    for adapters in _adapters(chunks):
        for _, linear in adapters.linears():
            linear.start_magnitudes()


def adapter_parameters(
    chunks: Sequence[nn.Module],
) -> Iterator[tuple[AdapterEntry, nn.Parameter]]:
    """The adapters of this rank.

    Args:
        chunks: ``GPTModel`` chunks, possibly wrapped; with or without adapters.

    Yields:
        What each tensor is of the whole model, and this rank's share of it, in order of layers.
    """
    for adapters in _adapters(chunks):
        for _, linear in adapters.linears():
            yield from linear.named_entries()


def trained_whole(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of ``lora.modules_to_save`` on this rank, and a scalar head.

    Args:
        chunks: ``GPTModel`` chunks with adapters, possibly wrapped.

    Yields:
        Name within the chunk and parameter; of a tied model whose pipeline has stages, the first
        and the last stage each have a copy, which Megatron keeps alike.
    """
    for chunk in map(_bare, chunks):
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad and not name.startswith(f"{ADAPTERS}."):
                yield name, parameter


@contextlib.contextmanager
def adapters_off(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Run the model without its adapters, bit for bit as if it had none.

    What is trained whole beside them stays trained: ``lora.modules_to_save``, a scalar head.

    Args:
        chunks: ``GPTModel`` chunks, possibly wrapped; with or without adapters.
    """
    linears = [linear for adapters in _adapters(chunks) for _, linear in adapters.linears()]
    before = [linear.enabled for linear in linears]
    for linear in linears:
        linear.enabled = False
    try:
        yield
    finally:
        for linear, enabled in zip(linears, before, strict=True):
            linear.enabled = enabled


def delta_of(chunk: nn.Module, layer: int, linear: str) -> Tensor | None:
    """What the adapters add to a weight, for merging.

    Args:
        chunk: A ``GPTModel`` chunk, possibly wrapped; its weights must be up to date.
        layer: Global index of the layer, from 0.
        linear: ``linear_qkv``, ``linear_proj``, ``linear_fc1`` or ``linear_fc2``.

    Returns:
        FP32, of the shape and layout of this rank's share of the fused weight; None if nothing of
        that weight has an adapter.
    """
    adapters = getattr(_bare(chunk), ADAPTERS, None)
    found = adapters.find(layer, linear) if isinstance(adapters, Adapters) else None
    return None if found is None else found.delta()


class _Add:
    """Forward hook of a linear layer that adds its adapters."""

    def __init__(self, adapter: LinearAdapter) -> None:
        self._adapter = adapter

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any]
    ) -> tuple[Tensor, Any] | None:
        if not self._adapter.enabled:
            return None
        out, bias = output
        return self._adapter(args[0], out), bias


def _need_gradient(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of a frozen embedding."""
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
    return output


def _whole(
    chunk: nn.Module, architecture: Architecture, lora: LoraConfig
) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a chunk that `lora.modules_to_save` means, and a scalar head."""
    tied = architecture.ties_output
    wanted = (
        {"embedding.word_embeddings.weight"} if "embed_tokens" in lora.modules_to_save else {""}
    )
    if architecture.head == "score":
        wanted.add("output_layer.weight")
    elif "lm_head" in lora.modules_to_save or (tied and "embed_tokens" in lora.modules_to_save):
        wanted.add("output_layer.weight")
    for name, parameter in chunk.named_parameters():
        if name in wanted:
            yield name, parameter


def _seed_dropout(groups: ProcessGroupCollection, seed: int) -> None:
    """Add this rank's random states of dropout to Megatron's tracker."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    place = f"{groups.pp.rank()}/{groups.dp_cp.rank()}"
    for name, more in ((REPLICATED_RNG, ""), (SHARDED_RNG, f"/{groups.tp.rank()}")):
        states = tracker.get_states()
        states.pop(name, None)  # of a model built before
        tracker.set_states(states)
        text = f"{seed}/{name}/{place}{more}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        value = int.from_bytes(digest, "little") >> 1
        tracker.seeds_.discard(value)
        tracker.add(name, value)


def _adapters(chunks: Sequence[nn.Module]) -> Iterator[Adapters]:
    for chunk in map(_bare, chunks):
        adapters = getattr(chunk, ADAPTERS, None)
        if isinstance(adapters, Adapters):
            yield adapters


def _bare(chunk: nn.Module) -> nn.Module:
    """The ``GPTModel`` inside wrappers."""
    while not hasattr(chunk, "decoder"):
        inner = chunk.module
        assert isinstance(inner, nn.Module), f"{type(chunk).__name__} is no GPTModel"
        chunk = inner
    return chunk
