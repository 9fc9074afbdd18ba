"""The [model] table of the main file."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from anima_train.config.values import CaptionTokens, ComputeDtype, Dtype, Folder, T5CaptionTokens, WeightsDtype
from anima_train.core.settings import Settings, nearest, quoted
from anima_train.core.text_batch import MAX_TOKENS
from anima_train.model.quantized import Quantization
from anima_train.model.text_quantized import TextQuantization
from anima_train.model.variants import COSMOS_LICENSE, LICENSE
from anima_train.optim.groups import Component


class AnimaFiles(Settings):
    """The files of Anima."""

    type: Literal["anima"] = "anima"
    """The model family."""
    transformer_path: str | None = None
    """The transformer, with the LLM adapter inside: a .safetensors file or hf://owner/name/path, where @revision after
    the name and #sha256=... at the end say which one is meant. Absent: the official file is downloaded."""
    vae_path: str | None = None
    """The Qwen-Image VAE, in its original Wan names: file or hf:// reference. Absent: downloaded."""
    llm_path: str | None = None
    """The Qwen3-0.6B text encoder: a .safetensors file, a Hugging Face folder, or an hf:// reference. Absent:
    downloaded."""
    llm_adapter_path: str | None = None
    """A LLM adapter used instead of the one in transformer_path."""
    tokenizer_path: str | None = None
    """Folder of the Qwen3 tokenizer. Absent: a folder `tokenizer` near llm_path, else downloaded."""
    t5_tokenizer_path: str | None = None
    """Folder of the T5 tokenizer. Absent: a folder `t5_tokenizer` near llm_path, else downloaded."""
    tiny_path: Folder | None = None
    """Use the random tiny stand-in model in this folder, written there first if missing: tries everything, learns
    nothing useful."""
    text_encoder_nf4: bool = False
    """Keep the text encoder's linears in 4 bits a value (bitsandbytes, to be installed): 0.6 GB instead of 2.4 GB while
    it is in memory. Captions are encoded with an error, and cached under keys of their own."""


