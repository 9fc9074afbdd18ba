"""The part of a configuration that is about its model, read alone: its datasets need not exist."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from anima_train.config.compat import MAIN
from anima_train.config.load import MAIN_HINTS, Loader
from anima_train.config.model_settings import AnyModel
from anima_train.config.sections import VariantSampling
from anima_train.core.errors import ConfigError
from anima_train.core.settings import Settings
from anima_train.model.variants import picture_defaults


class ModelPart(Settings):
    """The keys of a configuration that say which model it is about, and what to draw with it."""

    model: AnyModel
    offline: bool = False
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = "auto"
    sampling: VariantSampling | None = None

    @property
    def pictures(self) -> dict[str, Any]:
        """The keys of a picture that are set for all prompts, or that the model's variant has."""
        of_variant = picture_defaults(self.model.transformer_path)
        return of_variant if self.sampling is None else of_variant | self.sampling.shared


def load_model_part(path: Path, overrides: Sequence[str] = (), transformer: Path | None = None) -> ModelPart:
    """Read what a configuration says about its model, with its files found; its datasets need not exist.

    Args:
        path: the main TOML.
        overrides: `key.path=value` from --set, later ones win.
        transformer: a file to use instead of the configuration's.

    Raises:
        ConfigError: everything that is wrong in [model], at once; or an override of something else.
    """
    loader = Loader(path)
    data = {key: value for key, value in loader.read(path, overrides).items() if key in ModelPart.model_fields}
    for made in loader.overridden:
        if made.partition(".")[0] not in ModelPart.model_fields:
            loader.problems.append(
                f"--set {made}: has no effect here; only [model], [sampling], attention and offline are read"
            )
    if transformer is not None and isinstance(data.get("model"), dict):
        data["model"] = {key: value for key, value in data["model"].items() if key != "transformer_path"}
        if isinstance(data.get("sampling"), dict):
            data["sampling"] = picture_defaults(transformer) | data["sampling"]
    part = loader.validate(ModelPart, loader.translate(data, MAIN, loader.main), loader.main, MAIN_HINTS)
    if part is not None:
        model = loader.find_model_files(part.model)
        if transformer is not None:
            model = model.model_copy(update={"transformer_path": str(transformer)})
        part = part.model_copy(update={"model": model})
    if loader.problems or part is None:
        raise ConfigError(loader.problems)
    return part
