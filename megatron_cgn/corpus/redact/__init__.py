"""Personal and confidential data (脱敏): found by shape, checksum and label, and replaced.

``redactor.py`` is the step; ``view.py`` the text as detectors see it; ``identity.py``,
``contact.py`` and ``names.py`` the detectors; ``patterns.py`` the user's own; ``replace.py`` what
stands in the place of a finding. What it finds and what it misses is measured in
``docs/redaction.md``.
"""

from megatron_cgn.corpus.redact.redactor import Finding, Redactor, mask

__all__ = ["Finding", "Redactor", "mask"]
