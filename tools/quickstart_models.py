"""The quickstart's models, reopened with `transformers` and `peft` and nothing of this project."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTINUED_TOKENS = 32
_ANSWER_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said."""

    text: str
    ended: bool
    """Whether it ended its turn, rather than being cut off."""


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """How likely an answer is, with the token that ends it."""

    logprob: float
    """Sum over its tokens, in nats."""
    tokens: int

    @property
    def mean(self) -> float:
        """Log-probability of a token."""
        return self.logprob / self.tokens


@dataclass(frozen=True, slots=True)
class AdapterCheck:
    """How the adapter on its base compares with the export that it was added to."""

    rank: int
    parameters: int
    """Numbers in the adapter."""
    model_parameters: int
    difference: float
    """Largest difference of a log-probability of the asked answers' tokens, in nats."""


class Reopened:
    """A Hugging Face directory opened in `transformers`, in FP32; answers greedily."""

    def __init__(self, directory: Path) -> None:
        """Open a model and its tokenizer."""
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        silence: Any = logging.disable_progress_bar
        silence()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")

    def continue_text(self, prompt: str) -> str:
        """Go on with a text; returns the text with what was added."""
        inputs = self.tokenizer(prompt, return_tensors="pt")
        output = self.model.generate(**inputs, max_new_tokens=_CONTINUED_TOKENS, do_sample=False)
        return str(self.tokenizer.decode(output[0], skip_special_tokens=True))

    def answer(self, question: str) -> Answer:
        """Answer in the model's chat template, up to its end of turn."""
        inputs = self._conversation(question)
        output = self.model.generate(**inputs, max_new_tokens=_ANSWER_TOKENS, do_sample=False)
        ids = output[0, inputs["input_ids"].shape[1] :]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return Answer(str(text), ended=int(ids[-1]) in ends)

    def logprobs(self, question: str, answer: str) -> Any:
        """Log-probability of every token of a conversation but the first: `[tokens - 1]`."""
        import torch

        inputs = self._conversation(question, answer)
        with torch.inference_mode():
            logits = self.model(**inputs).logits[0, :-1]
        following = inputs["input_ids"][0, 1:, None]
        return logits.log_softmax(-1).gather(-1, following)[:, 0]

    def score_answer(self, prompt: Sequence[dict[str, str]], answer: str) -> AnswerScore:
        """Score an answer and the token that ends it, not the prompt.

        Args:
            prompt: Messages, the last one the user's.
            answer: What the assistant says.
        """
        import torch

        said = [*prompt, {"role": "assistant", "content": answer}]
        first = self._encode(prompt, add_generation_prompt=True)["input_ids"].shape[1]
        inputs = self._encode(said)
        ids = inputs["input_ids"][0]
        # A template may go on behind the token that ends the turn.
        last = int((ids == self.tokenizer.eos_token_id).nonzero()[-1])
        with torch.inference_mode():
            logits = self.model(**inputs).logits[0, first - 1 : last]
        following = ids[first : last + 1, None]
        logprobs = logits.log_softmax(-1).gather(-1, following)
        return AnswerScore(float(logprobs.sum()), len(following))

    def _conversation(self, question: str, answer: str | None = None) -> Any:
        messages = [{"role": "user", "content": question}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return self._encode(messages, add_generation_prompt=answer is None)

    def _encode(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = False
    ) -> Any:
        return self.tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=add_generation_prompt,
            return_tensors="pt",
            return_dict=True,
        )


def check_adapter(
    base: Path, adapter: Path, merged: Path, conversations: Sequence[tuple[str, str]]
) -> AdapterCheck:
    """Open an adapter on its base in `peft`, and compare it with the merged export.

    Args:
        base: Hugging Face directory that the adapter was trained on.
        adapter: Directory in the format of `peft`.
        merged: Hugging Face directory with the adapter added to the weights.
        conversations: Questions and answers to score.

    Returns:
        Sizes, and the largest difference found.
    """
    from peft import PeftModel

    export = Reopened(merged)
    expected = [export.logprobs(*pair) for pair in conversations]
    del export
    opened = Reopened(base)
    model_parameters = opened.model.num_parameters()
    opened.model = PeftModel.from_pretrained(opened.model, adapter).eval()
    found = [opened.logprobs(*pair) for pair in conversations]
    config = opened.model.peft_config["default"]
    return AdapterCheck(
        rank=config.r,
        parameters=sum(p.numel() for n, p in opened.model.named_parameters() if "lora_" in n),
        model_parameters=model_parameters,
        difference=max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)),
    )
