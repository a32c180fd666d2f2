"""Runs train.py many times without importing PyTorch many times.

Reads requests from standard input, one JSON object a line, and answers each with one:

    {"argv": […], "env": {…}, "stderr": PATH, "limit_bytes": N | null} → {"pid": N}
    {"poll": PID} → {"code": N | null}; minus the signal's number if a signal ended it

Every run is a forked process with the modules imported but nothing built, in a session of its
own. What follows the fork is train.py's own `main`. If the environment names a `RECORD_IDS` file,
the ids of the records that each training sequence holds are written there when it is read; and with
`SIGNAL_AT=SEQUENCE:SIGNAL` a run sends itself that signal when it has read that sequence.
"""

import hashlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def _serve() -> None:
    sys.path.insert(0, str(ROOT))
    from megatron_cgn.quiet import quiet_dependencies

    quiet_dependencies()
    import megatron_cgn.engine.metrics
    import megatron_cgn.stages.cpt
    import megatron_cgn.stages.dpo
    import megatron_cgn.stages.rm
    import megatron_cgn.stages.sft  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            answer = {"code": _poll(request["poll"])}
        else:
            pid = os.fork()
            if not pid:
                _train(request)
            answer = {"pid": pid}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _poll(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _record_ids(path: str) -> None:
    """Let training sequences write down what is read of them: number, ids, tokens' hash."""
    from megatron_cgn.data.preference_loader import PreferenceLoader
    from megatron_cgn.data.sft_loader import SftLoader

    sequence, number = map(int, os.environ.get("SIGNAL_AT", "-1:0").split(":"))

    class Recorded:
        def __init__(self, dataset: Any) -> None:
            self._dataset = dataset

        def __len__(self) -> int:
            return len(self._dataset)

        def __getitem__(self, index: int) -> Any:
            row = self._dataset[index]
            tokens = hashlib.blake2b(row.tokens.tobytes(), digest_size=8).hexdigest()
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps([index, self._dataset.record_ids(index), tokens]) + "\n")
            if index == sequence:
                os.kill(os.getpid(), number)
            return row

    def record(loader: Any) -> None:
        opened = loader.__init__

        def recording(self: Any, dataset: Any, **settings: Any) -> None:
            opened(self, Recorded(dataset), **settings)

        loader.__init__ = recording

    for loader in (SftLoader, PreferenceLoader):
        record(loader)


def _train(request: dict[str, Any]) -> None:
    """Become a run of train.py; never returns."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    errors = os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for target, source in ((0, nothing), (1, nothing), (2, errors)):
        os.dup2(source, target)
    os.environ.update(request["env"])
    if request["limit_bytes"] is not None:
        # Without the signal, a write beyond the limit fails as on a full disk, with another errno.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = request["limit_bytes"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    import torch

    torch.set_num_threads(1)
    if "RECORD_IDS" in os.environ:
        _record_ids(os.environ["RECORD_IDS"])
    code = 1
    try:
        import train

        code = train.main(request["argv"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    # As the interpreter ends: threads and child processes are waited for, files are flushed.
    import atexit
    import threading

    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
