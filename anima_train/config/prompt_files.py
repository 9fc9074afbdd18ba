"""The requests from the command line, and from files of prompts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from anima_train.config.read import read_toml
from anima_train.core.errors import ConfigError
from anima_train.core.settings import Settings, quoted, validation_problems
from anima_train.sampling.elsewhere import prompt_fault
from anima_train.sampling.generate import Request, with_shared

# Names from other tools -> what to write here.
HINTS = {
    "negative": "it is called negative_prompt",
    "cfg_scale": "it is called cfg",
    "guidance_scale": "it is called cfg",
    "scheduler": "it is called schedule",
    "sampler_name": "it is called sampler",
    "size": "it is called width and height",
    "num_inference_steps": "it is called steps",
    "sample_steps": "it is called steps",
    "flow_shift": "it is called shift",
}


class PromptFile(Settings):
    """A TOML file of prompts: a [[prompt]] table for each."""

    prompt: list[Request] = Field(min_length=1)
    """The pictures, in order."""


def make_requests(texts: list[str], settings: Mapping[str, Any], names: Mapping[str, str]) -> list[Request]:
    """Return a request for each text, with the same settings.

    Args:
        texts: the prompts.
        settings: other keys of `Request`.
        names: how messages name these keys, where not as they are called.

    Raises:
        ConfigError: every wrong setting, at once; where there is no text, too.
    """
    data = dict(settings) | {"prompt": ""}
    try:
        shared = Request.model_validate(data)
    except ValidationError as error:
        problems = validation_problems(error, data, Request, {})
        # Each once: width and height may have one name, and the same mistake.
        lines = dict.fromkeys(f"{names.get(key, key)}: {text}" for key, text in problems.items())
        raise ConfigError(lines) from error
    if faults := [
        f"prompt {quoted(text[:40])}: {fault}" for text in texts if (fault := prompt_fault(text)) is not None
    ]:
        raise ConfigError(faults)
    return [shared.model_copy(update={"prompt": text}) for text in texts]


def read_requests(path: Path, settings: Mapping[str, Any], shared: Mapping[str, Any] | None = None) -> list[Request]:
    """Return the requests in a file of prompts: .toml with [[prompt]] tables, else text with a prompt in each line.

    Args:
        path: the file.
        settings: keys of `Request` for all of them, as far as a table does not have its own.
        shared: the same, as far as `settings` do not have them.

    Raises:
        ConfigError: it cannot be read, has no prompt, or everything that is wrong in it.
    """
    shared = shared or {}
    if path.suffix.lower() == ".toml":
        data = read_toml(path)
        if isinstance(tables := data.get("prompt"), list):
            data["prompt"] = [
                with_shared(shared, {**settings, **table}) if isinstance(table, dict) else table for table in tables
            ]
        try:
            return PromptFile.model_validate(data).prompt
        except ValidationError as error:
            problems = validation_problems(error, data, PromptFile, HINTS)
            raise ConfigError([f"{path.name}: {key}: {text}" for key, text in problems.items()]) from error
    texts = read_lines(path, "--prompts")
    if not texts:
        raise ConfigError(f"--prompts: {quoted(str(path))} holds no prompt; expected one in each line")
    return make_requests(texts, with_shared(shared, settings), {})


def read_lines(path: Path, flag: str) -> list[str]:
    """Return the lines of a text file that are not empty.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"{flag}: {quoted(str(path))} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag}: {quoted(str(path))} is not text in UTF-8; save it in that encoding") from error
    return [line.strip() for line in lines if line.strip()]
