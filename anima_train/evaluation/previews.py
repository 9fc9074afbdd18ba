"""The pictures drawn while training, from fixed prompts and noise, in a way that the training does not notice."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anima_train.core.device import release_memory
from anima_train.core.files import atomic_path
from anima_train.model.dit import MiniTrainDIT
from anima_train.model.llm_adapter import LLMAdapter
from anima_train.model.loading import ModelSpec
from anima_train.model.vae import load_vae
from anima_train.sampling.generate import Request, Transformer, decode, generate
from anima_train.sampling.judges import Judged, score
from anima_train.sampling.pictures import UsedWeights, png_info
from anima_train.sampling.pipeline import texts_of
from anima_train.sampling.prompts import PromptStates, context_of, prompt_states

RunPass = Callable[[Callable[[], Tensor]], Tensor]


@dataclass(frozen=True)
class Previews:
    """The encoded prompts from which the same pictures are drawn again and again.

    Prompts are encoded once and the text encoder is freed before the transformer is loaded; the VAE is loaded for each
    preview and freed again.
    """

    requests: Sequence[Request]
    states: Mapping[str, PromptStates]
    frozen_contexts: Mapping[str, Tensor]  # contexts where the LLM adapter is frozen; else empty
    spec: ModelSpec
    folder: Path
    model_name: str
    judge: str | None = None  # that scores them
    offline: bool = False  # no judge is looked up on the Hub

    @classmethod
    def of(
        cls, requests: Sequence[Request], spec: ModelSpec, folder: Path, name: str, judge: str | None = None,
        offline: bool = False,
    ) -> "Previews":  # fmt: skip
        """Encode the prompts.

        Args:
            requests: the pictures.
            spec: the model. If its LLM adapter trains, the adapter's output is made anew for each preview.
            folder: for the pictures.
            name: of the model, in the pictures' files.
            judge: that scores them.
            offline: it may not be looked up on the Hub.

        Raises:
            ConfigError: a prompt cannot be read.
            ModelFileError: a file cannot be loaded.
        """
        files = spec.files
        tokenizers = files.load_tokenizers()
        text_encoder = files.load_text_encoder(tokenizers, spec.text_device, spec.text_quantization)
        states = {text: prompt_states(text, tokenizers, text_encoder) for text in texts_of(requests)}
        contexts = {}
        if not spec.trains_llm_adapter:
            conditioner = files.load_conditioner(torch.float32, spec.text_device)
            contexts = {text: context_of(found, conditioner) for text, found in states.items()}
            del conditioner
        del text_encoder
        release_memory(spec.text_device)
        return cls(requests, states, contexts, spec, folder, name, judge, offline)

    def draw(self, step: int, transformer: MiniTrainDIT, forward: Transformer, run: RunPass) -> list[Path]:
        """Draw every picture with the weights as they are now, and return the paths.

        Args:
            step: the number of steps so far.
            transformer: with what is trained attached.
            forward: computes its velocity, in the precision of the training.
            run: runs a pass of its LLM adapter.

        Raises:
            NumericError: a picture became NaN.
            SpaceError: the disk is full.
        """
        was_training = transformer.training
        transformer.eval()
        try:
            contexts = self.frozen_contexts or self.contexts_now(transformer.llm_adapter, run)
            latents = [self.latents(request, contexts, forward) for request in self.requests]
        finally:
            transformer.train(was_training)
        vae = load_vae(self.spec.files.vae, self.spec.dtype, self.spec.device)
        paths = []
        for number, (request, each) in enumerate(zip(self.requests, latents, strict=True)):
            path = self.folder / f"s{step:06d}_{number:02d}.png"
            with atomic_path(path) as temporary:
                decode(vae, each).save(temporary, format="PNG", pnginfo=png_info(request, UsedWeights(self.model_name)))
            paths.append(path)
        del vae
        release_memory(self.spec.device)
        return paths

    def latents(self, request: Request, contexts: Mapping[str, Tensor], forward: Transformer) -> Tensor:
        """Return the latents of one picture."""
        context, negative = contexts[request.prompt], contexts.get(request.negative_prompt)
        return generate(forward, request, context, negative, self.spec.device, self.spec.dtype)

    def pictures(self, paths: Sequence[Path]) -> dict[str, np.ndarray]:
        """Return drawn pictures for the trackers, (h, w, 3) uint8 by name."""
        return {f"preview/{number}": np.asarray(Image.open(path, formats=["PNG"])) for number, path in enumerate(paths)}

    def record(self, found: Judged) -> dict[str, Any]:
        """Return what is kept of scores: those of the same requests can be compared."""
        return {"requests": hashlib.sha256(repr(self.requests).encode()).hexdigest()[:16], **asdict(found)}

    def scored(self, paths: Sequence[Path]) -> Judged | None:
        """Return what the judge says of drawn pictures; None without one, or, with a warning, where it fails."""
        if self.judge is None or not paths:
            return None
        found = score(self.judge, self.offline, paths, [request.prompt for request in self.requests])
        release_memory(self.spec.device)
        return found

    def contexts_now(self, llm_adapter: LLMAdapter | None, run: RunPass) -> Mapping[str, Tensor]:
        """Return the contexts as the LLM adapter in training makes them."""
        assert llm_adapter is not None
        return {text: run(partial(context_of, found, llm_adapter)) for text, found in self.states.items()}