class ModelSettings(Settings):
    """The part of [model] that all families have: what is computed in, how captions are read, what t is drawn from."""

    dtype: ComputeDtype = "bfloat16"
    """The type that the forward and backward pass compute in: "bfloat16", or "float32" (slower; for comparisons)."""
    transformer_dtype: WeightsDtype | None = None
    """The type that the base weights are kept in. Absent: as dtype. "float32" with dtype "bfloat16" trains fp32 weights
    under autocast. "int8" halves the base weights under an adapter, and takes products of integers where the device has
    them (CUDA from the 30 series on; wants compile); "float8" halves them, too, is less exact, and a little slower than
    absent. Both leave embedders, norms, modulations, the final layer and the LLM adapter as they are."""
    cache_text_embeddings: bool = True
    """Encode captions once, before training. false encodes each one when it is needed, ahead of use: saves disk where
    there are very many, and keeps the text encoder in memory. Captions that are drawn at random (shuffle_tags,
    tag_dropout) are encoded so anyway."""
    text_encoder_device: Literal["training", "cpu"] = "training"
    """The device that encodes captions: "training", the one that trains; "cpu" saves its memory (2.4 GB where captions
    are encoded during training)."""
    text_encoder_fp8: bool = False
    """Keep the text encoder's linears in 8 bits a value: 0.8 GB of Qwen3 instead of 2.4 GB, 4.9 GB of T5-XXL instead of
    19 GB, while it is in memory. Captions are encoded with an error, and cached under keys of their own."""
    max_caption_tokens: CaptionTokens = MAX_TOKENS
    """Tokens of a caption that are read, by each tokenizer; what is behind them is cut off. 512, as the reference
    trainer has it, to 32768, as Qwen3 reads. Shorter captions are padded to 512 rows whatever it is, as in ComfyUI,
    which cuts nothing off; so prompts of previews and of anima sample are never cut. Above 512 captions take memory and
    time by their length, and micro-batches of this length are tried before the first step. A change encodes all
    captions anew."""
    timestep_sample_method: Literal["logit_normal", "uniform"] = "logit_normal"
    """The distribution of t (0 clean, 1 noise) before the shift."""
    sigmoid_scale: float = Field(default=1.0, gt=0)
    """logit_normal: standard deviation of the normal under the sigmoid. Larger trains more at both ends."""
    shift: float | None = Field(default=None, gt=0)
    """Move t towards noise: t <- s t / (1 + (s - 1) t). Sampling uses 3."""
    flux_shift: bool = False
    """Move t towards noise, more for larger images, as Flux does. Not together with shift."""
    multiscale_loss_weight: float | None = Field(default=None, gt=0)
    """Weight of the MSE of the 2x2 averages, beside 1 for the loss itself, in their weighted mean, which is then the
    loss of images of about 1024 pixels and more (0.9 * 1024 as a square). Draws attention to large shapes."""
    self_attn_lr: float | None = Field(default=None, ge=0)
    """Learning rate of the blocks' self-attention. Absent: optimizer.lr. 0 freezes it: no gradient, not in the
    optimizer, not in the saved adapter."""
    cross_attn_lr: float | None = Field(default=None, ge=0)
    """The same for the blocks' cross-attention."""
    mlp_lr: float | None = Field(default=None, ge=0)
    """The same for the blocks' MLPs."""
    mod_lr: float | None = Field(default=None, ge=0)
    """The same for the AdaLN modulations."""

    @field_validator("tiny_path", check_fields=False)
    @classmethod
    def excludes_files(cls, value: str | None, earlier: ValidationInfo) -> str | None:
        """Refuse other files: the tiny model has its own."""
        replaced = ("transformer_path", "vae_path", "llm_path", "t5_path", "tokenizer_path", "t5_tokenizer_path")
        if value is not None and (others := [key for key in replaced if earlier.data.get(key) is not None]):
            raise ValueError(f"replaces {', '.join(others)}, which would have no effect; keep one")
        return value

    @property
    def uses_autocast(self) -> bool:
        """True where float32 weights compute in bfloat16."""
        return self.dtype == "bfloat16" and self.transformer_dtype == "float32"

    @property
    def weights_dtype(self) -> Dtype:
        """The type of the transformer's weights that do not have a byte a value."""
        return self.transformer_dtype if self.transformer_dtype in ("bfloat16", "float32") else self.dtype

    @property
    def quantization(self) -> Quantization | None:
        """The way in which the blocks' linears have a byte a value; None if they do not."""
        return self.transformer_dtype if self.transformer_dtype in ("int8", "float8") else None

    def learning_rate(self, component: Component, default: float) -> float:
        """Return the learning rate of a component: its own, else the default."""
        own: float | None = None if component == "base" else getattr(self, f"{component}_lr")
        return default if own is None else own

    @field_validator("transformer_dtype")
    @classmethod
    def holds_gradients(cls, value: str | None, earlier: ValidationInfo) -> str | None:
        """Require float32 weights for float32 computation."""
        if value == "bfloat16" and earlier.data.get("dtype") == "float32":
            raise ValueError('found "bfloat16", which needs dtype = "bfloat16"; remove it')
        return value

    @field_validator("text_encoder_fp8")
    @classmethod
    def one_quantization(cls, value: bool, earlier: ValidationInfo) -> bool:
        """Refuse two kinds of weights for one text encoder."""
        if value and earlier.data.get("text_encoder_nf4"):
            raise ValueError("excludes text_encoder_nf4; keep one")
        return value

    @field_validator("sigmoid_scale")
    @classmethod
    def has_a_sigmoid(cls, value: float, earlier: ValidationInfo) -> float:
        """Refuse it without a sigmoid, which only one of the distributions has."""
        if value != 1 and earlier.data.get("timestep_sample_method") == "uniform":
            raise ValueError('has no effect with timestep_sample_method = "uniform"; remove it')
        return value

    @field_validator("flux_shift")
    @classmethod
    def one_shift(cls, value: bool, earlier: ValidationInfo) -> bool:
        """Refuse a second shift of t."""
        if value and earlier.data.get("shift") is not None:
            raise ValueError("excludes shift, which moves t too; keep one")
        return value


