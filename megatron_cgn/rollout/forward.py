"""One row through a model laid out over processes: from tokens to the logits of a few places.

Forward only and without Megatron's training schedule, whose messages have one shape for a whole
step. Which rows, and what becomes of the logits, is `generate.py`'s.

Shapes: T tokens of a row, R places whose logits are wanted, V ids of the vocabulary, h hidden
width.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megatron_cgn.engine.engine import Engine
from megatron_cgn.model.attention import NativeAttention
from megatron_cgn.model.packing import Row
from megatron_cgn.parallel import cpu
from megatron_cgn.parallel.state import ParallelState


@contextlib.contextmanager
def answering(chunks: Sequence[GPTModel]) -> Iterator[None]:
    """Make chunks fit to generate, and leave them as they were.

    Modules are in evaluation mode, and attention is the one that knows our cache, whatever the
    layers' own is: neither has parameters.
    """
    modes = [(module, module.training) for chunk in chunks for module in chunk.modules()]
    replaced: list[tuple[Any, nn.Module]] = []
    try:
        for chunk in chunks:
            chunk.eval()
            for layer in chunk.decoder.layers:
                core = layer.self_attention.core_attention
                if not isinstance(core, NativeAttention):
                    replaced.append((layer.self_attention, core))
                    layer.self_attention.core_attention = _native(layer.self_attention).eval()
        yield
    finally:
        for attention, core in replaced:
            attention.core_attention = core
        for module, training in modes:
            module.training = training
        for chunk in chunks:
            chunk.decoder.set_input_tensor(None)


def _native(attention: Any) -> nn.Module:
    """Core attention that can take the place of a layer's."""
    return NativeAttention(
        config=attention.config,
        layer_number=attention.layer_number,
        attn_mask_type=attention.attn_mask_type,
        attention_type="self",
        pg_collection=attention.pg_collection,
    )


class Forward:
    """Runs rows through the chunks of an engine, stage by stage.

    Collective over the ranks that share a copy of the model (tp and pp); ranks of other copies
    may be at other rows.

    Args:
        engine: The model.
    """

    def __init__(self, engine: Engine) -> None:
        self._chunks = engine.chunks
        self._state = engine.state
        self._config = engine.model_config
        self._vocab_size = engine.architecture.vocab_size

    @property
    def multiple(self) -> int:
        """What the length of a row must be a multiple of."""
        return int(self._state.groups.tp.size()) if self._config.sequence_parallel else 1

    def __call__(self, tokens: Sequence[int], row: Row, places: Sequence[int]) -> Tensor | None:
        """Run a row.

        Args:
            tokens: The row's tokens, without its padding.
            row: What the layers are told of it.
            places: The places in the row whose logits are wanted.

        Returns:
            FP32 ``[R, V]`` on the last pipeline stage, equal on its tensor-parallel ranks; None
            on the others.
        """
        length = row.position_ids.size(1)
        ids = torch.tensor([[*tokens, *[0] * (length - len(tokens))]], device=cpu.device())
        wanted = torch.tensor(places, device=cpu.device())
        pp_rank, pp_size = self._state.pp_rank, int(self._state.groups.pp.size())
        output = None
        for index, chunk in enumerate(self._chunks):
            is_first, is_last = pp_rank == 0, pp_rank == pp_size - 1
            if not (is_first and index == 0):
                hidden = output if pp_size == 1 else self._receive(length // self.multiple)
                chunk.set_input_tensor(hidden)
            output = chunk(
                input_ids=ids,
                position_ids=row.position_ids,
                attention_mask=None,
                packed_seq_params=row,
                output_processor=self._logits,
                output_processor_context=wanted,
            )
            if pp_size > 1 and not (is_last and index == len(self._chunks) - 1):
                self._send(output)
        return output if self._state.is_last_stage else None

    def _logits(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: Tensor,
        **rest: Any,
    ) -> Tensor:
        """Megatron's ``output_processor``: the head at the wanted places only."""
        tp = self._state.groups.tp
        if self._config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=tp)
        was_parallel = output_layer.sequence_parallel
        output_layer.sequence_parallel = False  # its input is whole now
        try:
            local, _ = output_layer(hidden_states[context], weight=output_weight)
        finally:
            output_layer.sequence_parallel = was_parallel
        local = local[:, 0].contiguous()  # behind its [R, 1, V / tp]
        if tp.size() > 1:
            parts = local.new_empty((tp.size(), *local.shape))
            dist.all_gather_into_tensor(parts.flatten(0, 1), local, group=tp)
            local = parts.transpose(0, 1).flatten(1)
        logits: Tensor = local[:, : self._vocab_size].float()
        return logits

    def _receive(self, length: int) -> Tensor:
        hidden = torch.empty(
            (length, 1, self._config.hidden_size),
            dtype=self._config.pipeline_dtype,
            device=cpu.device(),
        )
        dist.recv(hidden, src=_neighbour(self._state, -1), group=self._state.groups.pp)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        dist.send(hidden.contiguous(), dst=_neighbour(self._state, 1), group=self._state.groups.pp)


def share_from_source(
    values: Tensor | None, shape: tuple[int, ...], state: ParallelState
) -> Tensor:
    """Hand what the first rank of the last stage has to all ranks of its copy of the model.

    Collective over tp and pp. Ranks that compute alike on a GPU need not get alike numbers, and
    must not disagree on when a sequence ends.

    Args:
        values: FP64 of `shape` on the last stage.
        shape: Of the values.
        state: This process's place in the layout.

    Returns:
        The values on the CPU.
    """
    tp, pp = state.groups.tp, state.groups.pp
    if values is None:
        values = torch.empty(shape, dtype=torch.float64, device=cpu.device())
    if state.is_last_stage and tp.size() > 1:
        dist.broadcast(values, src=dist.get_global_rank(tp, 0), group=tp)
    if pp.size() > 1:
        dist.broadcast(values, src=state.loss_rank, group=pp)
    return values.cpu()


def _neighbour(state: ParallelState, step: int) -> int:
    """Global rank of the stage before or behind, around the end."""
    group = state.groups.pp
    return dist.get_global_rank(group, (state.pp_rank + step) % group.size())
