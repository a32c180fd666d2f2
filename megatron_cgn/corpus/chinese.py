"""Traditional Chinese made simplified, by OpenCC."""

from collections.abc import Callable
from functools import cache

from megatron_cgn.errors import ConfigError


@cache
def simplifier(*, setting: str) -> Callable[[str], str]:
    """Build the converter, phrase by phrase: 乾燥 becomes 干燥, 乾坤 stays.

    Args:
        setting: Path of the setting that asks for it, for the error message.

    Returns:
        What converts a text.

    Raises:
        ConfigError: If OpenCC is missing.
    """
    try:
        import opencc
    except ImportError as error:
        raise ConfigError(
            f"{setting}: true, but opencc is not installed. Install the extra `corpus` "
            f"(pip install 'megatron-cgn[corpus]') or set {setting}=false."
        ) from error
    convert: Callable[[str], str] = opencc.OpenCC("t2s").convert
    return convert
