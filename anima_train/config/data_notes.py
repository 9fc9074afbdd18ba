"""The keys of a dataset that change nothing about any of its images: each is asked once, by leaving it out."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from anima_train.data.caption_parts import tags_of
from anima_train.data.captions import plain_tag
from anima_train.data.samples import Sample
from anima_train.data.settings import KOHYA_FOLDER, DatasetSettings, DirectoryOptions

MAX_PICTURES = 1000  # of a directory that are asked about a key, evenly spread
MANY_REPEATS = 16  # after which two tags that may change places have done so
MUCH_DROPOUT = {"tag_dropout": 0.99}  # a tag that may be left out is, in so many repeats

Acts = Callable[[Sample, Sample], bool]  # of a sample, and of it without the key: True if they are different


def differ(seen: Callable[[Sample], object]) -> Acts:
    """Return the question whether something about a sample is another without a key."""
    return lambda sample, without: seen(sample) != seen(without)


def sizes(sample: Sample) -> object:
    """Return the sizes of all samples of the picture."""
    return sample.options.sizes(sample.picture.width, sample.picture.height)


def captions(sample: Sample) -> list[str]:
    """Return the captions of so many repeats that each of the picture's is among them, and varied."""
    number = max(MANY_REPEATS, 2 * (len(sample.picture.tags) + len(sample.picture.natural)))
    return [sample.caption(0, repeat).text for repeat in range(number)]


def folders(sample: Sample) -> list[str]:
    """Return the sub-folders of `path` that the picture's file was found in, by their paths below it."""
    names = sample.name.partition("/")[2].split("/")[:-1]
    return ["/".join(names[: place + 1]) for place in range(len(names))]


def is_outside_archives(folder: str) -> bool:
    """Return True if a folder is no archive, nor inside of one."""
    return not any(name.lower().endswith(".tar") for name in folder.split("/"))


def is_searched_for_it(sample: Sample, without: Sample) -> bool:
    """Return True if a picture lies in a sub-folder that would not be searched without the key."""
    return any(not without.options.searches(each) for each in folders(sample) if is_outside_archives(each))


@dataclass(frozen=True)
class Question:
    """The question whether a key does anything to a picture, and the reason if it does nothing to all of them."""

    acts: Acts
    why: str
    given: Mapping[str, Any] = field(default_factory=dict)  # options that make the answer certain
    of_captions: bool = False  # in an evaluation only the first one counts


def of_captions(why: str, given: Mapping[str, Any] | None = None) -> Question:
    """Return the question whether a key does anything to captions."""
    return Question(differ(captions), why, given or {}, of_captions=True)


NO_PLACES = "no caption has two tags that may change places"
SHARES = Question(differ(lambda sample: sample.shares), "no image has captions of both kinds", of_captions=True)
MEASURED = differ(lambda sample: sample.evaluation_caption().text)
MEASURED_WHY = "each image is measured with its first caption, which is the same without it"
OF_FOLDERS: dict[str, Question] = {
    "recursive": Question(is_searched_for_it, "no image lies in a sub-folder"),
    "kohya_folders": Question(
        lambda sample, _: any(map(KOHYA_FOLDER.fullmatch, folders(sample)[:1])),
        "no image lies in a sub-folder named as 10_name",
    ),
    "tars": Question(
        lambda sample, _: not all(map(is_outside_archives, folders(sample))), "no image lies in a .tar of the folder"
    ),
    "captions_per_line": Question(
        lambda sample, _: max(len(sample.picture.tags), len(sample.picture.natural)) > 1,
        "no caption file has a second line",
    ),
}
QUESTIONS: dict[str, Question] = OF_FOLDERS | {
    "no_upscale": Question(differ(sizes), "no image is smaller than its bucket"),
    "crop_position": Question(differ(lambda sample: sample.views()[0].crop), "no image is cut along that side"),
    "alpha_as_mask": Question(differ(lambda sample: sample.masks_alpha), "no image has an alpha channel"),
    "cache_shuffle_num": of_captions(NO_PLACES),
    "shuffle_tags": of_captions(NO_PLACES),
    "cache_shuffle_delimiter": of_captions("no caption changes with it"),
    "keep_first_n_tags": of_captions("no caption has tags that it holds in their places", MUCH_DROPOUT),
    "keep_tokens_separator": of_captions("no caption holds it", MUCH_DROPOUT),
    "tag_dropout": of_captions("no caption has a tag that may be left out", MUCH_DROPOUT),
    "unescape_parentheses": of_captions(r"no caption holds \( or \)"),
    "replace_underscores": of_captions("no tag has an underscore to replace"),
    "caption_prefix": of_captions("no caption changes with it"),
    "trigger_word": of_captions("every caption begins with it, or is empty"),
    "nl_weight": SHARES,
    "caption_shares": SHARES,
}


