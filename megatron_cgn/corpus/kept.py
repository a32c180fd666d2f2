"""What a corpus keeps for later runs: signatures and ids of the documents that are in it.

They are in ``signatures/``, in the order of ``documents.parquet`` without the dropped ones.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_cgn.config.corpus import CorpusConfig
from megatron_cgn.corpus import first_pass, second_pass
from megatron_cgn.corpus.names import Names, join_names
from megatron_cgn.corpus.steps import Steps
from megatron_cgn.corpus.work import Work, sync


def write_kept(target: Path, work: Work, *, num_parts: int, settings: CorpusConfig) -> None:
    """Write signatures and ids; nothing if documents are not compared.

    Args:
        target: The directory to make.
        work: The work directory.
        num_parts: How many parts there are.
        settings: Of all steps.
    """
    signer = Steps(settings).signer
    if signer is None:
        return
    from megatron_cgn.corpus.dedup import Signatures, load_signatures, save_signatures

    written = [work.path(second_pass.STAGE, part) for part in range(num_parts)]
    names = [Names.load(folder) for folder in written]

    def signatures() -> Iterator[Signatures]:
        for part, folder in enumerate(written):
            flags = np.load(folder / "kept.npy")
            signed = work.path(first_pass.STAGE, part) / "signatures"
            every = load_signatures(signed, parameters=signer.parameters)
            yield Signatures(every.hashes[flags], every.minhashes[flags])

    target.mkdir()
    join_names(target, names)
    save_signatures(
        target,
        signatures(),
        num_documents=sum(map(len, names)),
        parameters=signer.parameters,
    )
    for file in target.iterdir():
        sync(file)
