"""The settings of a dataset, of its directories, and the options that hold for one of them."""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationInfo, field_validator, model_serializer

from anima_train.core.settings import Settings
from anima_train.data.buckets import Size, aspect_ratios, nearest, size_of

KOHYA_FOLDER = re.compile(r"([1-9][0-9]{0,3})_[^/]*")  # at most four digits: longer ones are dates, not repeats


class DirectoryOptions(Settings):
    """The keys of a dataset that each [[directory]] may set for itself.

    In `Directory` and `DatasetSettings` only those in `model_fields_set` mean something; `DatasetSettings.options`
    returns the ones that hold for a directory.
    """

    resolutions: list[int | list[int]] = Field(default=[1024], min_length=1)
    """Side, in pixels, of the square whose area the images are scaled to, or [width, height] with that area. Each image
    goes to every resolution."""
    enable_ar_bucket: bool = True
    """Keep the images' aspect ratios, each to the nearest of several buckets; false crops all to squares."""
    min_ar: float = Field(default=0.5, gt=0)
    """Smallest bucket aspect ratio, width / height."""
    max_ar: float = Field(default=2.0, gt=0)
    """Largest bucket aspect ratio."""
    num_ar_buckets: int = Field(default=9, ge=1)
    """Number of aspect ratios, evenly spaced in the logarithm from min_ar to max_ar."""
    ar_buckets: list[float | list[int]] | None = Field(default=None, min_length=1)
    """The aspect ratios themselves, as width / height or [width, height]; replaces min_ar, max_ar and
    num_ar_buckets."""
    size_buckets: list[list[int]] | None = Field(default=None, min_length=1)
    """The sizes themselves, [width, height] in pixels (a third number, frames, must be 1); replaces resolutions and
    all aspect-ratio keys. Each image goes to the one whose aspect ratio is nearest; of equals, to the first."""
    num_repeats: float = Field(default=1.0, ge=0.001)
    """Times each image is seen per epoch, at each of its resolutions. A fraction alternates: 0.5 shows half of the
    images in each epoch, all of them in two."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the samples seen, relative to the weights of the other directories: with 3 and 1, three quarters and
    one quarter of each epoch, whatever the number of images. The length of an epoch stays that of num_repeats. Set for
    all directories or for none; or for those with role = "regularization" alone: then it is their share of all samples,
    and the others are seen as often as without them. Absent: num_repeats alone decides; images with role =
    "regularization" without a num_repeats in their own table are 0.2 of those seen."""
    role: Literal["train", "regularization"] = "train"
    """The purpose of the images. "regularization": images of what the model should not forget. They get no
    trigger_word, and their loss is logged apart, as loss/regularization; weight sets their share, 0.2 without it."""
    kind: Annotated[str, Field(max_length=40, pattern=r"^[\w .-]*$")] = ""
    """The kind of the images in an evaluation set ("artist", "text", the name of a character, ...), whose numbers are
    logged for each kind. Images of one kind may all change alike: the standard error over kinds counts each once."""
    subsample_ratio: float = Field(default=1.0, gt=0, le=1)
    """Use only this share of the images, the same ones in every epoch."""
    no_upscale: bool = False
    """Never enlarge an image: where it is smaller than its bucket, it gets the largest size of about the bucket's
    aspect ratio that fits into it, in multiples of 16 pixels. Smaller than several buckets, it is trained once, at the
    largest of these sizes."""
    crop_position: Literal["center", "top", "bottom", "left", "right"] | list[float] = "center"
    """The part of an image that is kept where its aspect ratio is not the bucket's, or [x, y] from 0 (left, top) to 1
    (right, bottom)."""
    horizontal_flip: bool = False
    """Show each image mirrored every second time; the mirrored latents are cached too. Not for text, or for characters
    whose sides differ."""
    alpha_as_mask: bool = False
    """Train only what is opaque: the images' alpha is their mask, and multiplies that of mask_path. What is transparent
    is laid over white in any case."""
    recursive: bool = False
    """Search sub-folders too, those of mask_path as well; captions and masks are found by the same path below path and
    mask_path. Hidden folders and the cache are left out."""
    kohya_folders: bool = False
    """Search the sub-folders of path that are named as 10_name (1 to 9999) too, and show their images num_repeats * 10
    times. The name behind the number is not used."""
    tars: bool = False
    """Read the .tar files in the folder too, as if they were sub-folders: images and captions of the same name, as in
    WebDataset."""
    cache_shuffle_num: int = Field(default=0, ge=0)
    """Number of shuffled variants of each caption's tags, with tag_dropout drawn for each; they are used in turn over
    the epochs, and all are encoded before training. 0 leaves captions as they are, or to shuffle_tags. Natural-language
    captions are not shuffled."""
    cache_shuffle_delimiter: str = Field(default=", ", min_length=1)
    """The text between tags, wherever tags are told apart."""
    shuffle_tags: bool = False
    """Shuffle the tags anew each time an image is seen, each run of tags by itself: line ends and sentences stay where
    they are. Such captions are encoded ahead of use while the model trains,
    which keeps the text encoder in memory; cache_shuffle_num does it with a fixed number of variants and without
    that."""
    keep_first_n_tags: int = Field(default=0, ge=0)
    """This many tags at the start of a caption are neither shuffled nor dropped; trigger_word and caption_prefix are
    not counted, as they are never moved."""
    keep_tokens_separator: str = ""
    """Text, such as "|||", that parts a caption into tags that stay, tags that may be shuffled and dropped, and (behind
    a second one) tags that stay; it takes the place of keep_first_n_tags where a caption holds it. The model is given
    cache_shuffle_delimiter instead. "" for none."""
    tag_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the tags left out, drawn anew each time an image is seen (or once for each variant of
    cache_shuffle_num). Never in evaluation."""
    protected_tags: list[str] = Field(default=[])
    """Tags that tag_dropout never leaves out, with spaces or underscores."""
    unescape_parentheses: bool = False
    r"""Write ( and ) for \( and \), which belong in prompts for ComfyUI and not in captions."""
    caption_prefix: str = ""
    """Put in front of every caption, missing and empty ones too, as it stands."""
    trigger_word: str = ""
    """Put first of all, before caption_prefix, with cache_shuffle_delimiter behind it; not where the caption is missing
    or empty, and not a second time where the caption begins with it already, as a tag or as the first word of a tag or
    a sentence (then caption_prefix stands in front). Never shuffled. "" for none."""
    replace_underscores: bool = False
    """Write spaces for the underscores in tags, except in those that look like emoticons, as ^_^, o_o and (o)_(o) do,
    and in score_7 and the like. Natural-language captions, caption_prefix and trigger_word stay as they are."""
    captions_per_line: bool = False
    """Each line of a .txt file that is not empty is a caption of its own; they are used in turn each time the image is
    seen. false: the whole file is one caption. A captions.json can give lists of captions anyway."""
    caption_mode: Literal["tags", "nl", "mixed"] = "tags"
    """The captions that are used: "tags" those in {stem}.txt or captions.json, "nl" those in natural language in
    {stem}_nl.txt, "mixed" both, by nl_weight or caption_shares; an image that has only one of the two is trained with
    that one."""
    nl_weight: float = Field(default=0.5, ge=0, le=1)
    """With caption_mode = "mixed", the share of the times an image is seen with its natural-language caption, evenly
    spread."""
    caption_shares: dict[Literal["tags", "nl", "tags_nl", "nl_tags"], Annotated[float, Field(ge=0)]] | None = None
    """With caption_mode = "mixed", the shares of four ways to use the captions of an image that has both, such as
    { tags = 2, nl = 1, tags_nl = 1, nl_tags = 1 }: one of the two, or both in one caption, each in lines of its own.
    Replaces nl_weight."""
    skip_empty_caption: bool = False
    """Skip images whose caption is empty or missing."""
    missing_caption: Literal["empty", "error"] = "empty"
    """The treatment of an image without a caption (of the kind that caption_mode asks for): "empty" trains it with the
    empty one (after caption_prefix) and counts it; "error" stops. Where it is not set, a run also stops if most images
    of a folder lack a caption while files beside them look like captions."""
    min_image_side: int = Field(default=64, ge=1)
    """Images whose shorter side has fewer pixels are skipped."""
    min_kept: float = Field(default=0.25, ge=0, le=1)
    """Images of whose area the crop would keep less than this share are skipped."""

    @model_serializer(mode="wrap")
    def without_unset(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the options that are not set: a default in a [[directory]] would hide the dataset's key."""
        unset = DirectoryOptions.model_fields.keys() - self.model_fields_set
        return {key: value for key, value in serialize(self).items() if key not in unset}

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each mistake that is not in a single value."""
        if self.min_ar > self.max_ar:
            yield f"min_ar {self.min_ar} is larger than max_ar {self.max_ar}"
        sides = []
        for resolution in self.resolutions:
            if isinstance(resolution, list) and (len(resolution) != 2 or min(resolution) < 1):
                yield f"resolutions: found {resolution}, expected a number of pixels or [width, height]"
                continue
            sides.append(side(resolution))
            if not 64 <= sides[-1] <= 4096:
                yield f"resolutions: found {resolution}, expected 64 to 4096 pixels"
        if len(set(sides)) < len(sides):
            yield f"resolutions: found {self.resolutions}, in which one is given twice"
        for size in self.size_buckets or []:
            if len(size) not in (2, 3) or size[2:] not in ([], [1]) or any(s < 16 or s % 16 for s in size[:2]):
                yield f"size_buckets: found {size}, expected [width, height] in multiples of 16"
        for ratio in self.ar_buckets or []:
            bad = (len(ratio) != 2 or min(ratio) < 1) if isinstance(ratio, list) else ratio <= 0
            if bad:
                yield f"ar_buckets: found {ratio}, expected a positive ratio or [width, height]"
        at = self.crop_position
        if not isinstance(at, str) and (len(at) != 2 or not all(0 <= part <= 1 for part in at)):
            yield f"crop_position: found {at}, expected a name, or [x, y] from 0 to 1"
        if self.caption_shares is not None and not any(self.caption_shares.values()):
            yield "caption_shares: found no share above 0, so that no caption would be used"
        if not all(tag.strip() for tag in self.protected_tags):
            yield "protected_tags: found an empty tag; remove it"

    @property
    def position(self) -> tuple[float, float]:
        """The position (x, y) of the crop, from (0, 0), left and top, to (1, 1)."""
        at = self.crop_position
        return POSITIONS[at] if isinstance(at, str) else (at[0], at[1])

    @property
    def prefix_word(self) -> str:
        """The trigger word, where these images get one."""
        return "" if self.role == "regularization" else self.trigger_word

    @property
    def varies_tags(self) -> bool:
        """True if tags are shuffled or left out, in a fixed number of variants or anew for each repeat."""
        return self.cache_shuffle_num > 0 or self.shuffle_tags or self.tag_dropout > 0

    @property
    def draws_tags(self) -> bool:
        """True if tags are drawn anew for each repeat, so that their captions cannot be encoded before training."""
        return self.varies_tags and self.cache_shuffle_num == 0

    @functools.cached_property
    def buckets(self) -> list[tuple[int, list[Size]]]:
        """The (resolution, sizes) of each resolution, the sizes sorted."""
        if not self.enable_ar_bucket:
            ratios = [1.0]
        elif self.ar_buckets is not None:
            ratios = [r[0] / r[1] if isinstance(r, list) else r for r in self.ar_buckets]
        else:
            ratios = aspect_ratios(self.min_ar, self.max_ar, self.num_ar_buckets)
        return [
            (resolution, sorted({size_of(resolution, ratio) for ratio in ratios}))
            for resolution in map(side, self.resolutions)
        ]

    def usual_sizes(self, width: int, height: int) -> list[tuple[int, Size]]:
        """Return what `sizes` does without `no_upscale`: the nearest bucket of each resolution."""
        aspect = width / height
        if self.size_buckets is not None:
            size = nearest(aspect, [Size(size[0], size[1]) for size in self.size_buckets])
            return [(size.resolution, size)]
        return [(resolution, nearest(aspect, sizes)) for resolution, sizes in self.buckets]

    def sizes(self, width: int, height: int) -> list[tuple[int, Size]]:
        """Return the (resolution, size) of each sample that a picture of this width and height, in pixels, becomes."""
        found = self.usual_sizes(width, height)
        if not self.no_upscale:
            return found
        covered = [(resolution, size) for resolution, size in found if size.fitted(width, height) == size]
        smaller = [size.fitted(width, height) for _, size in found if size.fitted(width, height) != size]
        largest = max(smaller, key=lambda size: size.num_tokens, default=None)
        if largest is None or largest in [size for _, size in covered]:
            return covered
        usual = {size: resolution for resolution, sizes in self.buckets for size in sizes}
        return [*covered, (usual.get(largest, largest.resolution), largest)]

    def searches(self, folder: str) -> bool:
        """Return True if a sub-folder, named by its path below `path`, is searched."""
        return self.recursive or (self.kohya_folders and KOHYA_FOLDER.fullmatch(folder) is not None)

    def of_folder(self, folder: str) -> "DirectoryOptions":
        """Return the options for the images of the sub-folder of this name directly below `path`; "" is `path`."""
        match = KOHYA_FOLDER.fullmatch(folder) if self.kohya_folders else None
        if match is None:
            return self
        # As a fraction, because 3 * 0.1 is no tenth of anything, and the plan would never repeat.
        num_repeats = float(Fraction(str(self.num_repeats)) * int(match[1]))
        return self.model_copy(update={"num_repeats": num_repeats})


class Directory(DirectoryOptions):
    """A folder of images with a .txt caption beside each, or with a captions.json, {"file name": "caption" or
    ["several", "captions"]}, in the folder of the images, which counts before the .txt files; or a Hugging Face
    dataset."""

    hf_dataset: str | None = Field(default=None, min_length=1)
    """Instead of path, what Hugging Face datasets loads: owner/name on the Hub, a .parquet file, or a folder with
    parquet files or images, or written by save_to_disk."""
    path: str | None = None
    """The folder, or a .tar file. Relative to the current folder or, where that does not exist, to this file."""
    mask_path: str | None = None
    """A folder of masks (or a .tar file), one per image with the same name (any extension): white is trained, black is
    not, grey in between."""
    hf_subset: str | None = Field(default=None, min_length=1)
    """Name of the dataset's configuration, where it has several."""
    hf_split: str = Field(default="train", min_length=1)
    """The split, in datasets' own notation: "train[:500]" takes the first 500 rows."""
    hf_revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit on the Hub; a commit never changes."""
    image_column: str = Field(default="image", min_length=1)
    """The column of the images."""
    caption_column: str = "text"
    """The column of the captions, each a text or a list of texts. "" for none."""
    natural_column: str = ""
    """The column of the captions in natural language, as in {stem}_nl.txt. "" for none."""
    mask_column: str = ""
    """The column of the masks. "" for none."""

    @field_validator("path")
    @classmethod
    def one_source(cls, value: str | None, earlier: ValidationInfo) -> str | None:
        """Require one of path and hf_dataset."""
        if (value is None) == (earlier.data.get("hf_dataset", "") is None):
            found = "missing, and required" if value is None else "excludes hf_dataset"
            raise ValueError(f"{found}; set one of path and hf_dataset")
        return value

    @field_validator("mask_path")
    @classmethod
    def is_for_folders(cls, value: str | None, earlier: ValidationInfo) -> str | None:
        """Refuse it with hf_dataset: a table has its masks in a column."""
        if value is not None and earlier.data.get("hf_dataset") is not None:
            raise ValueError("excludes hf_dataset; name the column of its masks in mask_column")
        return value

    @field_validator(
        "hf_subset", "hf_split", "hf_revision", "image_column", "caption_column", "natural_column", "mask_column"
    )
    @classmethod
    def is_for_tables(cls, value: str | None, earlier: ValidationInfo) -> str | None:
        """Refuse it without hf_dataset: a folder has no columns."""
        assert earlier.field_name is not None
        default = cls.model_fields[earlier.field_name].default
        if value != default and earlier.data.get("hf_dataset", "") is None:
            raise ValueError("needs hf_dataset, which is not set")
        return value


class DatasetSettings(DirectoryOptions):
    """A dataset: its directories, and the options for all of them."""

    directory: list[Directory] = Field(min_length=1)
    """The folders."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Stop when more than this share of the images has to be skipped because it is damaged or unreadable."""

    def model_post_init(self, context: Any) -> None:
        options = [self.options(index) for index in range(len(self.directory))]
        problems = [f"directory[{index}]: {problem}" for index, own in enumerate(options) for problem in own.problems()]
        problems.extend(unequal_weights(options))
        if problems:
            raise ValueError("\n".join(problems))

    def options(self, index: int) -> DirectoryOptions:
        """Return the options for one directory: of each key its own value, else the dataset's, else the default."""
        chosen = {
            name: getattr(table, name)
            for table in (self, self.directory[index])
            for name in table.model_fields_set & DirectoryOptions.model_fields.keys()
        }
        return DirectoryOptions(**chosen)

    def level(self, index: int, name: str) -> int:
        """Return how near to a directory one of its keys is set: 2 in its own table, 1 in the dataset's, 0 nowhere."""
        return 2 if name in self.directory[index].model_fields_set else int(name in self.model_fields_set)

    def without_effect(self, index: int) -> Iterator[str]:
        """Yield a sentence for each key of a directory that changes nothing, whatever is in it."""
        options = self.options(index)
        for name, why in self.useless(index):
            yield f"directory[{index}]: {name} has no effect, because {why}"
        if options.weight is not None and len(self.directory) == 1:
            yield f"directory[{index}]: weight has no effect, because there is no other directory"
        seen: dict[float, Sequence[int]] = {}
        for size in options.size_buckets or []:
            if (first := seen.setdefault(size[0] / size[1], size)) is not size:
                yield f"directory[{index}]: size_buckets: {size} is never used: {first} has its aspect ratio"

    def useless(self, index: int) -> Iterator[tuple[str, str]]:
        """Yield (key, why) for each key of a directory that another one, set as near or nearer, makes useless.

        None for the dataset's keys where the directory itself sets the other one: they may be meant for its siblings.
        """
        options, directory = self.options(index), self.directory[index]
        for cause, holds, replaced in REPLACED:
            if not holds(options):
                continue
            for name in replaced:
                is_default = getattr(options, name) == DirectoryOptions.model_fields[name].default
                if not is_default and self.level(index, name) >= self.level(index, cause):
                    # Where the cause is a default, a key of the dataset may be meant for a sibling that has set it.
                    is_shared = self.level(index, name) == 1 and self.level(index, cause) == 0
                    if not (is_shared and any(not holds(self.options(other)) for other in range(len(self.directory)))):
                        yield name, f"of {cause}"
        if directory.hf_dataset is None:
            return
        are_tables = all(each.hf_dataset is not None for each in self.directory)
        for name in FOLDER_KEYS:
            if getattr(options, name) and self.level(index, name) >= (1 if are_tables else 2):
                yield name, "hf_dataset is no folder"
        for name, mode in (("natural_column", "tags"), ("caption_column", "nl")):
            if name in directory.model_fields_set and getattr(directory, name) and options.caption_mode == mode:
                yield name, f'caption_mode is "{mode}"'

    def unused_in_evaluation(self) -> list[str]:
        """Return the keys that are set and change nothing where the loss is only measured."""
        return [name for name in TRAINING_KEYS if any(self.level(index, name) for index in range(len(self.directory)))]


