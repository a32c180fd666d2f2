"""How long does deciding on millions of documents take, and in how much memory?

python benchmarks/dedup_scale.py --documents 1000000 --directory /scratch

Called by ``dedup.py``, in a process of its own, so that the peak memory is that of the decision
alone. The signatures are synthetic, because only their agreement matters: of N documents 60 % are
unlike any other, 20 % are pairs and small groups at estimated similarities of 0.6 to 1, 10 % are
copies, 5 % are form letters (few forms, nearly equal), and 5 % are records of few forms that differ
in numbers alone.
"""

import argparse
import json
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_cgn.config.corpus import DeduplicateConfig
from megatron_cgn.corpus.dedup import (
    Signatures,
    Signer,
    find_duplicates,
    load_signatures,
    save_signatures,
)

_BLOCK = 100_000
_KINDS = ("unlike", "group", "copy", "letter", "record")
_SHARES = (0.6, 0.2, 0.1, 0.05, 0.05)


def synthetic(num_documents: int, width: int) -> Iterator[Signatures]:
    """Make signatures, a block at a time; groups are within a block, forms across all."""
    common = np.random.default_rng(0)
    letters = common.integers(0, 2**32, size=(5, width), dtype=np.uint32)
    records = common.integers(0, 2**32, size=(5, width), dtype=np.uint32)
    for begin in range(0, num_documents, _BLOCK):
        count = min(_BLOCK, num_documents - begin)
        rng = np.random.default_rng(begin + 1)
        rows = rng.integers(0, 2**32 - 1, size=(count, width), dtype=np.uint32)
        hashes = rng.integers(0, 2**63, size=(count, 4), dtype=np.uint64)
        kind = rng.choice(len(_KINDS), size=count, p=_SHARES)
        plain = np.flatnonzero(kind == 0)
        for wanted, source, low, high in (
            (1, None, 0.6, 1.0),
            (3, letters, 0.9, 1.0),
            (4, records, 0.7, 0.95),
        ):
            chosen = np.flatnonzero(kind == wanted)
            pool = rows[rng.choice(plain, len(chosen))] if source is None else source
            base = pool if source is None else pool[rng.integers(0, len(pool), len(chosen))]
            kept = rng.random((len(chosen), width)) < rng.uniform(low, high, (len(chosen), 1))
            rows[chosen] = np.where(kept, base, rows[chosen])
            if wanted == 4:
                hashes[chosen, 2] = 7
        copies = np.flatnonzero(kind == 2)
        origin = rng.choice(plain, len(copies))
        rows[copies], hashes[copies] = rows[origin], hashes[origin]
        yield Signatures(hashes, rows)


def watch_memory(stop: threading.Event, peak_mib: list[float]) -> None:
    """Watch the process's own memory: without mapped files, whose pages the kernel may drop."""
    while not stop.wait(0.02):
        fields = map(str.split, Path("/proc/self/status").read_text().splitlines())
        peak_mib[0] = max(peak_mib[0], *(int(f[1]) / 1024 for f in fields if f[0] == "RssAnon:"))


def main() -> None:
    """Make signatures, decide, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--directory", type=Path, default=Path("runs/benchmark-dedup"))
    parser.add_argument("--make", action="store_true", help="only make the signatures")
    args = parser.parse_args()
    settings = DeduplicateConfig()
    parameters = Signer(settings).parameters
    if args.make:
        parts = synthetic(args.documents, settings.num_permutations)
        save_signatures(args.directory, parts, num_documents=args.documents, parameters=parameters)
        return
    stop, anonymous_mib = threading.Event(), [0.0]
    watch = threading.Thread(target=watch_memory, args=(stop, anonymous_mib), daemon=True)
    watch.start()
    started = time.perf_counter()
    signatures = load_signatures(args.directory, parameters=parameters)
    decisions = find_duplicates([signatures], settings)
    seconds = time.perf_counter() - started
    stop.set()
    watch.join()
    kinds: npt.NDArray[np.int64] = np.bincount(decisions.kinds, minlength=3)
    print(
        json.dumps(
            {
                "documents": args.documents,
                "bytes": sum(f.stat().st_size for f in args.directory.iterdir()),
                "seconds": seconds,
                "cpu_seconds": time.process_time(),
                "anonymous_mib": anonymous_mib[0],
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "kept": int(kinds[0]),
                "exact": int(kinds[1]),
                "near": int(kinds[2]),
                "crowded": decisions.num_crowded,
            }
        )
    )


if __name__ == "__main__":
    main()
