"""Convert between Hugging Face directories and Megatron checkpoints, without a GPU.

python tools/convert_checkpoint.py to-megatron --input models/llama-3.1-8b --output ckpt/llama
python tools/convert_checkpoint.py to-hf --input runs/cpt/checkpoints/step_0000100 --output out
"""

import argparse
import contextlib
import logging
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm

from megatron_cgn.errors import UserError
from megatron_cgn.hf import to_hf, to_megatron

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_stopped = threading.Event()
"""Set by a signal, so that the threads that write stop too."""


def main() -> int:
    """Convert, as the command line says.

    Returns:
        0, or 2 after a fault that the user can mend, or 130 if interrupted.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    args = _parse()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    source, target = Path(args.input), Path(args.output)
    try:
        _check_target(source, target, overwrite=args.overwrite)
        if args.direction == "to-megatron":
            _to_megatron(source, target, args.make_vocab_size_divisible_by)
        else:
            _to_hf(source, target, _DTYPES.get(args.dtype), int(args.max_shard_gb * 10**9))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"wrote {target}")
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Unwind, so that the unfinished directory is removed; only once, so that it is."""
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    _stopped.set()
    raise KeyboardInterrupt


def _check_target(source: Path, target: Path, *, overwrite: bool) -> None:
    """Refuse to replace anything but what a conversion could have written.

    Raises:
        UserError: Naming the target.
    """
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"{target}: would replace the --input; give another --output")
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target}: exists and is not a directory; give another --output")
    if not overwrite:
        raise UserError(f"{target}: exists already; give another --output, or --overwrite")
    is_checkpoint = (target / "checkpoint.json").exists()
    is_model = (target / "config.json").exists() and any(target.glob("*.safetensors"))
    if not is_checkpoint and not is_model and any(target.iterdir()):
        raise UserError(
            f"{target}: is neither a checkpoint nor a Hugging Face model, and is not empty; "
            "remove it yourself, or give another --output"
        )


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
    """A progress bar in bytes, on a terminal only; it also ends threads after an interrupt."""

    def update(num_bytes: int) -> None:
        if _stopped.is_set():
            raise KeyboardInterrupt
        bar.update(num_bytes)

    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        yield update


def _parse() -> argparse.Namespace:
    assert __doc__ is not None
    summary, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary,
        epilog="examples:\n" + "".join(f"  {line}\n" for line in examples.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--input", required=True, metavar="DIR", help="what to convert")
    common.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    common.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an --output that is a checkpoint or a Hugging Face model",
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    to_checkpoint = directions.add_parser(
        "to-megatron", parents=[common], help="Hugging Face directory to checkpoint"
    )
    to_checkpoint.add_argument(
        "--make-vocab-size-divisible-by",
        type=_positive_int,
        default=128,
        metavar="N",
        help="pad the stored embedding to a multiple of N rows (default 128)",
    )
    to_model = directions.add_parser(
        "to-hf", parents=[common], help="checkpoint to Hugging Face directory"
    )
    to_model.add_argument(
        "--dtype",
        choices=["auto", *_DTYPES],
        default="auto",
        help="type of the weights (default: as stored)",
    )
    to_model.add_argument(
        "--max-shard-gb",
        type=_positive_float,
        default=5.0,
        metavar="GB",
        help="largest safetensors file (default 5)",
    )
    return parser.parse_args()


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a positive integer")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
