"""Proofs that a model with a larger vocabulary has lost nothing.

Two kinds. Bytes: everything that the old model stores is stored in the new one. That holds for a
model of any size and needs no arithmetic. Running both: on old ids the hidden states of every
layer are the same bit for bit, and the logits of old ids equal up to the order of FP32 sums, for
the output layer's matrix product has another shape. That is done where the model fits memory; for
a larger one it follows from the bytes, and the proof says so.
"""

import gc
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_cgn.hf.checkpoint_layout import CHECKPOINT_FILE, DIST_DIRECTORY
from megatron_cgn.hf.config import read_config_json
from megatron_cgn.hf.safetensors_io import SafetensorsDirectory, row_blocks
from megatron_cgn.hf.to_hf import convert_to_hf
from megatron_cgn.hf.vocabulary import find_matrices
from megatron_cgn.vocabulary.proof import Proof, judge
from megatron_cgn.vocabulary.proof_checkpoint import prove_checkpoint_bytes
from tokenizer.extension import Extension
from tokenizer.wrapper import Tokenizer

RUN_BYTES = 4 << 30
"""Models whose weights take no more than this in FP32 are run, memory permitting."""
_BLOCK_BYTES = 64 << 20
_SEQUENCES, _LENGTH = 4, 64


def prove_model(
    old: Path,
    new: Path,
    extension: Extension,
    *,
    texts: Sequence[str],
    run_bytes: int = RUN_BYTES,
) -> list[Proof]:
    """Hold a model with a larger vocabulary against the one it was made from.

    Args:
        old: Hugging Face directory, or a checkpoint of ours.
        new: What was made of it, of the same kind.
        extension: The new vocabulary.
        texts: What to run both models on; the old tokenizer encodes it.
        run_bytes: Models are run whose FP32 weights take no more than this, nor than half of the
            memory that is available. None is loaded twice at once.

    Returns:
        The proofs, some of which may have failed.
    """
    run_bytes = min(run_bytes, psutil.virtual_memory().available // 2)
    if not (old / CHECKPOINT_FILE).exists():
        return [
            *_prove_bytes(old, new, extension),
            *_prove_runs(old, new, extension, texts, run_bytes),
        ]
    proofs = prove_checkpoint_bytes(old, new, extension)
    size = sum(file.stat().st_size for file in (old / DIST_DIRECTORY).glob("*.distcp"))
    if size > run_bytes:
        return [*proofs, _too_large(size, run_bytes)]
    with tempfile.TemporaryDirectory(prefix=f".{new.name}.proof-", dir=new.parent) as directory:
        exports = Path(directory) / "old", Path(directory) / "new"
        for checkpoint, export in zip((old, new), exports, strict=True):
            convert_to_hf(checkpoint, export)
        return [*proofs, *_prove_runs(*exports, extension, texts, run_bytes)]


def _prove_bytes(old: Path, new: Path, extension: Extension) -> Iterator[Proof]:
    """Compare every stored byte; then see what the rows beyond are."""
    ours, theirs = SafetensorsDirectory(new), SafetensorsDirectory(old)
    matrices, tied = find_matrices(theirs, read_config_json(old))
    _, still_tied = find_matrices(ours, read_config_json(new))
    first, last = extension.old_vocab_size, extension.new_vocab_size
    wrong = [name for name in matrices if not _same_rows(ours, theirs, name, first)]
    yield judge(
        "old rows",
        wrong,
        good=f"rows 0 to {first - 1:,} of {' and '.join(matrices)} are the same bit for bit",
        bad="rows differ in",
    )
    names = {*ours.places, *theirs.places} - matrices.keys()
    wrong = [name for name in sorted(names) if not _same_tensor(ours, theirs, name)]
    yield judge(
        "other tensors",
        wrong,
        good=f"{len(names):,} tensors have the same type, shape and bytes",
        bad="differ",
    )
    wrong = [name for name in matrices if not _all_finite(ours, name, slice(first, last))]
    wrong += [] if tied == still_tied else ["tie_word_embeddings"]
    yield judge(
        "new rows",
        wrong,
        good=f"rows {first:,} to {last - 1:,} are finite; "
        + ("the output layer is still the embedding" if tied else "the output layer has its own"),
        bad="not finite, or no longer tied",
    )


def _same_rows(a: SafetensorsDirectory, b: SafetensorsDirectory, name: str, stop: int) -> bool:
    """Whether the first rows of a tensor are the same bytes in both."""
    one, other = a.places[name], b.places[name]
    if one.dtype != other.dtype or one.shape[1:] != other.shape[1:]:
        return False
    row_bytes = other.num_bytes // max(1, other.shape[0])
    for rows in row_blocks(stop, row_bytes, block_bytes=_BLOCK_BYTES):
        same = torch.equal(_bits(a.view(name, rows)), _bits(b.view(name, rows)))
        a.drop(name, rows)
        b.drop(name, rows)
        if not same:
            return False
    return True


def _same_tensor(a: SafetensorsDirectory, b: SafetensorsDirectory, name: str) -> bool:
    if name not in a.places or name not in b.places or a.places[name].shape != b.places[name].shape:
        return False
    shape = a.places[name].shape
    return _same_rows(a, b, name, shape[0]) if shape else True


def _all_finite(weights: SafetensorsDirectory, name: str, rows: slice) -> bool:
    return bool(weights.view(name, rows).isfinite().all())


def _bits(tensor: Tensor) -> Tensor:
    """NaN differs from itself, and -0 equals 0; bytes tell."""
    return tensor.reshape(-1).view(torch.uint8)


def _prove_runs(
    old: Path, new: Path, extension: Extension, texts: Sequence[str], run_bytes: int
) -> Iterator[Proof]:
    """Open both in `transformers`, and run them if they are small enough."""
    yield _opens(new)
    size = 4 * sum(
        place.num_bytes // place.dtype.itemsize
        for place in SafetensorsDirectory(new).places.values()
    )
    if size > run_bytes:
        yield _too_large(size, run_bytes)
        return
    ids = _old_ids(old, texts)
    if ids is None:
        yield Proof(name="hidden states", ok=True, text="not run: there is no text to run on")
        return
    yield from _compare(_run(old, ids), _run(new, ids), count=extension.old_vocab_size)


def _opens(directory: Path) -> Proof:
    """Build the model that `transformers` would, without memory, and compare names and shapes."""
    import transformers

    maker: Any = transformers.AutoModelForCausalLM
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            model = maker.from_config(config)
    except (ValueError, OSError, KeyError) as error:
        return Proof(name="transformers", ok=False, text=f"does not open {directory}: {error}")
    places = SafetensorsDirectory(directory).places
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shared = set(getattr(model, "_tied_weights_keys", None) or ())
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    wrong = [
        name
        for name, shape in wanted.items()
        if (name in places and places[name].shape != shape)
        or (name not in places and not (tied and name in shared))
    ]
    return judge(
        "transformers",
        wrong,
        good=f"{type(model).__name__} takes all {len(wanted):,} tensors in their shapes",
        bad="tensors are missing or of another shape for it",
    )


def _too_large(size: int, run_bytes: int) -> Proof:
    return Proof(
        name="hidden states",
        ok=True,
        text=f"not run: {size / 2**30:.1f} GiB, where {run_bytes / 2**30:.1f} may be taken. They "
        "follow from the bytes: all weights that old ids meet are the same",
    )


def _old_ids(old: Path, texts: Sequence[str]) -> Tensor | None:
    """Sequences of old ids ``[n, length]`` from the beginnings of texts."""
    tokenizer = Tokenizer.from_pretrained(old)
    encoded = [tokenizer.encode(text[: 16 * _LENGTH])[:_LENGTH] for text in texts[:64]]
    longest = sorted((ids for ids in encoded if ids), key=len)[-_SEQUENCES:]
    if not longest:
        return None
    length = len(longest[0])
    return torch.tensor([list(ids[:length]) for ids in longest])


def _run(directory: Path, ids: Tensor) -> Mapping[str, Any]:
    """Hidden states of every layer and logits, in FP32; and the output layer's matrix."""
    import transformers

    maker: Any = transformers.AutoModelForCausalLM
    model = maker.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        output = model.eval()(ids, output_hidden_states=True, use_cache=False)
    head = model.get_output_embeddings().weight.detach()
    result = {"hidden": output.hidden_states, "logits": output.logits, "head": head}
    del model, output
    gc.collect()
    return result


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], *, count: int) -> Iterator[Proof]:
    hidden = list(zip(old["hidden"], new["hidden"], strict=True))
    wrong = [f"layer {n}" for n, (a, b) in enumerate(hidden) if not torch.equal(_bits(a), _bits(b))]
    sequences, length = old["logits"].shape[:2]
    yield judge(
        "hidden states",
        wrong,
        good=f"the same bit for bit after the embedding and all {len(hidden) - 1} layers, on "
        f"{sequences} × {length} old ids",
        bad="differ after",
    )
    before = old["logits"][..., :count]
    difference = (new["logits"][..., :count] - before).abs()
    last = old["hidden"][-1]
    # Two sums of h products in any order differ by no more (Higham 2002, section 3.1).
    unit = torch.finfo(torch.float32).eps / 2
    bound = 2 * last.shape[-1] * unit * (last.abs() @ old["head"][:count].abs().T)
    wrong = [f"id {i}" for i in (difference > bound).any(dim=0).any(dim=0).nonzero()[:, 0].tolist()]
    yield judge(
        "old logits",
        wrong,
        good=f"all {count:,} differ by {float(difference.max()):.2g} at most, where they reach "
        f"{float(before.abs().max()):.3g} and FP32 sums in another order may differ by "
        f"{float(bound.max()):.2g}",
        bad="differ by more than FP32 sums in another order can",
    )
