"""The steps as the passes call them: each built when first used, and left out when turned off."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cgn.config.corpus import CorpusConfig
from megatron_cgn.corpus.document import Document, Outcome
from megatron_cgn.errors import DataError

if TYPE_CHECKING:
    from megatron_cgn.corpus.clean import Cleaner
    from megatron_cgn.corpus.decontaminate import Decontaminator, EvaluationFile
    from megatron_cgn.corpus.dedup import Signer
    from megatron_cgn.corpus.redact import Redactor


class Steps:
    """All steps of a run, in one process."""

    def __init__(self, settings: CorpusConfig) -> None:
        """Keep the settings.

        Args:
            settings: Of all steps.
        """
        self._settings = settings

    def build(self) -> None:
        """Build every step now, to find at once what is wrong with its files and packages.

        Raises:
            ConfigError: If a package is missing or a setting cannot be followed.
            DataError: If a file of the settings is unusable.
        """
        _ = self._cleaner, self.signer, self.redactor, self._decontaminator

    def check_prior(self) -> None:
        """Check that what earlier corpora kept can be compared with.

        Raises:
            DataError: If it is missing, damaged, or was made in another way.
        """
        if self.signer is None:
            return
        from megatron_cgn.corpus.dedup import load_signatures
        from megatron_cgn.corpus.names import Names

        for path in map(Path, self._settings.deduplicate.prior):
            signatures = load_signatures(path, parameters=self.signer.parameters)
            if len(signatures) != len(Names.load(path)):
                raise DataError(f"{path}: not as many ids as signatures. Make the corpus again.")

    def clean(self, document: Document) -> Outcome:
        """Clean a document, or leave it as it is."""
        return self._cleaner(document) if self._cleaner else Outcome(text=document.text)

    def sign(self, texts: Sequence[str], target: Path) -> None:
        """Write what deduplication needs to know of documents into a directory."""
        if self.signer is None:
            return
        from megatron_cgn.corpus.dedup import save_signatures

        save_signatures(
            target,
            [self.signer.sign(texts)],
            num_documents=len(texts),
            parameters=self.signer.parameters,
        )

    def redact(self, document: Document) -> Outcome:
        """Replace what must not be trained on."""
        return self.redactor(document) if self.redactor else Outcome(text=document.text)

    def decontaminate(self, document: Document) -> Outcome:
        """Drop or cut a document that overlaps the evaluation files."""
        step = self._decontaminator
        return step(document) if step else Outcome(text=document.text)

    @property
    def evaluation_files(self) -> "tuple[EvaluationFile, ...]":
        """What became of each evaluation file; none where nothing is compared with them."""
        return self._decontaminator.files if self._decontaminator else ()

    # The imports are here because each step's packages are its own, and slow to load.

    @cached_property
    def _cleaner(self) -> "Cleaner | None":
        if not self._settings.clean.enabled:
            return None
        from megatron_cgn.corpus.clean import Cleaner

        return Cleaner(self._settings.clean)

    @cached_property
    def signer(self) -> "Signer | None":
        """What signs documents; None if they are not compared."""
        if not self._settings.deduplicate.enabled:
            return None
        from megatron_cgn.corpus.dedup import Signer

        return Signer(self._settings.deduplicate)

    @cached_property
    def redactor(self) -> "Redactor | None":
        """What redacts; None if nothing is."""
        if not self._settings.redact.enabled:
            return None
        from megatron_cgn.corpus.redact import Redactor

        return Redactor(self._settings.redact)

    @cached_property
    def _decontaminator(self) -> "Decontaminator | None":
        if not self._settings.decontaminate.evaluation_files:
            return None
        from megatron_cgn.corpus.decontaminate import Decontaminator

        return Decontaminator(self._settings.decontaminate)
