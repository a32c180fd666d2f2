"""When unreadable input stops a run."""

from megatron_cgn.corpus.records import BAD
from megatron_cgn.corpus.tally import Tally
from megatron_cgn.errors import DataError

_SHOWN = 3
# A share is judged early only when this many are bad: a few at the start say nothing.
_EARLY = 1000
_EARLY_SHARE = 0.5


def check_bad(tally: Tally, *, limit: float, final: bool) -> None:
    """Stop a run whose input is bad.

    Args:
        tally: Counts so far, in the order of the input.
        limit: ``read.max_bad``: a share if below 1, else a number.
        final: Whether all of the input is counted. Before that, a share is judged only where most
            of what was read is bad.

    Raises:
        DataError: With the first examples.
    """
    bad = int(tally.get("bad", 0))
    total = sum(tally.get("documents", {}).values())
    if limit >= 1:
        too_many = bad > limit
    elif final:
        too_many = bad > limit * total
    else:
        too_many = bad >= _EARLY and bad > max(limit, _EARLY_SHARE) * total
    if not too_many:
        return
    shown = [
        example["evidence"]
        for reason, examples in sorted(tally["examples"].items())
        if reason in BAD
        for example in examples
    ]
    allowed = f"{limit:.0f}" if limit >= 1 else f"{limit:.2%}"
    raise DataError(
        f"{bad:,} of {total:,} lines and files cannot be read, more than the {allowed} that "
        "--max-bad-lines allows. "
        + " | ".join(shown[:_SHOWN])
        + ". Mend the input, or run the same command with a larger --max-bad-lines, which goes on "
        "from here."
    )