def without_effect_on_data(
    dataset: DatasetSettings, samples: Sequence[Sample], evaluates: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield (key, why it has no effect) for the keys that change nothing about any image; those of `useless` are told.

    Args:
        dataset: its settings.
        samples: all of them.
        evaluates: True if the loss is only measured on them.
    """
    found: dict[str, dict[int, str]] = defaultdict(dict)  # why, by key and directory
    by_directory: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_directory[sample.directory].append(sample)
    told = {(key, index) for index in range(len(dataset.directory)) for key, _ in dataset.useless(index)}
    told |= {(key, index) for index in by_directory if evaluates for key in dataset.unused_in_evaluation()}
    for index, own in sorted(by_directory.items()):
        for key, why in without_effect_on_directory(dataset, index, own, evaluates):
            if (key, index) not in told:
                found[key][index] = why
    for key, reasons in found.items():
        shared = [index for index in range(len(dataset.directory)) if dataset.level(index, key) == 1]
        if reasons.keys() >= set(shared) and len(shared) > 1:
            yield key, reasons[shared[0]]
        for index, why in reasons.items():
            if index not in shared or len(shared) == 1:  # else meant for those on which it has an effect
                yield f"directory[{index}].{key}", why


def without_effect_on_directory(
    dataset: DatasetSettings, index: int, samples: Sequence[Sample], evaluates: bool
) -> Iterator[tuple[str, str]]:
    """Yield (key, why it has no effect) for the keys that hold for one directory, each asked of its pictures."""
    options, directory = dataset.options(index), dataset.directory[index]
    pictures = list({sample.picture.path: sample for sample in samples}.values())
    asked = pictures[:: -(-len(pictures) // MAX_PICTURES)]
    is_archive = directory.path is not None and Path(directory.path).is_file()
    for key, question in QUESTIONS.items():
        if is_default(options, key) or (directory.hf_dataset is not None and key in OF_FOLDERS):
            continue
        if is_archive and key in ("recursive", "tars"):
            yield key, "an archive is read as a whole"
            continue
        acts, why = question.acts, question.why
        if evaluates and question.of_captions:
            acts, why = MEASURED, MEASURED_WHY
        given = {} if evaluates or not options.tag_dropout else question.given
        if not any(acts(with_options(sample, given), with_options(sample, given, key)) for sample in asked):
            yield key, why if len(asked) == len(pictures) else f"{why} ({len(asked):,} were looked at)"
    if options.tag_dropout and not evaluates:
        yield from unknown_tags(options, pictures)


def is_default(options: DirectoryOptions, key: str) -> bool:
    """Return True if a key has the value that it has where it is not set."""
    return bool(getattr(options, key) == DirectoryOptions.model_fields[key].default)


def with_options(sample: Sample, given: Mapping[str, Any], left_out: str = "") -> Sample:
    """Return a sample with other options, and without one of its own."""
    own = {key: getattr(sample.options, key) for key in sample.options.model_fields_set}
    kept = {key: value for key, value in (own | dict(given)).items() if key != left_out}
    return replace(sample, options=DirectoryOptions.model_construct(**kept))


def unknown_tags(options: DirectoryOptions, pictures: Sequence[Sample]) -> Iterator[tuple[str, str]]:
    """Yield `protected_tags` with those that no caption has."""
    delimiter = options.cache_shuffle_delimiter
    texts = {text for sample in pictures for text in sample.picture.tags if text}
    known = {plain_tag(tag) for text in texts for tag in tags_of(text, delimiter)}
    if missing := [tag for tag in options.protected_tags if plain_tag(tag) not in known]:
        yield "protected_tags", f"no caption has {' or '.join(missing)}"
