"""The original tokenizer, in a process of its own: slow to open, and asked little.

It says what the index says of its tokenizer, what the ids of samples are, and those of documents
that only it can encode.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from megatron_cgn.data.encode import Encoded, complete
from megatron_cgn.data.facts import Facts
from megatron_cgn.data.pool import Pool
from tokenizer.fast import compare
from tokenizer.wrapper import Tokenizer

Question = Callable[[Tokenizer], Any]


class _Answers:
    """What the process does."""

    def __init__(self, open_tokenizer: Callable[[], Tokenizer]) -> None:
        self._tokenizer = open_tokenizer()

    def __call__(self, question: Question) -> Any:
        return question(self._tokenizer)


class Original:
    """Asks the original tokenizer, mostly without waiting for the answers.

    Use as a context manager.
    """

    def __init__(
        self, open_tokenizer: Callable[[], Tokenizer], *, append_eod: bool, apart: bool
    ) -> None:
        """Settle what to open; nothing is opened yet.

        Args:
            open_tokenizer: Opens the tokenizer.
            append_eod: Whether documents are to be ended.
            apart: Open it in a process of its own.
        """
        self._pool: Pool[Question, Any] = Pool(
            partial(_Answers, open_tokenizer),
            processes=int(apart),
            start="fork",
            describe=lambda question: "the tokenizer",
        )
        self._append_eod = append_eod
        self._facts: Facts | None = None
        self._fingerprint: str | None = None

    def __enter__(self) -> Self:
        """Begin to open the tokenizer."""
        self._pool.__enter__()
        self._pool.give(partial(_facts, append_eod=self._append_eod))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process."""
        self._pool.__exit__(kind, error, trace)

    def facts(self) -> Facts:
        """Say what the index says of its tokenizer.

        Raises:
            DataError: If the tokenizer is missing or damaged, or nothing ends documents.
        """
        while self._facts is None:
            self._take()
        return self._facts

    def definition(self) -> dict[str, Any]:
        """Give the content of ``tokenizer.json``, as the tokenizer would write it."""
        self._pool.give(Tokenizer.definition)
        definition: dict[str, Any] = self._last()
        return definition

    def begin_fingerprint(self) -> None:
        """Have the fingerprint made, which takes a while."""
        self._pool.give(Tokenizer.fingerprint)

    def check(self, samples: tuple[list[str], list[list[int]]]) -> None:
        """Hold ids of samples against the original's.

        Raises:
            NotEqual: If some differ, of these samples or, more likely, of earlier ones.
        """
        self._pool.give(partial(_compare, samples=samples))
        while self._pool.ready:
            self._take()

    def completed(self, encoded: Encoded, facts: Facts) -> Encoded:
        """Put in the ids of the documents that were left to the original.

        Raises:
            NotEqual: If earlier samples differ.
        """
        assert encoded.left is not None, "nothing is left"
        self._pool.give(partial(_encode, texts=encoded.left[1]))
        return complete(encoded, self._last(), facts)

    def fingerprint(self) -> str:
        """Wait for all answers; the tokenizer's fingerprint, which was begun.

        Raises:
            NotEqual: If some samples differ.
        """
        self._last()
        assert self._fingerprint is not None
        return self._fingerprint

    def _last(self) -> Any:
        answer: Any = None
        while self._pool.pending:
            answer = self._take()
        return answer

    def _take(self) -> Any:
        answer = self._pool.take()
        if isinstance(answer, Facts):
            self._facts = answer
        if isinstance(answer, str):
            self._fingerprint = answer
        return answer


def _facts(tokenizer: Tokenizer, *, append_eod: bool) -> Facts:
    return Facts(
        name=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id if append_eod else None,
    )


def _compare(tokenizer: Tokenizer, *, samples: tuple[list[str], list[list[int]]]) -> None:
    compare(tokenizer, *samples)


def _encode(tokenizer: Tokenizer, *, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer.encode_batch(texts)
