"""Conversations as tokens on disk: made once, mapped by every process.

::

    <cache>/chat-<key>/tokens.bin, conversations.npy, turns.npy, ids.txt, facts.json

The key is a hash of all that decides the content: the file, the tokenizer and the template. What
of it is trained on (``data.seq_length``, ``chat.truncation``, ``chat.last_turn_only``, …) is
decided later, in ``sft_selection.py``, so that changing a setting encodes nothing again.

Conversations are whole here, in the order of their file.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.conversations import encode_conversations, read_conversations
from megatron_cgn.data.folders import wait_for_folder
from megatron_cgn.data.indexed import token_dtype
from megatron_cgn.data.store_folder import Progress, Report, build_folder, without_faults
from megatron_cgn.errors import DataError
from tokenizer.chat import ChatTemplate, EncodedChat, Message
from tokenizer.wrapper import Tokenizer

FORMAT = 1
"""Version of the files; caches of another are not read."""
ROW = np.dtype(
    [
        ("token", "<i8"),
        ("tokens", "<i4"),
        ("turn", "<i8"),
        ("turns", "<i4"),
        ("id", "<i8"),
        ("line", "<i8"),
        ("question", "<u8"),
    ]
)
"""Of each conversation: where its tokens, turns and id begin, how many tokens and turns it has,
its line or record in the file, and a hash of what was asked."""

_SEPARATOR = "\x1f"


@dataclass(frozen=True, slots=True, kw_only=True)
class SftStore:
    """The conversations of one file, mapped."""

    folder: Path
    """Where it lies."""
    tokens: npt.NDArray[np.integer[Any]]
    """Ids of all conversations, one after another."""
    rows: npt.NDArray[np.void]
    """See `ROW`."""
    turns: npt.NDArray[np.int32]
    """Where each turn of an assistant begins and ends, its end-of-turn token included, in tokens
    from the conversation's first, int32 ``[turns, 2]``."""
    ids: npt.NDArray[np.uint8]
    """UTF-8 bytes of the records' ids, each with a line feed behind it."""

    unit: ClassVar = "conversations"
    """What it is counted in."""

    def __len__(self) -> int:
        """Number of conversations."""
        return len(self.rows)

    @property
    def key(self) -> str:
        """Stands for the content."""
        return self.folder.name

    def record_id(self, conversation: int) -> str:
        """The id of a record."""
        begin = int(self.rows[conversation]["id"])
        text = bytes(self.ids[begin : begin + 4096])
        return text.partition(b"\n")[0].decode("utf-8", "replace")


def build_store(
    path: str | Path,
    *,
    chat: ChatTemplate,
    tokenizer: Tokenizer,
    cache: Path,
    report: Report | None = None,
) -> Path:
    """Encode a file's conversations, unless that has been done.

    No faulty record is passed over: what is wrong with one is most often wrong with a part of the
    file that somebody counts on. Takes the memory of some hundred conversations.

    Args:
        path: File of conversations.
        chat: Encodes them.
        tokenizer: The model's tokenizer.
        cache: Where stores belong.
        report: Told of the progress.

    Returns:
        The store's folder.

    Raises:
        DataError: If the file cannot be read, has no conversations or faulty ones, of which the
            first are named; or changes meanwhile; or the cache cannot be written.
    """
    return build_folder(
        path,
        "chat",
        lambda folder: _encode(
            path, folder, chat=chat, vocab_size=tokenizer.vocab_size, report=report
        ),
        format=FORMAT,
        chat=chat,
        tokenizer=tokenizer,
        cache=cache,
    )


