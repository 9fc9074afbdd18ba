"""Kinds of values that several keys have, and what each of them refuses."""

import os
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from anima_train.core.settings import describe_value, quoted
from anima_train.core.text_batch import MAX_TOKENS, QWEN_POSITIONS, T5_TOKENS


def refuse_float16(value: Any) -> Any:
    """Refuse fp16 with its reason, not with a list of the allowed names."""
    if value in ("float16", "fp16", "half"):
        raise ValueError(f'found "{value}", which overflows in this model and trains to NaN; use "bfloat16"')
    return value


def plain_name(value: str) -> str:
    """Require a name that makes a folder of its own and nothing else."""
    if value in ("", ".", "..") or not value.isprintable() or set(value) & set('/\\:*?"<>|'):
        raise ValueError(f'found {quoted(value)}, expected a plain name without any of / \\ : * ? " < > |')
    if len(value.encode()) > 150:  # files have it with a step number and a temporary suffix, in at most 255 bytes
        raise ValueError(f"found a name of {len(value.encode())} bytes, expected at most 150")
    return value


def printable_name(value: str) -> str:
    """Require a name that shows as it is in terminals and curves."""
    if not value.isprintable():
        raise ValueError(f"found {quoted(value)}, expected a name without control characters")
    return value


def batch_sizes(value: int | list[list[int]]) -> int | list[list[int]]:
    """Require positive numbers, and each resolution once."""
    entries = value if isinstance(value, list) else [[1, value]]
    if not entries or any(len(entry) != 2 or min(entry) < 1 for entry in entries):
        expected = "a positive integer, or a list of [resolution, number], such as [[512, 4]]"
        raise ValueError(f"found {describe_value(value)}, expected {expected}")
    resolutions = [entry[0] for entry in entries]
    if len(set(resolutions)) < len(resolutions):
        raise ValueError(f"found {describe_value(value)}, expected each resolution once")
    return value


def tokens_up_to(most: int, reason: str, value: int) -> int:
    """Return a number of tokens, if it is at least what captions are padded to and at most this, for a reason."""
    if not MAX_TOKENS <= value <= most:
        raise ValueError(
            f"found {value}, expected {MAX_TOKENS} to {most}: captions are padded to {MAX_TOKENS} anyway, so that less "
            f"would only cut them off, and {reason}"
        )
    return value


def one_byte_name(value: Any) -> Any:
    """Return "float8" under the name that torch has for it; refuse other small types with the reason."""
    if value == "nf4":
        raise ValueError('found "nf4", which saves 0.85 GiB more than "int8", and is slower; use "int8"')
    if value == "float8_e5m2":
        raise ValueError(f'found "{value}", which has two bits for the digits of a weight; use "int8" or "float8"')
    return "float8" if value == "float8_e4m3fn" else value


Dtype = Literal["bfloat16", "float32"]
WeightsDtype = Annotated[
    Literal["bfloat16", "float32", "int8", "float8"], BeforeValidator(one_byte_name), BeforeValidator(refuse_float16)
]
ComputeDtype = Annotated[Dtype, BeforeValidator(refuse_float16)]
Folder = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
CaptionTokens = Annotated[int, AfterValidator(partial(tokens_up_to, QWEN_POSITIONS, "Qwen3 reads no more"))]
T5_REASON = "the memory of T5's attention grows with the square of their length"
T5CaptionTokens = Annotated[int, AfterValidator(partial(tokens_up_to, T5_TOKENS, T5_REASON))]
BatchSizes = Annotated[int | list[list[int]], AfterValidator(batch_sizes)]
