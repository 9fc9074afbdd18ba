"""The encoding of prompts to contexts, as ComfyUI reads them.

Four things differ from captions (`model/text.py`), each on purpose: training reads captions as they stand and as the
reference trainer does, sampling reads what people have written for ComfyUI.

|              | caption                         | prompt                                                    |
|--------------|---------------------------------|-----------------------------------------------------------|
| parentheses  | letters like any others         | `(x)` and `(x:1.2)` are weights, `\\(` and `\\)` are letters |
| tokenized    | whole                           | each weighted piece by itself                             |
| many tokens  | cut at `max_caption_tokens`     | kept, and the context has more rows                       |
| empty        | no row of Qwen3's states        | the state of one padding token                            |

A prompt without parentheses, of 1 to `max_caption_tokens` tokens, gives what is cached for the same caption.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from anima_train.core.errors import ConfigError
from anima_train.core.settings import quoted
from anima_train.core.text_batch import EncodedText, pad_rows, pad_states
from anima_train.model.llm_adapter import Conditioner
from anima_train.model.text import T5_END, TextEncoder, Tokenizers, Tokens, token_ids
from anima_train.sampling.elsewhere import prompt_fault

EMPHASIS = 1.1  # of parentheses without a number
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # stand for escaped parentheses: Unicode keeps these for use inside a program


def weighted_pieces(prompt: str) -> list[tuple[str, float]]:
    """Return the pieces of a prompt with their weights, escapes resolved.

    `(x:1.2)` has weight 1.2, whatever is around it; `(x)` 1.1 times that of what is around it. Of parentheses that do
    not match, an open one counts as a letter, and behind a closed one too many the count starts at -1. Brackets have no
    meaning.
    """
    hidden = prompt.replace(r"\(", OPEN).replace(r"\)", CLOSE)
    return [(text.replace(OPEN, "(").replace(CLOSE, ")"), weight) for text, weight in pieces(hidden, 1.0)]


def pieces(text: str, weight: float) -> Iterator[tuple[str, float]]:
    """Yield the pieces of a text that has this weight itself."""
    for group in outer_groups(text):
        if len(group) > 1 and group[0] == "(" and group[-1] == ")":
            yield from pieces(*emphasized(group[1:-1], weight))
        else:
            yield group, weight


def outer_groups(text: str) -> Iterator[str]:
    """Yield the parts of a text cut before and behind each outermost pair of parentheses."""
    depth = start = 0
    for place, letter in enumerate(text):
        if letter == "(":
            if depth == 0 and start < place:
                yield text[start:place]
                start = place
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                yield text[start : place + 1]
                start = place + 1
    if start < len(text):
        yield text[start:]


def emphasized(inside: str, weight: float) -> tuple[str, float]:
    """Return the text inside a pair of parentheses, and its weight: the number behind the last colon, or 1.1 times."""
    text, _, number = inside.rpartition(":")
    if text:
        try:
            return text, float(number)
        except ValueError:
            pass  # the colon belongs to the text
    return inside, weight * EMPHASIS


def tokenize_prompt(tokenizers: Tokenizers, prompt: str) -> tuple[Tokens, list[float]]:
    """Return the two token streams of a prompt, of any length, and the weights of T5's; Qwen3's have none.

    Raises:
        ConfigError: a weight is not finite, as "infinity" and "nan" are numbers behind a colon; or the prompt has what
            only another program reads.
    """
    if (fault := prompt_fault(prompt)) is not None:
        raise ConfigError(f"prompt {quoted(prompt[:60])}: {fault}")
    qwen_ids: list[int] = []
    t5_ids: list[int] = []
    weights: list[float] = []
    for text, weight in weighted_pieces(prompt):
        if not math.isfinite(weight):
            raise ConfigError(
                f"prompt {quoted(prompt[:60])}: {quoted(text[:60])} has the weight {weight}; write \\( and \\) for "
                "parentheses that are no weights"
            )
        qwen_ids += token_ids(tokenizers.qwen, text)
        found = token_ids(tokenizers.t5, text)
        t5_ids += found
        weights += [weight] * len(found)
    return Tokens(qwen_ids or [tokenizers.qwen.pad_token_id], [*t5_ids, T5_END]), [*weights, 1.0]


@dataclass(frozen=True)
class PromptStates:
    """The input of the conditioner for a prompt, and the weights of its output's rows; on the CPU."""

    text: EncodedText
    weights: list[float]  # one for each T5 id


def prompt_states(prompt: str, tokenizers: Tokenizers, text_encoder: TextEncoder) -> PromptStates:
    """Return a prompt as the conditioner, which is the LLM adapter in Anima, reads it.

    Raises:
        ConfigError: a weight is not finite.
    """
    return PromptStates(*text_encoder.encode_prompt(*tokenize_prompt(tokenizers, prompt)))


@torch.no_grad()
def context_of(prompt: PromptStates, conditioner: Conditioner) -> Float[Tensor, "1 L C"]:
    """Return the context of a prompt: the conditioner's output, each row times its token's weight; at least 512 rows.

    In the conditioner's dtype, on the CPU.
    """
    device, dtype = conditioner.place
    states = pad_states([prompt.text]).to(device)
    source = states.source.to(dtype)
    context = conditioner(source, states.t5_ids, states.source_mask, states.t5_mask).to("cpu", dtype)
    return pad_rows(context * torch.tensor(prompt.weights, dtype=context.dtype)[:, None])