def open_store(folder: Path) -> SftStore:
    """Map a store.

    Args:
        folder: From `build_store`, perhaps on another node.

    Returns:
        The store.

    Raises:
        DataError: If it does not become visible or is damaged.
    """
    wait_for_folder(folder)
    try:
        facts = json.loads((folder / "facts.json").read_text("utf-8"))
        store = SftStore(
            folder=folder,
            tokens=map_file(folder / "tokens.bin", facts["dtype"]),
            rows=map_file(folder / "conversations.bin", ROW),
            turns=map_file(folder / "turns.bin", "<i4").reshape(-1, 2),
            ids=map_file(folder / "ids.txt", np.uint8),
        )
        sizes = {
            "tokens": len(store.tokens),
            "conversations": len(store),
            "turns": len(store.turns),
        }
        if sizes != {name: facts[name] for name in sizes}:
            raise ValueError("its files have other sizes than when it was written")
        return store
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: cannot read the encoded conversations ({error}). Delete this folder; it is "
            "built again."
        ) from error


class StoreWriter:
    """Appends conversations to the files of a store. Use as a context manager."""

    def __init__(self, folder: Path, *, vocab_size: int) -> None:
        """Open nothing yet.

        Args:
            folder: To fill.
            vocab_size: Decides how wide ids are.
        """
        self._folder = folder
        self._dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._stack = ExitStack()
        self._counts = {"tokens": 0, "turns": 0, "conversations": 0}
        self._id_bytes = 0

    def __enter__(self) -> Self:
        """Open the files."""
        names = ("tokens.bin", "turns.bin", "conversations.bin", "ids.txt")
        self._tokens, self._turns, self._rows, self._ids = (
            self._stack.enter_context((self._folder / name).open("wb")) for name in names
        )
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the files."""
        self._stack.close()

    def add(self, encoded: EncodedChat, *, id: str, line: int, question: int) -> None:
        """Append one.

        Args:
            encoded: The conversation.
            id: Of its record.
            line: Of the file, where the record begins.
            question: See `question_hash`.
        """
        counts = self._counts
        row = np.array(
            (
                counts["tokens"],
                len(encoded.ids),
                counts["turns"],
                len(encoded.turns),
                self._id_bytes,
                line,
                question,
            ),
            dtype=ROW,
        )
        name = id.replace("\n", " ").encode("utf-8", "replace") + b"\n"
        self._rows.write(row.tobytes())
        self._tokens.write(np.asarray(encoded.ids, dtype=self._dtype).tobytes())
        self._turns.write(np.asarray(encoded.turns, dtype="<i4").tobytes())
        self._ids.write(name)
        self._id_bytes += len(name)
        counts["tokens"] += len(encoded.ids)
        counts["turns"] += len(encoded.turns)
        counts["conversations"] += 1

    def finish(self, **more: Any) -> None:
        """Write what the files hold, and more if there is more to know."""
        facts = {"format": FORMAT, "dtype": self._dtype.str, **self._counts, **more}
        (self._folder / "facts.json").write_text(json.dumps(facts), "utf-8")


def question_hash(messages: Sequence[Message]) -> int:
    """Hash of what is asked: equal questions are held out together, whatever their answers.

    What the user says before the first answer decides, with its white space evened out; not the
    system's message, the tokenizer or the template. A conversation that begins with an answer
    counts as a whole.

    Args:
        messages: A conversation, or its beginning.

    Returns:
        64 bits.
    """
    asked = [
        m.content
        for m in itertools.takewhile(lambda m: m.role != "assistant", messages)
        if m.role != "system"
    ] or [m.content for m in messages]
    text = _SEPARATOR.join(" ".join(content.split()) for content in asked)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _encode(
    path: str | Path, folder: Path, *, chat: ChatTemplate, vocab_size: int, report: Report | None
) -> None:
    records = read_conversations(path, report=Progress(path, report))
    usable = without_faults(
        encode_conversations(records, chat=chat), path, what="conversation", option="--sft"
    )
    with StoreWriter(folder, vocab_size=vocab_size) as writer:
        for conversation, encoded in usable:
            writer.add(
                encoded,
                id=conversation.id,
                line=conversation.line,
                question=question_hash(conversation.messages),
            )
        writer.finish()


def map_file(path: Path, dtype: Any) -> npt.NDArray[Any]:
    """Map a file; one that is empty cannot be."""
    if not path.stat().st_size:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