def unequal_weights(options: Sequence[DirectoryOptions]) -> Iterator[str]:
    """Yield what is wrong where some directories have a weight, and others have none."""
    weights = [own.weight for own in options if own.weight is not None]
    if len(weights) in (0, len(options)):
        return
    place = f"directory[{[own.weight for own in options].index(None)}]"
    if any((own.weight is None) != (own.role == "train") for own in options):
        text = 'give one to all, to none, or to those with role = "regularization"'
        yield f"{place}: has no weight, but another has; {text}"
    elif sum(Fraction(str(weight)) for weight in weights) >= 1:
        yield (
            f"{place}: has no weight, so the weights of regularization directories are shares of all samples; their "
            "sum must be below 1"
        )


POSITIONS = {"center": (0.5, 0.5), "top": (0.5, 0.0), "bottom": (0.5, 1.0), "left": (0.0, 0.5), "right": (1.0, 0.5)}
ASPECT_KEYS = ("min_ar", "max_ar", "num_ar_buckets")
BUCKET_KEYS = ("enable_ar_bucket", "ar_buckets", *ASPECT_KEYS)
FOLDER_KEYS = ("recursive", "kohya_folders", "tars", "captions_per_line")
TAG_KEYS = (
    "cache_shuffle_num",
    "shuffle_tags",
    "keep_first_n_tags",
    "keep_tokens_separator",
    "tag_dropout",
    "protected_tags",
)
TRAINING_KEYS = ("num_repeats", "weight", "role", "horizontal_flip", *TAG_KEYS)
REPLACED: Sequence[tuple[str, Callable[[DirectoryOptions], bool], Sequence[str]]] = (
    # key, when it replaces others, the others
    ("size_buckets", lambda options: options.size_buckets is not None, ("resolutions", *BUCKET_KEYS)),
    ("enable_ar_bucket", lambda options: not options.enable_ar_bucket, ("ar_buckets", *ASPECT_KEYS)),
    ("ar_buckets", lambda options: options.ar_buckets is not None, ASPECT_KEYS),
    ("caption_mode", lambda options: options.caption_mode == "nl", (*TAG_KEYS, "replace_underscores")),
    ("caption_mode", lambda options: options.caption_mode != "mixed", ("nl_weight", "caption_shares")),
    ("caption_shares", lambda options: options.caption_shares is not None, ("nl_weight",)),
    ("cache_shuffle_num", lambda options: options.cache_shuffle_num > 0, ("shuffle_tags",)),
    ("shuffle_tags", lambda options: not options.varies_tags, ("keep_first_n_tags",)),
    ("tag_dropout", lambda options: options.tag_dropout == 0, ("protected_tags",)),
    (
        "cache_shuffle_num",
        lambda options: not (options.varies_tags or options.prefix_word or options.replace_underscores),
        ("cache_shuffle_delimiter",),
    ),
    ("role", lambda options: options.role == "regularization", ("trigger_word",)),
)


def side(resolution: int | Sequence[int]) -> int:
    """Return the side, in pixels, of the square with the area of [width, height]; a number is that side already."""
    return resolution if isinstance(resolution, int) else Size(resolution[0], resolution[1]).resolution
