"""What of a model decides the log-probabilities of its reference, in words that can be compared."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_cgn.config.schema import LoraConfig, RunConfig
from megatron_cgn.errors import ModelError
from megatron_cgn.hf.adapter_config import WEIGHTS_FILE
from megatron_cgn.hf.fingerprint import weights_fingerprint
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.lora import scaling

_HARMLESS = ("max_position_embeddings", "initializer_range")
"""Fields of an architecture that decide no score."""


def model_facts(run: RunConfig, architecture: Architecture) -> dict[str, Any]:
    """All of a run's first weights that decides scores; reads files.

    Args:
        run: The configuration.
        architecture: The model.

    Returns:
        JSON. Weights of a Hugging Face directory are known again wherever they lie.

    Raises:
        UserError: If weights or adapters cannot be read.
    """
    config = {n: v for n, v in asdict(architecture).items() if n not in _HARMLESS}
    text = json.dumps(config, sort_keys=True)
    return {
        "weights": _weights(run),
        "model": hashlib.blake2b(text.encode(), digest_size=12).hexdigest(),
        "adapter": _adapter(run.lora),
        "precision": run.precision,
    }


def model_about(run: RunConfig) -> dict[str, str]:
    """Where the model was, for whoever reads the cache."""
    named = {"model": run.model.hf_path, "adapter": run.lora.adapter_path}
    return {name: path for name, path in named.items() if path is not None}


def _weights(run: RunConfig) -> str:
    if run.model.init == "random":
        return f"random weights of seed {run.seed}"
    assert run.model.hf_path is not None
    return weights_fingerprint(Path(run.model.hf_path))


def _adapter(lora: LoraConfig) -> dict[str, Any] | None:
    """What the adapters to start from add; None where they add nothing."""
    if lora.adapter_path is None:
        return None
    path = Path(lora.adapter_path) / WEIGHTS_FILE
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    except OSError as error:
        raise ModelError(
            f"lora.adapter_path: {path} cannot be read ({error.strerror or error}). Check the path "
            "and its permissions."
        ) from error
    return {
        "weights": digest,
        "scaling": scaling(lora),
        "use_dora": lora.use_dora,
        "targets": sorted(lora.targets),
    }
