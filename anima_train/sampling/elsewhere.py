"""The words that prompts and settings of other programs have, and ours do not."""

import re
from collections.abc import Callable, Mapping
from typing import Any


def by_theirs(names: Mapping[str, str]) -> dict[str, str]:
    """Return name of another program -> ours, from ours -> theirs with blanks between them."""
    return {theirs: ours for ours, words in names.items() for theirs in words.split()}


SAMPLERS = by_theirs(
    {
        "euler_ancestral": "euler_a k_euler_a k_euler_ancestral eulera euler_ancestral_cfg_pp",
        "euler": "k_euler euler_cfg_pp ddim flow_match_euler flowmatch_euler flowmatch unipc uni_pc lcm",
        "heun": "k_heun heunpp2 heun_2",
        "dpmpp_2m": "dpm++_2m dpm++2m dpmpp2m k_dpmpp_2m dpm++_2m_karras dpmpp_2m_karras",
        "dpmpp_2m_sde": "dpm++_2m_sde dpmpp_2m_sde_gpu dpmpp_sde dpm++_sde dpmpp_3m_sde dpm++_3m_sde",
        "er_sde": "ersde er_sde_solver res_multistep sa_solver",
    }
)
SCHEDULES = by_theirs(
    {
        "simple": "karras exponential kl_optimal linear_quadratic linear uniform",
        "sgm_uniform": "ddim_uniform sgm trailing",
        "beta": "beta57",
    }
)
# Letters behind two dashes in a prompt of kohya's -> the key of a picture, and the flag.
KOHYA_OPTIONS = {
    "n": ("negative_prompt", "--negative"),
    "w": ("width", "--size"),
    "h": ("height", "--size"),
    "d": ("seed", "--seed"),
    "l": ("cfg", "--cfg"),
    "s": ("steps", "--steps"),
    "fs": ("shift", "--shift"),
}


def named_elsewhere(names: Mapping[str, str]) -> Callable[[Any], Any]:
    """Return a validator that refuses the names of other programs with ours that is, or comes, nearest.

    Args:
        names: theirs, in small letters with underscores -> ours.
    """

    def validate(value: Any) -> Any:
        word = value.get("type") if isinstance(value, dict) else value
        if isinstance(word, str) and (ours := names.get(re.sub(r"[\s-]+", "_", word.lower()))):
            raise ValueError(f'found "{word}", which is not one of ours; write "{ours}"')
        return value

    return validate


def caption_fault(caption: str) -> str | None:
    """Return what in a caption that the base model draws is for another program; None if nothing is."""
    fault = prompt_fault(caption)
    return None if fault is None else f"{fault.rpartition(';')[0]}; remove it"


def prompt_fault(prompt: str) -> str | None:
    """Return what in a prompt is for another program, and what to write here; None if nothing is."""
    if tag := re.search(r"<(lora|lyco|lycoris|hypernet):([^:>]*)[^>]*>", prompt):
        return f'found "{tag[0]}", which is not read in a prompt; write --lora {tag[2]}.safetensors:STRENGTH'
    if option := re.search(r"(?:^|\s)--(\w+)(?:[ =]|$)", prompt):
        found = f'found "--{option[1]}" in the prompt, where no options are read'
        if option[1] not in KOHYA_OPTIONS:
            return f"{found}; remove it"
        key, flag = KOHYA_OPTIONS[option[1]]
        return f'{found}; write {{ prompt = "...", {key} = ... }} in a file, or {flag} in the command'
    if embedding := re.search(r"\bembedding:\S+", prompt):
        return f'found "{embedding[0]}", and embeddings are not read; remove it'
    return None
