"""Convert between Hugging Face directories, adapters and checkpoints, without a GPU.

python tools/convert_checkpoint.py to-megatron --input models/llama-3.1-8b --output ckpt/llama
python tools/convert_checkpoint.py to-hf --input runs/cpt/checkpoints/step_0000100 --output out
python tools/convert_checkpoint.py to-hf --input runs/sft/checkpoints/latest --output out --merge
python tools/convert_checkpoint.py merge-adapter --model DIR --adapter DIR --output out
"""

import argparse
import contextlib
import logging
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm

from megatron_cgn.errors import UserError
from megatron_cgn.hf import adapter_to_hf, merge, to_hf, to_megatron

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
    target = Path(args.output)
    is_merge = args.direction == "merge-adapter"
    options = ("model", "adapter") if is_merge else ("input",)
    sources = {f"--{option}": Path(getattr(args, option)) for option in options}
    try:
        _check_target(sources, target, overwrite=args.overwrite)
        if is_merge:
            _merge(sources["--model"], sources["--adapter"], target, args)
        elif args.direction == "to-megatron":
            _to_megatron(sources["--input"], target, args.make_vocab_size_divisible_by)
        elif adapter_to_hf.holds_adapters(sources["--input"]):
            _adapters_to_hf(sources["--input"], target, args)
        else:
            _to_hf(sources["--input"], target, args)
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


def _check_target(sources: Mapping[str, Path], target: Path, *, overwrite: bool) -> None:
    """Refuse to replace anything but what a conversion could have written.

    Raises:
        UserError: Naming the target.
    """
    for option, source in sources.items():
        if target.resolve() in (source.resolve(), *source.resolve().parents):
            raise UserError(f"{target}: would replace the {option}; give another --output")
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target}: exists and is not a directory; give another --output")
    if not overwrite:
        raise UserError(f"{target}: exists already; give another --output, or --overwrite")
    is_checkpoint = (target / "checkpoint.json").exists()
    is_model = any((target / name).exists() for name in ("config.json", "adapter_config.json"))
    is_model = is_model and any(target.glob("*.safetensors"))
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


def _to_hf(source: Path, target: Path, args: argparse.Namespace) -> None:
    if args.merge or args.base:
        raise UserError(
            f"{source}: holds all weights and no adapters; leave out --merge and --base"
        )
    dtype = _DTYPES.get(args.dtype)
    with _bar(to_hf.converted_bytes(source, dtype=dtype)) as bar:
        to_hf.convert_to_hf(
            source, target, dtype=dtype, max_shard_bytes=_shard_bytes(args), progress=bar
        )


def _adapters_to_hf(source: Path, target: Path, args: argparse.Namespace) -> None:
    fields = {"base": args.base, "dtype": _DTYPES.get(args.dtype)}
    with _bar(adapter_to_hf.adapter_bytes(source, merge=args.merge, **fields)) as bar:
        if args.merge:
            adapter_to_hf.merge_checkpoint(
                source, target, max_shard_bytes=_shard_bytes(args), progress=bar, **fields
            )
        else:
            adapter_to_hf.convert_adapter(source, target, progress=bar, **fields)


def _merge(model: Path, adapter: Path, target: Path, args: argparse.Namespace) -> None:
    dtype = _DTYPES.get(args.dtype)
    with _bar(merge.merged_bytes(model, dtype=dtype)) as bar:
        merge.merge_adapter(
            model, adapter, target, dtype=dtype, max_shard_bytes=_shard_bytes(args), progress=bar
        )


def _shard_bytes(args: argparse.Namespace) -> int:
    return int(args.max_shard_gb * 10**9)


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
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    output.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an --output that is a checkpoint, a Hugging Face model or an adapter",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--input", required=True, metavar="DIR", help="what to convert")
    directions = parser.add_subparsers(dest="direction", required=True)
    to_checkpoint = directions.add_parser(
        "to-megatron", parents=[common, output], help="Hugging Face directory to checkpoint"
    )
    to_checkpoint.add_argument(
        "--make-vocab-size-divisible-by",
        type=_positive_int,
        default=128,
        metavar="N",
        help="pad the stored embedding to a multiple of N rows (default 128)",
    )
    to_model = directions.add_parser(
        "to-hf",
        parents=[common, output, _weights_options()],
        help="checkpoint to Hugging Face directory; a checkpoint of adapters to one of peft",
    )
    to_model.add_argument(
        "--merge", action="store_true", help="add a checkpoint's adapters to their base model"
    )
    to_model.add_argument(
        "--base",
        metavar="DIR",
        help="the model that a checkpoint's adapters belong to (default: as it says itself)",
    )
    merged = directions.add_parser(
        "merge-adapter",
        parents=[output, _weights_options()],
        help="Hugging Face directory and adapter directory of peft to one Hugging Face directory",
    )
    merged.add_argument("--model", required=True, metavar="DIR", help="the base model")
    merged.add_argument("--adapter", required=True, metavar="DIR", help="the adapter")
    return parser.parse_args()


def _weights_options() -> argparse.ArgumentParser:
    """Options of what writes weights in Hugging Face's format."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--dtype",
        choices=["auto", *_DTYPES],
        default="auto",
        help="type of the weights (default: as stored)",
    )
    options.add_argument(
        "--max-shard-gb",
        type=_positive_float,
        default=5.0,
        metavar="GB",
        help="largest safetensors file (default 5)",
    )
    return options


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
