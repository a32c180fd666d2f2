"""What a parser raises; in a file of its own, so that parsers and their chooser can both use it."""


class Unreadable(Exception):
    """A file without a text that can be read. Never leaves ``megatron_cgn.corpus``."""

    def __init__(self, reason: str, evidence: str) -> None:
        """Say what is wrong.

        Args:
            reason: ``undecodable``, ``damaged``, ``encrypted``, ``too_slow`` or ``no_text``.
            evidence: What shows it.
        """
        super().__init__(evidence)
        self.reason = reason
        self.evidence = evidence
