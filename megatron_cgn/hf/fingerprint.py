"""A cheap fingerprint of a model's weights, to know them again.

Adapters are worth nothing beside other weights than those they were trained on, and nothing would
fail: the answers would merely be worse. Of a Hugging Face directory the headers and samples of
every tensor are hashed, which takes milliseconds where reading all of 70 billion weights takes
minutes; training changes every matrix nearly everywhere. A checkpoint has its files' hashes.
"""

import hashlib
from pathlib import Path

from megatron_cgn.hf.checkpoint_layout import CHECKPOINT_FILE, TENSOR_SUFFIX, read_info
from megatron_cgn.hf.safetensors_io import SafetensorsDirectory

_SAMPLES = 9
"""Places of each tensor that are read: evenly spaced, its first and last bytes among them."""
_SAMPLE_BYTES = 512


def weights_fingerprint(path: Path) -> str:
    """Fingerprint of a model's weights.

    That of a Hugging Face directory depends on names, types, shapes and values, not on how they
    are spread over files. A checkpoint with the same weights has another.

    Args:
        path: Hugging Face directory, or a checkpoint of ours.

    Returns:
        Hexadecimal digits.

    Raises:
        ModelError: If a file of the Hugging Face directory is missing or damaged.
        CheckpointError: If the checkpoint is damaged.
    """
    result = hashlib.sha256()
    if (path / CHECKPOINT_FILE).is_file():
        digests = read_info(path).digests
        for name in sorted(n for n in digests if n.endswith(TENSOR_SUFFIX)):
            result.update(f"{name} {digests[name]}\n".encode())
        return result.hexdigest()
    for name, place in sorted(SafetensorsDirectory(path).places.items()):
        result.update(f"{name} {place.dtype} {place.shape}\n".encode())
        with place.file.open("rb") as file:
            last = max(place.num_bytes - _SAMPLE_BYTES, 0)
            for offset in sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
                file.seek(place.offset + offset)
                result.update(file.read(min(_SAMPLE_BYTES, place.num_bytes - offset)))
    return result.hexdigest()
