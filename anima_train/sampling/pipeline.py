"""The pipeline from prompts to picture files, one part of the model after the other in memory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from anima_train.adapters.applied import merge, read_any
from anima_train.adapters.parts import Adapter
from anima_train.core.device import release_memory
from anima_train.core.files import sha256_file
from anima_train.model.file_kinds import LLM_ADAPTER_PREFIX
from anima_train.model.loading import ModelFiles, ModelSpec, load_transformer
from anima_train.model.vae import load_vae
from anima_train.sampling.generate import Request, Tell, decode, generate
from anima_train.sampling.grids import Cell, ChosenLora, by_loras
from anima_train.sampling.pictures import UsedLora, UsedWeights, save_picture
from anima_train.sampling.prompts import context_of, prompt_states

Loras = tuple[ChosenLora, ...]
Contexts = Mapping[tuple[Loras, str], Tensor]  # by what changes the LLM adapter, and the text


class LoraSwitch:
    """The LoRAs of a model, or other adapters, which can be exchanged without leaving a trace.

    What they change is kept on the CPU and copied back: to subtract them would leave their rounding in the weights.

    Args:
        model: the transformer, or a part of it.
        files: of the whole model.
        prefix: of the model's names in the whole transformer, such as `llm_adapter.`
        keeps: True if other LoRAs will follow, so that weights must be kept.
    """

    def __init__(self, model: nn.Module, files: ModelFiles, prefix: str = "", keeps: bool = True) -> None:
        self.model = model
        self.files = files
        self.prefix = prefix
        self.keeps = keeps
        self.loras: Loras = ()
        self.adapters: dict[Path, Adapter] = {}  # of these LoRAs
        self.originals: dict[str, Tensor] = {}  # by the full names of the parameters that were changed

    @torch.no_grad()
    def set(self, loras: Loras) -> None:
        """Merge these LoRAs, and no others, into the model's weights.

        Raises:
            ModelFileError: a file cannot be read, or does not fit.
        """
        if loras == self.loras:
            return
        assert self.keeps or not self.loras
        # Another strength of the same LoRA reads no file.
        self.adapters = {lora.path: self.adapters.get(lora.path) or read_any(lora.path, self.files) for lora in loras}
        adapters = [(self.adapters[lora.path], lora.strength) for lora in loras]
        changed = {name for adapter, _ in adapters for name in adapter.changes}
        for name, weight in self.model.named_parameters(prefix=self.prefix.removesuffix(".")):
            if name in self.originals:
                weight.copy_(self.originals[name])
            elif self.keeps and name in changed:
                self.originals[name] = weight.detach().to("cpu", copy=True)
        merge(self.model, adapters, self.prefix)
        self.loras = loras


def sample(
    spec: ModelSpec, cells: Sequence[Cell], folder: Path, tell: Tell = lambda sigma: None
) -> Iterator[tuple[int, Path]]:
    """Draw each cell and write it into the folder; yield its place in `cells` and its path.

    Those with the same LoRAs are drawn together. The text encoder is freed before the transformer is loaded, which
    stays beside the VAE until the end. `tell` gets the noise level before each pass of the transformer.

    Raises:
        ModelFileError: a file is damaged, or does not fit; before anything large is loaded.
        ConfigError: a prompt cannot be read.
        NumericError: a picture became NaN; those before it are written.
        SpaceError: the disk is full.
    """
    files, device, dtype = spec.files, spec.device, spec.dtype
    paths = list(dict.fromkeys(lora.path for cell in cells for lora in cell.loras))
    on_llm_adapter = {path for path in paths if changes_llm_adapter(path, files)}
    digests = {path: sha256_file(path) for path in paths}

    def llm_adapter_loras(loras: Loras) -> Loras:
        return tuple(lora for lora in loras if lora.path in on_llm_adapter)

    texts = [(llm_adapter_loras(cell.loras), text) for cell in cells for text in texts_of([cell.request])]
    contexts = encode_all(spec, texts)
    transformer = load_transformer(files, train_llm_adapter=False, dtype=dtype, device=device).eval()
    groups = by_loras(cells)
    switch = LoraSwitch(transformer, files, keeps=len(groups) > 1)
    vae = load_vae(files.vae, dtype, device)
    for loras, places in groups.items():
        switch.set(loras)
        used = [UsedLora(lora.path.stem, lora.strength, digests[lora.path]) for lora in loras]
        weights = UsedWeights(files.transformer.stem, used)
        for place in places:
            request = cells[place].request
            words = llm_adapter_loras(loras)
            context, negative = contexts[words, request.prompt], contexts.get((words, request.negative_prompt))
            latents = generate(transformer, request, context, negative, device, dtype, tell)
            yield place, save_picture(folder, decode(vae, latents), request, weights)


def texts_of(requests: Iterable[Request]) -> list[str]:
    """Return every prompt and negative prompt that has an effect, once."""
    texts = [text for r in requests for text in (r.prompt, *([r.negative_prompt] if r.is_guided else []))]
    return list(dict.fromkeys(texts))


def changes_llm_adapter(path: Path, files: ModelFiles) -> bool:
    """Return True if a LoRA changes the LLM adapter; raise ModelFileError if it does not fit."""
    return any(name.startswith(LLM_ADAPTER_PREFIX) for name in read_any(path, files).changes)


def encode_all(spec: ModelSpec, texts: Sequence[tuple[Loras, str]]) -> Contexts:
    """Return the context of each text with the LoRAs on the LLM adapter, in float32 on the CPU; models are freed."""
    files, device = spec.files, spec.text_device
    tokenizers = files.load_tokenizers()
    text_encoder = files.load_text_encoder(tokenizers, device, spec.text_quantization)
    states = {text: prompt_states(text, tokenizers, text_encoder) for text in dict.fromkeys(text for _, text in texts)}
    del text_encoder
    conditioner = files.load_conditioner(torch.float32, device)
    combinations = list(dict.fromkeys(loras for loras, _ in texts))
    switch = LoraSwitch(conditioner, files, LLM_ADAPTER_PREFIX, keeps=len(combinations) > 1)
    contexts: dict[tuple[Loras, str], Tensor] = {}
    for loras, text in sorted(dict.fromkeys(texts), key=lambda pair: combinations.index(pair[0])):
        switch.set(loras)
        contexts[loras, text] = context_of(states[text], conditioner)
    del conditioner, switch
    release_memory(device)
    return contexts
