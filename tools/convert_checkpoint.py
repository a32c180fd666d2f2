"""Convert between Hugging Face directories and Megatron checkpoints, without a GPU.

python tools/convert_checkpoint.py to-megatron --input models/llama-3.1-8b --output ckpt/llama
python tools/convert_checkpoint.py to-hf --input runs/cpt/checkpoints/step_0000100 --output out
"""

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_cgn.errors import UserError
from megatron_cgn.hf import to_hf, to_megatron

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> int:
    """Convert, as the command line says.

    Returns:
        0, or 2 after a fault that the user can mend.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    args = _parse()
    source, target = Path(args.input), Path(args.output)
    try:
        if target.resolve() in (source.resolve(), *source.resolve().parents):
            raise UserError(f"{target}: would replace the --input; give another --output")
        if target.exists() and not args.overwrite:
            raise UserError(f"{target}: exists already; give another --output, or --overwrite")
        if args.direction == "to-megatron":
            _to_megatron(source, target, args.make_vocab_size_divisible_by)
        else:
            _to_hf(source, target, _DTYPES.get(args.dtype), int(args.max_shard_gb * 10**9))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {target}")
    return 0


def _to_megatron(source: Path, target: Path, divisible_by: int) -> None:
    total = to_megatron.converted_bytes(source, make_vocab_size_divisible_by=divisible_by)
    with _bar(total) as bar:
        to_megatron.convert_to_megatron(
            source, target, make_vocab_size_divisible_by=divisible_by, progress=bar
        )


def _to_hf(source: Path, target: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> None:
    with _bar(to_hf.converted_bytes(source, dtype=dtype)) as bar:
        to_hf.convert_to_hf(
            source, target, dtype=dtype, max_shard_bytes=max_shard_bytes, progress=bar
        )


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar in bytes, on a terminal only."""
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        yield bar.update


def _parse() -> argparse.Namespace:
    assert __doc__ is not None
    summary, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary,
        epilog="examples:\n" + "".join(f"  {line}\n" for line in examples.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("direction", choices=["to-megatron", "to-hf"])
    parser.add_argument("--input", required=True, metavar="DIR", help="what to convert")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=_positive_int,
        default=128,
        metavar="N",
        help="to-megatron: pad the stored embedding to a multiple of N rows (default 128)",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", *_DTYPES],
        default="auto",
        help="to-hf: type of the weights (default: as stored)",
    )
    parser.add_argument(
        "--max-shard-gb",
        type=_positive_float,
        default=5.0,
        metavar="GB",
        help="to-hf: largest safetensors file (default 5)",
    )
    return parser.parse_args()


def _positive_int(text: str) -> int:
    if int(text) <= 0:
        raise argparse.ArgumentTypeError("must be positive")
    return int(text)


def _positive_float(text: str) -> float:
    if float(text) <= 0:
        raise argparse.ArgumentTypeError("must be positive")
    return float(text)


if __name__ == "__main__":
    sys.exit(main())
