"""What tools/preprocess_data.py --sft does: look at conversations before a run trains on them."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from megatron_cgn.data.conversation_report import Counting, show, summary, survey
from megatron_cgn.data.conversations import Conversation, Fault
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
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    shown = 0

    with progress("reading", total=check_inputs(arguments.input), unit="B") as bar:

        def on_fault(fault: Fault) -> None:
            if arguments.validate:
                line = json.dumps(asdict(fault), ensure_ascii=False) if arguments.json else fault
                bar.write(str(line), file=sys.stdout)

        def on_conversation(conversation: Conversation, encoded: EncodedChat) -> None:
            nonlocal shown
            if shown < arguments.show:
                shown += 1
                text = show(conversation, encoded, chat=chat, counting=counting, colour=colour)
                bar.write(text, file=sys.stdout)

        found = survey(
            arguments.input,
            chat=chat,
            counting=counting,
            on_fault=on_fault,
            on_conversation=on_conversation,
            report=bar.update,
        )
    if arguments.json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        print(f"{', '.join(arguments.input)} (chat template {chat.name})")
        print("\n".join(summary(found, counting=counting)))
        if found.faults and not arguments.validate:
            print("--validate names every faulty record by file and line.")
    faulty = found.faults.total() + (found.too_long if arguments.validate else 0)
    return UserError.exit_code if faulty else 0


def progress(title: str, *, total: int, unit: str) -> "tqdm[Any]":
    """A bar on a terminal, and nothing elsewhere."""
    return tqdm(
        total=total, unit=unit, unit_scale=True, desc=title, disable=not sys.stderr.isatty()
    )
