"""Held-out questions: does the model answer, stop, and answer right."""

import ast
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from groundup.data.chat_rows import PackedChats
from groundup.data.chats import Chat
from groundup.data.encoded_chats import tools_of
from groundup.data.rows import read_batch
from groundup.generate.config import SamplingConfig
from groundup.generate.generator import complete
from groundup.model.causal_lm import CausalLM
from groundup.tokenizer.chat import ChatEncoder

ROWS_A_BATCH = 8
MIN_PARAMETERS = 2
"""A single word would pass for a list of one name."""


@dataclass(frozen=True)
class Answer:
    """One held-out question, what the model said and what the data says."""

    question: str
    reference: str
    answer: str
    has_stopped: bool

    @property
    def is_exact(self) -> bool:
        """Whether the model stopped by itself after exactly the reference, white space at the ends aside."""
        return self.has_stopped and self.answer.strip() == self.reference.strip()

    @property
    def is_parameter_list(self) -> bool:
        """Whether the model stopped by itself after names that Python reads as a function's parameters."""
        if not self.has_stopped or not self.answer.strip() or "\n" in self.answer.strip():
            return False
        try:
            # the line end keeps a comment in the answer from hiding the bracket that must close the list
            function = ast.parse(f"def function({self.answer.strip()}\n): pass").body[0]
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
        if not isinstance(function, ast.FunctionDef) or function.returns is not None:  # `a, b) -> (c`
            return False
        given = function.args
        every = (*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg)
        names = [argument.arg for argument in every if argument is not None]
        # a name given twice is found by Python's compiler, not by its parser
        return MIN_PARAMETERS <= len(names) == len(set(names))


Skill = Literal["exact", "parameters"]
SKILLS: dict[Skill, Callable[[Answer], bool]] = {
    "exact": lambda answer: answer.is_exact,
    "parameters": lambda answer: answer.is_parameter_list,
}


@torch.no_grad()
def answer_loss(model: CausalLM, chats: PackedChats) -> float:
    """Mean negative log-likelihood (nats) of the supervised tokens of all rows."""
    model.eval()
    loss_sum, num_tokens = 0.0, 0
    for begin in range(0, chats.rows_per_epoch, ROWS_A_BATCH):
        batch = read_batch(chats, begin, min(ROWS_A_BATCH, chats.rows_per_epoch - begin))
        sums = model(batch.tokens_BT, batch.segments, batch.labels_BT)
        loss_sum += float(sums.nll_sum)
        num_tokens += sums.num_tokens
    return loss_sum / num_tokens


def answer_questions(
    model: CausalLM, encoder: ChatEncoder, chats: Sequence[Chat], config: SamplingConfig, eos_ids: Collection[int]
) -> list[Answer]:
    """Let the model answer the last question of each chat."""
    prompts = [encoder.encode_prompt(chat.prompt, **tools_of(chat)) for chat in chats]
    completions = complete(model, prompts, config, eos_ids)
    return [
        Answer(chat.question, chat.reference, encoder.tokenizer.decode(completion.ids), completion.has_stopped)
        for chat, completion in zip(chats, completions, strict=True)
    ]


def answer_figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Stop rate, lengths in characters, and how many answers differ from each other."""
    return {
        "num_questions": len(answers),
        "stop_rate": sum(answer.has_stopped for answer in answers) / len(answers),
        "mean_answer_length": sum(len(answer.answer) for answer in answers) / len(answers),
        "reference_answer_length": sum(len(answer.reference) for answer in answers) / len(answers),
        "distinct_answers": len({answer.answer for answer in answers}),
        "exact_rate": sum(answer.is_exact for answer in answers) / len(answers),
    }


def skill_rate(answers: Sequence[Answer], skill: Skill) -> float:
    """Share of answers that show the skill."""
    return sum(SKILLS[skill](answer) for answer in answers) / len(answers)
