"""What every result says of where it was measured, and the model it was measured on."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.families import hf_shapes
from megatron_cgn.hf.safetensors_io import (
    INDEX_FILE,
    ShardWriter,
    index_json,
    plan_shards,
    row_blocks,
)

RESULTS = Path(__file__).parent / "results"

# Llama 3 8B with fewer layers.
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_LAYER_PARAMETERS = 218_112_000
_EMBEDDING_PARAMETERS = 2 * 128256 * 4096


def write_llama(directory: Path, *, gigabytes: float, max_shard_bytes: int = 2 * 10**9) -> int:
    """Write a synthetic BF16 Llama with the shapes of Llama 3 8B and as many layers as fit.

    Args:
        directory: Hugging Face directory to create.
        gigabytes: Wanted size, in 10^9 bytes; at least that of two layers.
        max_shard_bytes: Largest safetensors file.

    Returns:
        The weights' bytes.
    """
    layers = (gigabytes * 1e9 / 2 - _EMBEDDING_PARAMETERS) / _LAYER_PARAMETERS
    config = _LLAMA | {"num_hidden_layers": max(2, round(layers))}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    shapes = hf_shapes(read_architecture(directory))
    plans = plan_shards(
        [{name: (torch.bfloat16, shape) for name, shape in shapes.items()}],
        max_shard_bytes=max_shard_bytes,
    )
    (directory / INDEX_FILE).write_text(index_json(plans))
    # Random, so that no file system compresses it; repeated, because drawing it takes longer
    # than writing it.
    noise = torch.randint(-(2**15), 2**15, (2**26,), dtype=torch.int16).view(torch.bfloat16)
    for plan in plans:
        writer = ShardWriter(directory, plan)
        for name in plan.offsets:
            num_rows, *tail = shapes[name]
            row_bytes = 2 * (tail[0] if tail else 1)
            for block in row_blocks(num_rows, row_bytes, block_bytes=noise.nbytes):
                count = (block.stop - block.start) * row_bytes // 2
                writer.write(name, noise[:count], start_byte=block.start * row_bytes)
        writer.close()
    return sum(plan.num_bytes for plan in plans)


def drop_page_cache(directory: Path) -> None:
    """Ask the kernel to forget a directory's file contents, so that they are read anew."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def memory_kib() -> dict[str, int]:
    """This process's memory: VmHWM (peak), VmRSS and its parts RssAnon and RssFile, in KiB."""
    fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    wanted = ("VmHWM:", "VmRSS:", "RssAnon:", "RssFile:")
    return {f[0].rstrip(":"): int(f[1]) for f in fields if f and f[0] in wanted}


def environment(packages: Sequence[str] = ("torch", "safetensors", "megatron-core")) -> list[str]:
    """Lines of Markdown that say what the figures were measured on."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line),
        platform.machine(),
    )
    memory = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if "MemTotal" in line)
    commit = _run("git", "rev-parse", "--short", "HEAD")
    dirty = " with changes" if _run("git", "status", "--porcelain", "--", "megatron_cgn") else ""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return [
        f"- Hardware: {cpu}, {os.cpu_count()} cores, {memory / 2**20:.0f} GiB memory",
        f"- System: Linux {platform.release()}, Python {platform.python_version()}, {versions}",
        f"- Commit: {commit}{dirty}",
    ]


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent, check=False)
    return done.stdout.strip()
