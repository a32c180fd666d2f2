"""Tools for tests: gloo processes, tiny models, named tolerances.

Not imported by the package itself.
"""

import os
import random
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing as mp

if TYPE_CHECKING:
    from megatron_cgn.engine.engine import Engine

FP32_PARALLEL_RTOL = 1e-5
"""Two layouts of one FP32 computation: sums in another order, over at most ten steps."""
HF_LOGITS_ATOL = 1e-4
"""FP32 logits against `transformers`: other kernels, the same equations."""
_PORTS = range(20_000, 32_000)
"""Below those that Linux hands out unless told otherwise, which begin at 32,768."""


def free_port() -> int:
    """A TCP port of the loopback interface that is free now, and likely still is in a while.

    It is not one of those that the system hands out by itself: until the processes that are to
    meet there have started, others, such as those of a test beside this one, open hundreds.
    """
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free TCP port between {_PORTS.start} and {_PORTS.stop - 1}")


def run_distributed(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 300.0,
    warm: bool = False,
) -> list[Any]:
    """Run ``function(*args)`` in `world_size` fresh processes that see each other over gloo.

    The environment is what ``torchrun`` would set; the function itself joins, e.g. through
    `megatron_cgn.parallel.state.initialize_parallel`.

    Args:
        function: A module-level function; its return value must be picklable.
        world_size: Number of processes.
        *args: Passed to every process.
        timeout_s: Processes alive after this many seconds are ended and the call fails.
        warm: Fork the processes from a server that has imported the engine already, which saves
            each of them five seconds. They have the environment that the first warm call had.

    Returns:
        The ranks' return values, in rank order.

    Raises:
        RuntimeError: With the traceback of every rank that failed.
    """
    context: Any = mp.get_context("forkserver" if warm else "spawn")
    if warm:
        context.set_forkserver_preload(["megatron_cgn.engine.engine"])
    results = context.Queue()
    runner, held = context.Pipe(duplex=False)  # closed, at the latest, when this process ends
    port = free_port()
    processes = [
        context.Process(
            target=_child, args=(rank, world_size, port, function, args, results, runner)
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    answers: dict[int, Any] = {}
    failures: dict[int, str] = {}
    try:
        while len(answers) + len(failures) < world_size and not failures:
            rank, ok, value = results.get(timeout=timeout_s)
            (answers if ok else failures)[rank] = value
    finally:
        for process in processes:
            process.join(timeout=5.0 if failures or len(answers) < world_size else timeout_s)
            if process.is_alive():
                process.kill()
                process.join()
        held.close()
    if failures:
        raise RuntimeError("\n".join(f"rank {r}:\n{text}" for r, text in failures.items()))
    return [answers[rank] for rank in range(world_size)]


def _child(
    rank: int,
    world_size: int,
    port: int,
    function: Callable[..., Any],
    args: Sequence[Any],
    results: Any,
    runner: Connection,
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    threading.Thread(target=_die_with_runner, args=(runner,), daemon=True).start()
    try:
        results.put((rank, True, function(*args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def release_engine(engine: "Engine") -> None:
    """Break the cycles that keep an engine alive, for processes that build many.

    Megatron hangs hooks on autograd's nodes, which Python's collector cannot see through. Every
    engine left over keeps the threads of some twenty gloo groups, and a few dozen of them bring a
    machine to a standstill. Leave the process groups afterwards, and collect garbage.

    Args:
        engine: An engine that is not used any more.
    """
    for chunk in engine._wrapped:
        chunk.grad_accs.clear()
    # These lead to the optimizer, whose slices of FP32 parameters hold the same nodes.
    for name in ("grad_scale_func", "no_sync_func", "grad_sync_func", "param_sync_func"):
        setattr(engine.model_config, name, None)


def _die_with_runner(runner: Connection) -> None:
    """End this process when the test runner has ended, however it ended.

    A process forked by a server is not the runner's child, and keeps the server alive.
    """
    try:
        runner.recv()
    except EOFError:
        os.kill(os.getpid(), signal.SIGKILL)


def tiny_hf_model(path: str | Path, family: str = "llama", **overrides: Any) -> Path:
    """Write a random, tiny Hugging Face model of a family.

    Args:
        path: Directory to write ``config.json`` and ``model.safetensors`` into.
        family: ``llama``, ``mistral``, ``qwen2`` or ``qwen3``.
        **overrides: Fields of the Hugging Face configuration.

    Returns:
        The directory.
    """
    import transformers

    fields: dict[str, Any] = dict(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        torch_dtype="float32",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    if family == "qwen3":
        fields["head_dim"] = 32
    if family == "mistral":
        fields["sliding_window"] = None
    fields.update(overrides)
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config = getattr(transformers, f"{names[family]}Config")(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = getattr(transformers, f"{names[family]}ForCausalLM")(config)
        # Larger than the usual 0.02 and no ones or zeros: errors must not hide.
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.08).add_(1.0 if parameter.dim() == 1 else 0.0)
    directory = Path(path)
    model.to(torch.float32).save_pretrained(directory)
    return directory
