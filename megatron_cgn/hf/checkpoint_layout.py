"""What lies where in a checkpoint directory of ours, as far as conversion knows it.

::

    <checkpoint>/checkpoint.json     what it is: format, step, vocabulary, type
    <checkpoint>/hf/                 config.json, tokenizer, generation settings
    <checkpoint>/dist/               Megatron-Core's ``torch_dist`` format
"""

from pathlib import Path

from megatron_cgn.hf.files import write_json

FORMAT = 1
"""Version of ``checkpoint.json``; readers refuse a later one."""
CHECKPOINT_FILE = "checkpoint.json"
HF_DIRECTORY = "hf"
DIST_DIRECTORY = "dist"


def write_checkpoint_json(
    directory: Path,
    *,
    vocab_size: int,
    padded_vocab_size: int,
    dtype: str,
    step: int = 0,
    consumed_sequences: int = 0,
    has_optimizer: bool = False,
) -> None:
    """Write what a checkpoint is, when everything else of it is written.

    Args:
        directory: The checkpoint.
        vocab_size: Rows of the embedding that are tokens.
        padded_vocab_size: Rows of the embedding as stored.
        dtype: Type of most weights, e.g. ``bfloat16``.
        step: Optimizer steps done.
        consumed_sequences: Training sequences consumed.
        has_optimizer: Whether optimizer state is stored.
    """
    fields = {
        "format": FORMAT,
        "step": step,
        "consumed_sequences": consumed_sequences,
        "has_optimizer": has_optimizer,
        "vocab_size": vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "dtype": dtype,
        "files": {
            str(file.relative_to(directory)): file.stat().st_size
            for file in sorted(directory.rglob("*"))
            if file.is_file()
        },
    }
    write_json(directory / CHECKPOINT_FILE, fields)
