"""A decoder that ends in a `ScalarHead`: the model of rewards and values.

Megatron's own makes an output layer over the vocabulary in its constructor. It is made so small
here that it costs nothing, or not at all, and replaced.
"""

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cgn.model.heads import ScalarHead

_HEAD = "output_layer.weight"


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
