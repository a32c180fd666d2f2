"""What tools/preprocess_data.py --sft and --preference do: look at data before a run reads them."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from megatron_cgn.data.conversation_report import Counting, show, summary, survey
from megatron_cgn.data.conversations import Conversation, Fault
from megatron_cgn.data.preference_records import Preference
from megatron_cgn.data.preference_report import (
    show_preference,
    summarise_preferences,
    survey_preferences,
)
from megatron_cgn.data.readers import check_inputs
from megatron_cgn.errors import UserError
from tokenizer.chat import ChatTemplate, EncodedChat


def check_conversations(arguments: argparse.Namespace) -> int:
    """Print what files of conversations hold; returns the exit code: 2 if anything is faulty."""
    chat = ChatTemplate.open(arguments.tokenizer, template=arguments.chat_template)
    counting = Counting(
        train_on_prompt=arguments.train_on_prompt,
        last_turn_only=arguments.last_turn_only,
        seq_length=arguments.seq_length,
    )
    with progress("reading", total=check_inputs(arguments.input), unit="B") as bar:
        printer = _Printer(arguments, bar)

        def on_conversation(conversation: Conversation, encoded: EncodedChat) -> None:
            if printer.shows():
                colour = printer.colour
                text = show(conversation, encoded, chat=chat, counting=counting, colour=colour)
                printer.print(text)

        found = survey(
            arguments.input,
            chat=chat,
            counting=counting,
            on_fault=printer.fault,
            on_conversation=on_conversation,
            report=bar.update,
        )
    lines = summary(found, counting=counting)
    return _finish(arguments, chat, found.to_json(), lines, too_long=found.too_long)


def check_preferences(arguments: argparse.Namespace) -> int:
    """Print what files of preference data hold; returns the exit code: 2 if anything is faulty."""
    chat = ChatTemplate.open(arguments.tokenizer, template=arguments.chat_template)
    counting = Counting(
        last_turn_only=arguments.last_turn_only,
        seq_length=arguments.seq_length,
        whole=arguments.reward,
    )
    with progress("reading", total=check_inputs(arguments.input), unit="B") as bar:
        printer = _Printer(arguments, bar)

        def on_record(preference: Preference, encoded: list[EncodedChat]) -> None:
            if printer.shows():
                colour = printer.colour
                printer.print(
                    show_preference(
                        preference, encoded, chat=chat, counting=counting, colour=colour
                    )
                )

        found = survey_preferences(
            arguments.input,
            chat=chat,
            counting=counting,
            on_fault=printer.fault,
            on_record=on_record,
            report=bar.update,
        )
    lines = summarise_preferences(found, counting=counting)
    return _finish(arguments, chat, found.to_json(), lines, too_long=found.too_long)


class _Printer:
    """Prints faults and examples above the bar, as far as the arguments ask for them."""

    def __init__(self, arguments: argparse.Namespace, bar: "tqdm[Any]") -> None:
        self.colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._arguments = arguments
        self._bar = bar
        self._left: int = arguments.show

    def shows(self) -> bool:
        """Whether another example is to be shown; asking uses it up."""
        self._left -= 1
        return self._left >= 0

    def fault(self, fault: Fault) -> None:
        """Print a fault if all are asked for."""
        if self._arguments.validate:
            as_json = self._arguments.json
            line = json.dumps(asdict(fault), ensure_ascii=False) if as_json else fault
            self.print(str(line))

    def print(self, text: str) -> None:
        """Print above the bar."""
        self._bar.write(text, file=sys.stdout)


def _finish(
    arguments: argparse.Namespace,
    chat: ChatTemplate,
    figures: dict[str, Any],
    lines: list[str],
    *,
    too_long: int,
) -> int:
    """Print figures; return the exit code."""
    faults = figures["faults"]
    if arguments.json:
        print(json.dumps(figures, ensure_ascii=False))
    else:
        print(f"{', '.join(arguments.input)} (chat template {chat.name})")
        print("\n".join(lines))
        if faults and not arguments.validate:
            print("--validate names every faulty record by file and line.")
    faulty = faults + (too_long if arguments.validate else 0)
    return UserError.exit_code if faulty else 0


def progress(title: str, *, total: int, unit: str) -> "tqdm[Any]":
    """A bar on a terminal, and nothing elsewhere."""
    return tqdm(
        total=total, unit=unit, unit_scale=True, desc=title, disable=not sys.stderr.isatty()
    )
