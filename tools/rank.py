r"""Rank candidate answers with a reward model: preference data for stages dpo and rm.

python tools/generate.py --model runs/sft/export --input q.jsonl --output candidates.jsonl \
    --num-samples 4 --temperature 1.0
python tools/rank.py --model runs/rm/export --input candidates.jsonl --output preferences.jsonl
python tools/rank.py --model runs/rm/checkpoints/latest --keep ranking --min-margin 0.5 …
torchrun --nproc-per-node 4 tools/rank.py --tensor-parallel 2 --model runs/rm/export …
"""

import argparse
import logging
import math
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import get_args

from megatron_cgn.quiet import quiet_dependencies

quiet_dependencies()

import torch  # noqa: E402

from megatron_cgn.command_line import positive_int  # noqa: E402
from megatron_cgn.config.schema import ParallelConfig  # noqa: E402
from megatron_cgn.errors import ConfigError, UserError  # noqa: E402
from megatron_cgn.parallel.report import tell_once  # noqa: E402
from megatron_cgn.parallel.state import (  # noqa: E402
    check_world_size,
    initialize_parallel,
    read_world_size,
    shutdown_parallel,
)
from megatron_cgn.rollout.open import (  # noqa: E402
    check_is_reward_model,
    check_layout,
    find_model,
    open_engine,
)
from megatron_cgn.rollout.rank_task import RankSettings, RankTask  # noqa: E402
from megatron_cgn.rollout.ranking import Keep  # noqa: E402
from tokenizer.chat import ChatTemplate  # noqa: E402


def main() -> int:
    """Rank, as the command line says.

    Returns:
        0, or 2 after a fault that the user can mend, or 130 if interrupted.
    """
    args = _parse()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _run(args)
    except UserError as error:
        tell_once(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        tell_once("error: interrupted; what was scored is kept, the same command goes on")
        return 130
    shutdown_parallel()
    return 0


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(args: argparse.Namespace) -> None:
    if Path(args.output).resolve() == Path(args.input).resolve():
        raise ConfigError(
            f"--output: {args.output} is the --input itself, which would be lost; give another."
        )
    settings = RankSettings(
        keep=args.keep,
        min_margin=args.min_margin,
        keep_cut_off=args.keep_cut_off,
        overwrite=args.overwrite,
    )
    parallel = ParallelConfig(
        tensor_model_parallel_size=args.tensor_parallel,
        pipeline_model_parallel_size=args.pipeline_parallel,
    )
    check_world_size(parallel, read_world_size())
    files = find_model(args.model, adapter=args.adapter)
    check_is_reward_model(files)
    check_layout(files, parallel)
    task = RankTask(
        files,
        ChatTemplate.open(files.tokenizer, template=args.template),
        candidates=Path(args.input),
        output=Path(args.output),
        settings=settings,
    )
    state = initialize_parallel(parallel)
    task(open_engine(files, state, precision=args.precision))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # refused with the others that are no margins


def _parse() -> argparse.Namespace:
    assert __doc__ is not None
    summary, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary,
        epilog="examples:\n" + "".join(f"  {line}\n" for line in examples.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="reward model: Hugging Face or checkpoint")
    add("--adapter", metavar="DIR", help="adapter of a reward model to put on it")
    add("--input", required=True, metavar="F.jsonl", help="candidates: answers, prompt_messages, …")
    add("--output", required=True, metavar="F.jsonl", help="where preferences go")
    add("--overwrite", action="store_true", help="replace --output, and scores of another model")
    add(
        "--keep",
        choices=get_args(Keep),
        default="best-worst",
        help="a prompt's best and worst answer (default); every two, each pair a record of its "
        "own; or one record with the ranks of all",
    )
    add("--min-margin", type=_number, default=0.0, metavar="X", help="least difference (0)")
    add("--keep-cut-off", action="store_true", help="compare answers that did not end, too")
    add("--template", metavar="NAME", help="bundled chat template or Jinja file (the model's own)")
    add("--tensor-parallel", type=positive_int, default=1, metavar="N", help="ranks a matrix (1)")
    add("--pipeline-parallel", type=positive_int, default=1, metavar="N", help="stages (1)")
    default = "bf16" if torch.cuda.is_available() else "fp32"
    add("--precision", choices=["bf16", "fp16", "fp32"], default=default, help=f"({default} here)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
