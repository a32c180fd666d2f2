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
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.conversations import (
    Conversation,
    Fault,
    encode_conversations,
    read_conversations,
)
from megatron_cgn.data.folders import new_folder, wait_for_folder
from megatron_cgn.data.indexed import token_dtype
from megatron_cgn.errors import DataError
from tokenizer.chat import ChatTemplate, EncodedChat
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

_FAULTS_SHOWN = 10
_SEPARATOR = "\x1f"

type Report = Callable[[str, int, int], None]
"""Told of a file, how many of its bytes are encoded, and how many it has."""


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
    before = _state(path)
    folder = cache / f"chat-{_key(path, chat, tokenizer)}"
    if folder.is_dir():
        return folder
    try:
        with (
            new_folder(folder) as temporary,
            _Writer(temporary, vocab_size=tokenizer.vocab_size) as writer,
        ):
            _encode(path, writer, chat=chat, report=report or _silent)
            if _state(path) != before:  # what was encoded need not be what the key stands for
                raise DataError(f"{path}: changed while it was read. Start again once it is whole.")
    except OSError as error:
        raise DataError(
            f"{cache}: cannot write the encoded conversations of {path} "
            f"({error.strerror or error}). Make room there, or set data.cache_dir to a directory "
            "that can be written."
        ) from error
    return folder


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
            tokens=_map(folder / "tokens.bin", facts["dtype"]),
            rows=_map(folder / "conversations.bin", ROW),
            turns=_map(folder / "turns.bin", "<i4").reshape(-1, 2),
            ids=_map(folder / "ids.txt", np.uint8),
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


class _Writer:
    """Appends conversations to the files of a store. Use as a context manager."""

    def __init__(self, folder: Path, *, vocab_size: int) -> None:
        self._folder = folder
        self._dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._stack = ExitStack()
        self._counts = {"tokens": 0, "turns": 0, "conversations": 0}
        self._id_bytes = 0

    def __enter__(self) -> Self:
        names = ("tokens.bin", "turns.bin", "conversations.bin", "ids.txt")
        self._tokens, self._turns, self._rows, self._ids = (
            self._stack.enter_context((self._folder / name).open("wb")) for name in names
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def add(self, conversation: Conversation, encoded: EncodedChat) -> None:
        """Append one."""
        counts = self._counts
        row = np.array(
            (
                counts["tokens"],
                len(encoded.ids),
                counts["turns"],
                len(encoded.turns),
                self._id_bytes,
                conversation.line,
                question_hash(conversation),
            ),
            dtype=ROW,
        )
        name = conversation.id.replace("\n", " ").encode("utf-8", "replace") + b"\n"
        self._rows.write(row.tobytes())
        self._tokens.write(np.asarray(encoded.ids, dtype=self._dtype).tobytes())
        self._turns.write(np.asarray(encoded.turns, dtype="<i4").tobytes())
        self._ids.write(name)
        self._id_bytes += len(name)
        counts["tokens"] += len(encoded.ids)
        counts["turns"] += len(encoded.turns)
        counts["conversations"] += 1

    def finish(self) -> None:
        """Write what the files hold."""
        facts = {"format": FORMAT, "dtype": self._dtype.str, **self._counts}
        (self._folder / "facts.json").write_text(json.dumps(facts), "utf-8")


def question_hash(conversation: Conversation) -> int:
    """Hash of what is asked: equal questions are held out together, whatever their answers.

    What the user says before the first answer decides, with its white space evened out; not the
    system's message, the tokenizer or the template. A conversation that begins with an answer
    counts as a whole.

    Args:
        conversation: Any.

    Returns:
        64 bits.
    """
    messages = conversation.messages
    asked = [
        m.content
        for m in itertools.takewhile(lambda m: m.role != "assistant", messages)
        if m.role != "system"
    ] or [m.content for m in messages]
    text = _SEPARATOR.join(" ".join(content.split()) for content in asked)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _encode(path: str | Path, writer: _Writer, *, chat: ChatTemplate, report: Report) -> None:
    faults: list[Fault] = []
    done = 0
    progress = _Progress(path, report)
    records = read_conversations(path, report=progress)
    for record in encode_conversations(records, chat=chat):
        if isinstance(record, Fault):
            faults.append(record)
            if len(faults) == _FAULTS_SHOWN:
                break
        elif not faults:
            writer.add(*record)
            done += 1
    if faults:
        raise DataError(_faulty(path, faults))
    if not done:
        raise DataError(f"{path}: holds no conversation. Give a file that does.")
    writer.finish()


class _Progress:
    """Adds up the bytes read of a file."""

    def __init__(self, path: str | Path, report: Report) -> None:
        self._path = str(path)
        self._report = report
        self._total = sum(file.stat().st_size for file in _content(Path(path)))
        self._done = 0

    def __call__(self, more: int) -> None:
        self._done += more
        self._report(self._path, self._done, self._total)


def _faulty(path: str | Path, faults: list[Fault]) -> str:
    first = "The first faulty records" if len(faults) == _FAULTS_SHOWN else "Faulty records"
    return "\n".join(
        [
            f"{first} of {path}:",
            *(f"  {fault}" for fault in faults),
            "Mend or remove them. tools/preprocess_data.py --sft --validate lists all of a file.",
        ]
    )


def _key(path: str | Path, chat: ChatTemplate, tokenizer: Tokenizer) -> str:
    """Hash of everything that decides a store's content."""
    content = hashlib.blake2b(digest_size=16)
    try:
        for file in _content(Path(path)):
            with file.open("rb") as stream:
                content.update(hashlib.file_digest(stream, hashlib.blake2b).digest())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}). Check the path and its "
            "permissions."
        ) from error
    suffix = Path(path).suffix  # decides how the file is read
    facts = [FORMAT, content.hexdigest(), suffix, tokenizer.fingerprint(), chat.fingerprint()]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def _state(path: str | Path) -> list[tuple[str, int, int, int]]:
    """What changes with a dataset's files, without reading them; empty if they cannot be found."""
    try:
        found = [(str(file), file.stat()) for file in _content(Path(path))]
    except OSError:
        return []
    return [(name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in found]


def _content(path: Path) -> list[Path]:
    """The files of a dataset: itself, or those in its directory."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _map(path: Path, dtype: Any) -> npt.NDArray[Any]:
    """Map a file; one that is empty cannot be."""
    if not path.stat().st_size:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def _silent(path: str, done: int, total: int) -> None:
    """Report nothing."""
