"""Let a model answer: one prompt, a file of them, or a conversation on the terminal.

python tools/generate.py --model models/qwen3-8b-nuclear --prompt "压水堆的一回路由哪些设备组成？"
python tools/generate.py --model runs/sft/checkpoints/latest --input q.jsonl --output a.jsonl
python tools/generate.py --model models/qwen3-8b --adapter runs/sft/adapter --chat
torchrun --nproc-per-node 4 tools/generate.py --tensor-parallel 4 --model models/llama-3-70b …
"""

import argparse
import io
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from megatron_cgn.quiet import quiet_dependencies

quiet_dependencies()

import torch  # noqa: E402

from megatron_cgn.command_line import positive_int  # noqa: E402
from megatron_cgn.config.schema import ParallelConfig  # noqa: E402
from megatron_cgn.engine.engine import Engine  # noqa: E402
from megatron_cgn.errors import ConfigError, UserError  # noqa: E402
from megatron_cgn.parallel.report import tell_once  # noqa: E402
from megatron_cgn.parallel.state import (  # noqa: E402
    check_world_size,
    initialize_parallel,
    read_world_size,
    shutdown_parallel,
)
from megatron_cgn.rollout.open import (  # noqa: E402
    check_is_language_model,
    check_layout,
    find_model,
    open_engine,
)
from megatron_cgn.rollout.prompts import Prompts  # noqa: E402
from megatron_cgn.rollout.sampling import Sampling  # noqa: E402
from megatron_cgn.rollout.tasks import ChatTask, FileTask, Job, PromptTask  # noqa: E402

_TIMEOUT_MINUTES = 7 * 24 * 60.0
"""Ranks wait for one another as long as the user of a conversation may be away."""


def main() -> int:
    """Answer, as the command line says.

    Returns:
        0, or 2 after a fault that the user can mend, or 130 if interrupted.
    """
    args = _parse()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, _terminate)
    _be_lenient_with_bytes()
    try:
        _check_arguments(args)
        _run(args)
    except UserError as error:
        tell_once(f"error: {error}")
        return error.exit_code
    except (KeyboardInterrupt, _Terminated):
        kept = f"; what {args.output} has stays, the same command goes on" if args.output else ""
        tell_once(f"error: interrupted{kept}")
        return 130
    shutdown_parallel()
    return 0


class _Terminated(BaseException):
    """SIGTERM. Unlike an interrupt it ends a conversation, not only the answer being given."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _be_lenient_with_bytes() -> None:
    """Let no byte typed, or character that a terminal lacks, end a conversation."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _run(args: argparse.Namespace) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=args.tensor_parallel,
        pipeline_model_parallel_size=args.pipeline_parallel,
        timeout_minutes=_TIMEOUT_MINUTES,
    )
    check_world_size(parallel, read_world_size())
    files = find_model(args.model, adapter=args.adapter)
    check_is_language_model(files)
    check_layout(files, parallel)
    prompts = Prompts.open(files, template=args.template, raw=args.raw)
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop_ids=prompts.stop_ids,
        seed=args.seed,
    )
    job = Job(
        files=files,
        prompts=prompts,
        sampling=sampling,
        precision=args.precision,
        system=args.system,
        num_samples=args.num_samples,
        batch_size=args.batch_size,
    )
    task = _task(args, job)
    state = initialize_parallel(parallel)
    task(open_engine(files, state, precision=args.precision))


def _task(args: argparse.Namespace, job: Job) -> Callable[[Engine], None]:
    if args.chat:
        return ChatTask(job)
    if args.prompt:
        return PromptTask(job, args.prompt)
    return FileTask(
        job, questions=Path(args.input), output=Path(args.output), overwrite=args.overwrite
    )


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be, or would have no effect.

    Raises:
        ConfigError: Naming the arguments.
    """
    for wrong, message in (
        (
            bool(args.prompt) + bool(args.input) + args.chat != 1,
            "give one of --prompt, --input, --chat",
        ),
        (bool(args.input) != bool(args.output), "--input and --output: give both, or neither"),
        (
            args.input
            and args.output
            and Path(args.output).resolve() == Path(args.input).resolve(),
            f"--output: {args.output} is the --input itself, which would be lost; give another",
        ),
        (args.raw and args.chat, "--raw: a conversation needs a template; leave --raw out"),
        (args.raw and args.template, "--template: has no effect with --raw"),
        (args.raw and args.system is not None, "--system: has no effect with --raw"),
        (args.overwrite and not args.output, "--overwrite: has no effect without --output"),
        (args.chat and args.num_samples > 1, "--num-samples: has no effect in --chat"),
        (args.chat and args.batch_size is not None, "--batch-size: has no effect in --chat"),
        (
            args.temperature == 0.0 and args.num_samples > 1,
            "--num-samples: all would be the same at temperature 0; give a --temperature",
        ),
    ):
        if wrong:
            raise ConfigError(f"{message}.")


def _parse() -> argparse.Namespace:
    assert __doc__ is not None
    summary, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary,
        epilog="examples:\n" + "".join(f"  {line}\n" for line in examples.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face directory or checkpoint")
    add("--adapter", metavar="DIR", help="adapter of peft or of ours to put on it")
    add("--prompt", action="append", metavar="TEXT", help="what to answer; may be repeated")
    add("--input", metavar="F.jsonl", help="records to answer: prompt, instruction, messages, …")
    add("--output", metavar="F.jsonl", help="where answers go; the same command goes on with it")
    add("--overwrite", action="store_true", help="begin --output anew")
    add("--chat", action="store_true", help="talk on the terminal")
    add("--system", metavar="TEXT", help="what the system says first")
    add("--template", metavar="NAME", help="bundled chat template or Jinja file (the model's own)")
    add("--raw", action="store_true", help="continue texts as they are, without a chat template")
    add(
        "--max-new-tokens", type=positive_int, default=512, metavar="N", help="longest answer (512)"
    )
    add("--temperature", type=float, default=0.0, metavar="X", help="0, the default, is greedy")
    add("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens only (all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="… from those of probability P (1)")
    add("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    add("--num-samples", type=positive_int, default=1, metavar="K", help="answers a prompt (1)")
    add("--batch-size", type=positive_int, metavar="N", help="answers at once (what memory holds)")
    add("--tensor-parallel", type=positive_int, default=1, metavar="N", help="ranks a matrix (1)")
    add("--pipeline-parallel", type=positive_int, default=1, metavar="N", help="stages (1)")
    default = "bf16" if torch.cuda.is_available() else "fp32"
    add("--precision", choices=["bf16", "fp16", "fp32"], default=default, help=f"({default} here)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
