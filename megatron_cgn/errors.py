"""Every exception this package raises on purpose.

::

    MegatronCGNError
    ├── UserError                 exit code 2: one message, no traceback
    │   ├── ConfigError           a setting, or a combination of settings, is wrong
    │   ├── DataError             a corpus, index or tokenizer file is wrong
    │   ├── ModelError            a Hugging Face directory is wrong or not supported
    │   └── CheckpointError       a checkpoint is missing, damaged or does not fit
    └── StoppedBySignal           exit code 75: stopped after saving, may be requeued

A programmer's fault is an ``assert``, never one of these.
"""


class MegatronCGNError(Exception):
    """Base of every exception raised on purpose."""


class UserError(MegatronCGNError):
    """Something the user can mend. Ends the program with exit code 2 and one message."""

    exit_code = 2


class ConfigError(UserError):
    """A setting, or a combination of settings, is wrong."""


class DataError(UserError):
    """A corpus, an index or a tokenizer file is wrong."""


class ModelError(UserError):
    """A Hugging Face model directory is wrong, incomplete or not supported."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or does not fit the configuration."""


class StoppedBySignal(MegatronCGNError):
    """Training stopped at a step boundary on a signal, after saving a checkpoint."""

    exit_code = 75
