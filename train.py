"""Train a model: the one entry point of every stage.

    torchrun --nproc-per-node 2 train.py +stage=cpt|sft|rm|dpo model.hf_path=… 'data.sources=[…]' …
    python train.py +stage=cpt …                       # one process
    python train.py --cfg job --resolve +stage=cpt …   # print the configuration and stop

Settings and their meaning: megatron_cgn/config/schema.py. Exit code 0 when done, 2 on a user's
fault, 75 when stopped by a signal after saving.
"""

import argparse
import logging
import sys

from megatron_cgn.quiet import quiet_dependencies

EXAMPLE = """example:
  torchrun --nproc-per-node 2 train.py +stage=cpt \\
    model.hf_path=.cache/smollm2-135m-instruct parallel.pipeline_model_parallel_size=2 \\
    'data.sources=[{name: domain, path: data/domain, weight: 0.8},
                   {name: general, path: data/general, weight: 0.2}]' \\
    data.seq_length=512 data.validation_fraction=0.1 train.epochs=1 output_dir=runs/first
  python train.py +stage=sft +lora=default model.hf_path=runs/first/export \\
    'data.sources=[{name: domain, path: data/answers.jsonl}]' \\
    data.seq_length=512 data.validation_fraction=0.1 train.epochs=3 output_dir=runs/tuned
  python train.py +stage=dpo +lora=dpo model.hf_path=runs/tuned/export \\
    'data.sources=[{name: domain, path: data/preferences.jsonl}]' \\
    data.seq_length=1024 data.validation_fraction=0.1 train.epochs=1 output_dir=runs/aligned
"""


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run the chosen stage.

    Args:
        argv: Arguments; None for the process's own.

    Returns:
        The exit code.
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    quiet_dependencies()
    from megatron_cgn.errors import ConfigError, StoppedBySignal, UserError
    from megatron_cgn.parallel.report import tell_once
    from megatron_cgn.parallel.state import shutdown_parallel

    try:
        if args.resolve and not args.cfg:
            raise ConfigError("--resolve: has no effect without --cfg job.")
        if args.cfg:
            return _show(args.overrides)
        _run(args.overrides)
    except UserError as error:
        tell_once(f"error: {error}")
        return error.exit_code
    except StoppedBySignal as stop:
        tell_once(str(stop))
        shutdown_parallel()
        return stop.exit_code
    return 0


def _run(overrides: list[str]) -> None:
    from megatron_cgn.config.load import load_config
    from megatron_cgn.config.validate import validate
    from megatron_cgn.stages import find_stage

    run = load_config(overrides)
    stage = find_stage(run.stage)
    from megatron_cgn.parallel.state import read_world_size, shutdown_parallel

    validate(run, world_size=read_world_size())
    stage(run)
    shutdown_parallel()


def _show(overrides: list[str]) -> int:
    from megatron_cgn.config.load import dump_config, load_config

    sys.stdout.write(dump_config(load_config(overrides)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a model on Megatron-Core.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="*", help="what to change, e.g. +stage=cpt optim.lr=1e-5"
    )
    parser.add_argument(
        "--cfg", choices=["job"], help="print the configuration instead of training"
    )
    parser.add_argument(
        "--resolve", action="store_true", help="for --cfg; values are resolved with or without it"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
