"""Equal and nearly equal documents: which of them to keep.

::

    texts ──Signer.sign──▶ Signatures (a hash and a MinHash row a document) ──save──▶ part files
    part files, in order of priority ──find_duplicates──▶ Decisions (what each document is)

``tokens.py`` cuts text, ``signature.py`` signs it, ``lsh.py`` finds documents that agree, and
``decide.py`` says which of them go. ``store.py`` keeps signatures for later runs.
"""

from megatron_cgn.corpus.dedup.decide import Decisions, Kind, find_duplicates
from megatron_cgn.corpus.dedup.lsh import Banding, banding
from megatron_cgn.corpus.dedup.signature import Signatures, Signer
from megatron_cgn.corpus.dedup.store import load_signatures, save_signatures

__all__ = [
    "Banding",
    "Decisions",
    "Kind",
    "Signatures",
    "Signer",
    "banding",
    "find_duplicates",
    "load_signatures",
    "save_signatures",
]
