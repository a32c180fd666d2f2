"""A decoder that ends in one number for each token: the model of rewards and values.

Megatron's own makes an output layer over the vocabulary in its constructor. It is made so small
here that it costs nothing, or not at all, and replaced by a `ScalarHead`.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

_HEAD = "output_layer.weight"


class ScalarHead(nn.Module):
    """One number for each token: ``w · h`` of its last hidden state.

    Called as Megatron calls its output layer. Every tensor-parallel rank has all of ``w``, which is
    as small as a norm's weight, so that no rank waits for another's part of a product; under
    sequence parallelism each multiplies its own tokens and only their values are gathered.

    Args:
        config: The model's configuration.
        tp_group: Tensor-parallel group.
    """

    def __init__(self, *, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup):
        super().__init__()
        self.tp_group = tp_group
        self.sequence_parallel = bool(config.sequence_parallel)
        device = torch.cuda.current_device()
        weight = torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=device)
        self.weight = nn.Parameter(weight)
        # Counted once in the norm of all gradients.
        set_tensor_model_parallel_attributes(self.weight, False, -1, 1)
        # Each rank then sees its own tokens, so Megatron must sum this gradient over ranks.
        self.weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self,
        hidden_states: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, None]:
        """Value every token. Collective over tp under sequence parallelism.

        Args:
            hidden_states: ``[s, b, h]``, equal on all ranks of tp; ``[s / tp, b, h]`` under
                sequence parallelism.
            weight: Megatron's place for a tied weight; this one never is.
            runtime_gather_output: Megatron's place for what does not arise here: values are whole.

        Returns:
            Values float32 ``[s, b]``, equal on all ranks of tp, and Megatron's place for a bias.
        """
        assert weight is None
        # Rewards of two answers differ by little: BF16 would round what is learned from.
        values = F.linear(hidden_states.float(), self.weight.float()).squeeze(-1)
        if self.sequence_parallel:
            # All ranks go on alike from here, so a rank's own part of the gradient is all of it.
            values = gather_from_sequence_parallel_region(
                values, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return values, None


class ScoreModel(GPTModel):
    """A ``GPTModel`` that, called without labels, returns a value for each token.

    Its output is float32 ``[b, s]``. The embedding stands alone even in families whose language
    models tie the output layer to it: there is nothing to tie it to, and no gradient of it to add
    up over pipeline stages.

    Args:
        config: From `transformer_config`.
        vocab_size: Rows of the embedding, with padding.
        pre_process: Whether this chunk has the embedding.
        post_process: Whether this chunk has the head.
        pg_collection: Process groups; ``tp`` is used here.
        **others: What else ``GPTModel`` takes.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        vocab_size: int,
        pre_process: bool,
        post_process: bool,
        pg_collection: ProcessGroupCollection,
        **others: Any,
    ) -> None:
        # A chunk with both ends is told that they share their rows, and then makes none for the
        # output; one with the end alone is told of a vocabulary of one row a rank.
        has_both = pre_process and post_process
        super().__init__(
            config=config,
            vocab_size=vocab_size if pre_process else pg_collection.tp.size(),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            **(others | {"share_embeddings_and_output_weights": has_both}),
        )
        self.share_embeddings_and_output_weights = False
        self.vocab_size = vocab_size
        if has_both:
            # Megatron's mark of a weight with two uses.
            del self.embedding.word_embeddings.weight.zero_out_wgrad
        if post_process:
            self.output_layer = ScalarHead(config=config, tp_group=pg_collection.tp)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Describe the weights for Megatron's checkpoints; see ``GPTModel``."""
        result: ShardedStateDict = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.post_process:
            # Megatron lets a vocabulary differ in its padding. Here it would take the first row of
            # a language model's output layer for the head.
            result[f"{prefix}{_HEAD}"].allow_shape_mismatch = False
        return result