class Anima(ModelSettings, AnimaFiles):
    """Anima: its files, what t is drawn from, and the learning rate of each component."""

    license: ClassVar[str] = LICENSE
    llm_adapter_lr: float | None = Field(default=None, ge=0)
    """The same for the LLM adapter. 0 also caches its output and keeps it out of memory; start with 0 on small
    datasets."""

    @property
    def text_quantization(self) -> TextQuantization | None:
        """The way in which the text encoder's linears have a byte a value, or less."""
        return "nf4" if self.text_encoder_nf4 else "float8" if self.text_encoder_fp8 else None


class CosmosFiles(Settings):
    """The files of Cosmos-Predict2."""

    type: Literal["cosmos_predict2"] = "cosmos_predict2"
    """The model family."""
    transformer_path: str | None = None
    """The transformer of Cosmos-Predict2 Text2Image, 2B or 14B: a .safetensors file or an hf:// reference. Required, as
    is all that is not in tiny_path: nothing but the tokenizer is downloaded unasked."""
    vae_path: str | None = None
    """The Wan 2.1 VAE, in its original names, such as wan_2.1_vae.safetensors: file or hf:// reference."""
    t5_path: str | None = None
    """The encoder of T5-XXL, the first ("t5-11b", not v1.1), such as oldt5_xxl_fp16.safetensors: a file, a Hugging Face
    folder of .safetensors files, or an hf:// reference. It computes in float32, and takes 19 GB while it is in memory:
    text_encoder_fp8 and text_encoder_device have less."""
    t5_tokenizer_path: str | None = None
    """Folder of the T5 tokenizer. Absent: a folder `t5_tokenizer` or `tokenizer` near t5_path, else downloaded."""
    tiny_path: Folder | None = None
    """Use the random tiny stand-in model in this folder, written there first if missing: tries everything, learns
    nothing useful."""


class CosmosPredict2(ModelSettings, CosmosFiles):
    """Cosmos-Predict2, text to image: the same transformer, which reads the states of T5 without an LLM adapter."""

    license: ClassVar[str] = COSMOS_LICENSE
    llm_adapter_path: ClassVar[None] = None
    llm_adapter_lr: ClassVar[float] = 0.0  # as if it were frozen: there is none
    max_caption_tokens: T5CaptionTokens = MAX_TOKENS
    """Tokens of a caption that are read; what is behind them is cut off. 512 to 2048: the memory of T5's attention
    grows with the square. Shorter captions are padded to 512 rows whatever it is. A change encodes all captions
    anew."""

    @property
    def text_quantization(self) -> TextQuantization | None:
        """The way in which the text encoder's linears have a byte a value."""
        return "float8" if self.text_encoder_fp8 else None


AnyModel = Annotated[Anima | CosmosPredict2, Field(discriminator="type")]
FAMILIES: dict[str, type[Anima] | type[CosmosPredict2]] = {"anima": Anima, "cosmos_predict2": CosmosPredict2}
MODEL_PATHS = {key for family in FAMILIES.values() for key in family.model_fields if key.endswith("_path")}
MODEL_PATHS.remove("tiny_path")


def unknown_family(kind: str) -> tuple[str, str]:
    """Return the message about a `type` of [model] that is none of ours, and the one that is nearest."""
    close = next((name for name in FAMILIES if name in kind.lower()), None) or nearest(kind, FAMILIES)
    if close is not None:
        return f"found {quoted(kind)}; write {quoted(close)}", close
    return (
        f'found {quoted(kind)}, but only Anima and Cosmos-Predict2 are trained here: write "anima", and its files as '
        'transformer_path, vae_path and llm_path (absent ones are downloaded), or "cosmos_predict2"'
    ), "anima"
