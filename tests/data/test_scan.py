"""Folders of real files, good and bad, and what the scan makes of them."""

import hashlib
import json
import os
import zlib
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from anima_train.core.errors import DataError
from anima_train.core.format import MAX_LISTED, Listing, listed, printable
from anima_train.data.buckets import Size
from anima_train.data.cache import CACHE_FOLDER, Cache
from anima_train.data.plan import Plan
from anima_train.data.samples import Picture
from anima_train.data.scan import Scan, scan
from anima_train.data.settings import DatasetSettings

SQUARES = {"resolutions": [64], "enable_ar_bucket": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    return path


def image(path: Path, width: int = 80, height: int = 80, caption: str | None = "a cat", **options: object) -> Path:
    """An image whose pixels depend on its name, with its caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(zlib.crc32(os.fsencode(path.name)))
    Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def settings(keys: dict[str, object] | None = None, *directories: dict[str, object]) -> DatasetSettings:
    tables = [{"path": "unused", **directory} for directory in directories] or [{"path": "unused"}]
    return DatasetSettings.model_validate({**(keys or {}), "directory": tables})


def look(folder: Path, masks: Path | None = None, seed: int = 0, write: bool = True, **keys: object) -> Scan:
    """Scan one folder, its cache beside it."""
    cache = Cache(folder.parent / "cache")
    return scan(settings({**SQUARES, **keys}), [folder], [masks], [cache], seed, write)


def names(found: Scan) -> list[str]:
    return [sample.picture.path.name for sample in found.samples]


def pictures(found: Scan) -> list[Picture]:
    return [sample.picture for sample in found.samples]


def captions(found: Scan) -> dict[str, str]:
    return {sample.picture.path.name: sample.caption(0, 0).text for sample in found.samples}


def the_warning(found: Scan, text: str) -> str:
    """The one warning that holds this text."""
    (warning,) = [warning for warning in found.warnings if text in warning]
    return warning


def problems(keys: dict[str, object], *directories: dict[str, object]) -> str:
    with pytest.raises(ValidationError) as caught:
        settings(keys, *directories)
    return str(caught.value)


# Settings


def test_a_directory_overrides_the_dataset_key_by_key():
    dataset = settings(
        {"resolutions": [512], "num_repeats": 2, "caption_prefix": "all, ", "min_ar": 0.7},
        {},
        {"resolutions": [768, 1024], "caption_prefix": ""},
    )
    first, second = dataset.options(0), dataset.options(1)
    assert (first.resolutions, first.num_repeats, first.caption_prefix, first.min_ar) == ([512], 2, "all, ", 0.7)
    assert (second.resolutions, second.num_repeats, second.caption_prefix, second.min_ar) == ([768, 1024], 2, "", 0.7)


def test_false_and_zero_in_a_directory_override_too():
    options = settings({"skip_empty_caption": True, "cache_shuffle_num": 4}, {"skip_empty_caption": False}).options(0)
    assert not options.skip_empty_caption
    zero = settings({"cache_shuffle_num": 4, "min_kept": 0.5}, {"cache_shuffle_num": 0, "min_kept": 0}).options(0)
    assert (zero.cache_shuffle_num, zero.min_kept) == (0, 0)


def test_what_is_written_of_a_dataset_are_the_keys_that_were_set_and_it_can_be_read_again():
    """A default written into a [[directory]] would hide the key of the dataset."""
    keys, own = {"num_repeats": 2.0, "min_kept": 0.0}, {"path": "unused", "num_repeats": 1.0, "trigger_word": ""}
    dataset = settings(keys, own, {})
    written = dataset.model_dump(exclude_none=True)
    columns = {"hf_split", "image_column", "caption_column", "natural_column", "mask_column"}
    first, second = ({key: table[key] for key in table.keys() - columns} for table in written.pop("directory"))
    assert (written, first, second) == (keys | {"max_bad_fraction": 0.01}, own, {"path": "unused"})
    again = DatasetSettings.model_validate(dataset.model_dump(exclude_none=True))
    assert [again.options(index) for index in (0, 1)] == [dataset.options(index) for index in (0, 1)]
    assert (again.options(0).num_repeats, again.options(1).num_repeats) == (1, 2)


def test_defaults():
    options = settings().options(0)
    assert options.sizes(100, 100) == [(1024, Size(1024, 1024))]
    assert options.sizes(100, 200) == [(1024, Size(720, 1456))]
    assert len(options.buckets[0][1]) == 9
    assert (options.num_repeats, options.caption_prefix) == (1, "")


def test_every_resolution_has_the_buckets():
    options = settings({"resolutions": [512, 1024]}).options(0)
    assert options.sizes(200, 100) == [(512, Size(720, 368)), (1024, Size(1456, 720))]


def test_a_resolution_may_be_a_size_with_its_area():
    assert settings({"resolutions": [[1280, 720]]}).options(0).sizes(100, 100) == [(960, Size(960, 960))]


def test_without_buckets_everything_is_square():
    options = settings({"resolutions": [512], "enable_ar_bucket": False}).options(0)
    assert options.sizes(300, 100) == [(512, Size(512, 512))]


@pytest.mark.parametrize("ratios", [[0.75, 1.0], [[3, 4], [2, 2]]])
def test_ratios_can_be_given(ratios: list):
    options = settings({"resolutions": [512], "ar_buckets": ratios}).options(0)
    assert options.buckets == [(512, [Size(448, 592), Size(512, 512)])]  # 443.4 x 591.2, 512 x 512


def test_sizes_can_be_given_and_each_has_the_resolution_of_its_area():
    options = settings({"size_buckets": [[512, 512], [1024, 512, 1], [1024, 2048]]}).options(0)
    assert options.sizes(110, 100) == [(512, Size(512, 512))]
    assert options.sizes(200, 100) == [(724, Size(1024, 512))]
    assert options.sizes(100, 250) == [(1448, Size(1024, 2048))]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"min_ar": 2.0, "max_ar": 0.5}, "min_ar 2.0 is larger than max_ar 0.5"),
        ({"resolutions": [16]}, "found 16, expected 64 to 4096"),
        ({"resolutions": [5000]}, "found 5000, expected 64 to 4096"),
        ({"resolutions": [[1024]]}, "expected a number of pixels or [width, height]"),
        ({"resolutions": [[1024, 0]]}, "expected a number of pixels or [width, height]"),
        ({"resolutions": [512, 512]}, "given twice"),
        ({"resolutions": []}, "resolutions"),
        ({"size_buckets": [[512, 500]]}, "multiples of 16"),
        ({"size_buckets": [[512, 512, 33]]}, "multiples of 16"),
        ({"size_buckets": [[0, 512]]}, "multiples of 16"),
        ({"ar_buckets": [0.0]}, "expected a positive ratio"),
        ({"ar_buckets": [-1.0]}, "expected a positive ratio"),
        ({"ar_buckets": [[1, 0]]}, "expected a positive ratio"),
        ({"num_repeats": 0}, "num_repeats"),
        ({"num_repeats": 1e-9}, "num_repeats"),
        ({"subsample_ratio": 1.5}, "subsample_ratio"),
        ({"missing_caption": "maybe"}, "missing_caption"),
        ({"caption_mode": "both"}, "caption_mode"),
        ({"nl_weight": 1.5}, "nl_weight"),
        ({"recursive": 1}, "recursive"),
        ({"weight": 0}, "weight"),
        ({"role": "reg"}, "role"),
        ({"crop_position": "middle"}, "crop_position"),
        ({"crop_position": [0.5]}, "crop_position: found [0.5], expected a name, or [x, y] from 0 to 1"),
        ({"crop_position": [0.5, 1.5]}, "expected a name, or [x, y] from 0 to 1"),
        ({"tag_dropout": 1.0}, "tag_dropout"),
        ({"keep_first_n_tags": -1}, "keep_first_n_tags"),
        ({"protected_tags": [" "]}, "protected_tags: found an empty tag"),
    ],
)
def test_wrong_settings_are_refused(keys: dict[str, object], expected: str):
    assert expected in problems(keys)
    assert expected in problems({}, {}, keys)


def test_all_wrong_settings_are_named_at_once():
    found = problems({}, {"resolutions": [16]}, {"min_ar": 3.0, "ar_buckets": [0.0]})
    assert "directory[0]: resolutions: found 16" in found
    assert "directory[1]: min_ar 3.0 is larger" in found
    assert "directory[1]: ar_buckets: found 0.0" in found


@pytest.mark.parametrize(
    ("keys", "directory", "expected"),
    [
        (
            {"size_buckets": [[64, 64]], "resolutions": [512]},
            {},
            ["resolutions has no effect, because of size_buckets"],
        ),
        ({"size_buckets": [[64, 64]]}, {"min_ar": 0.6}, ["min_ar has no effect, because of size_buckets"]),
        ({"ar_buckets": [1.0], "min_ar": 0.6}, {}, ["min_ar has no effect, because of ar_buckets"]),
        ({"enable_ar_bucket": False}, {"ar_buckets": [1.0]}, ["ar_buckets has no effect, because of enable_ar_bucket"]),
        ({"cache_shuffle_delimiter": ";"}, {}, ["cache_shuffle_delimiter has no effect, because of cache_shuffle_num"]),
        (
            {"size_buckets": [[64, 64], [512, 512]]},
            {},
            ["size_buckets: [512, 512] is never used: [64, 64] has its aspect ratio"],
        ),
        ({"nl_weight": 0.7}, {}, ["nl_weight has no effect, because of caption_mode"]),
        (
            {"caption_mode": "nl", "cache_shuffle_num": 2, "replace_underscores": True, "nl_weight": 0.7},
            {},
            [
                f"{name} has no effect, because of caption_mode"
                for name in ("cache_shuffle_num", "replace_underscores", "nl_weight")
            ],
        ),
        ({"caption_mode": "mixed", "cache_shuffle_num": 2, "nl_weight": 0.7}, {}, []),
        ({"trigger_word": "x", "cache_shuffle_delimiter": ";"}, {}, []),
        (
            {"cache_shuffle_num": 2, "shuffle_tags": True, "keep_first_n_tags": 1, "tag_dropout": 0.1},
            {},
            ["shuffle_tags has no effect, because of cache_shuffle_num"],
        ),
        ({"keep_first_n_tags": 1}, {}, ["keep_first_n_tags has no effect, because of shuffle_tags"]),
        (
            {"shuffle_tags": True, "protected_tags": ["a"], "keep_first_n_tags": 1, "cache_shuffle_delimiter": ";"},
            {},
            ["protected_tags has no effect, because of tag_dropout"],
        ),
        ({}, {"role": "regularization", "trigger_word": "x"}, ["trigger_word has no effect, because of role"]),
        ({"trigger_word": "x"}, {"role": "regularization"}, []),
        ({"weight": 2.0}, {}, ["weight has no effect, because there is no other directory"]),
        ({"replace_underscores": True, "cache_shuffle_delimiter": ";"}, {}, []),
        ({"min_ar": 0.6}, {"ar_buckets": [1.0]}, []),  # may be meant for other directories
        ({"cache_shuffle_delimiter": ", ", "enable_ar_bucket": True}, {"size_buckets": [[64, 64]]}, []),  # the defaults
        ({"size_buckets": [[64, 64]], "resolutions": [1024], "protected_tags": []}, {}, []),  # lists at their defaults
        ({"resolutions": [512], "min_ar": 0.6, "cache_shuffle_num": 2, "cache_shuffle_delimiter": ";"}, {}, []),
    ],
)
def test_keys_without_effect_are_warned_of(keys: dict[str, object], directory: dict[str, object], expected: list[str]):
    dataset = settings(keys, directory)
    assert list(dataset.without_effect(0)) == [f"directory[0]: {text}" for text in expected]


def test_a_key_of_the_dataset_that_serves_one_directory_is_not_noted_for_another():
    dataset = settings({"protected_tags": ["a"]}, {"tag_dropout": 0.1}, {})
    assert [list(dataset.without_effect(index)) for index in range(2)] == [[], []]
    dataset = settings({}, {"tag_dropout": 0.1}, {"protected_tags": ["a"]})
    assert list(dataset.without_effect(1)) == ["directory[1]: protected_tags has no effect, because of tag_dropout"]


# Images


def test_every_image_goes_to_every_resolution(folder: Path):
    image(folder / "a.png", 90, 80)
    image(folder / "b.jpg", 80, 160)
    found = look(folder, resolutions=[64, 128], enable_ar_bucket=True, ar_buckets=[0.5, 1.0])
    assert [(s.id, s.resolution, s.size) for s in found.samples] == [
        ("0/a.png@64", 64, Size(64, 64)),
        ("0/a.png@128", 128, Size(128, 128)),
        ("0/b.jpg@64", 64, Size(48, 96)),
        ("0/b.jpg@128", 128, Size(96, 176)),
    ]
    assert found.num_images == 2
    assert found.warnings == []
    first = found.samples[0].picture
    assert (first.width, first.height, first.tags) == (90, 80, ("a cat",))
    assert first.sha256 == hashlib.sha256((folder / "a.png").read_bytes()).hexdigest()


def test_ids_hold_no_folder_and_are_distinct_where_a_folder_is_given_twice(folder: Path):
    image(folder / "a.png")
    dataset = settings(SQUARES, {"num_repeats": 1}, {"num_repeats": 3})
    found = scan(dataset, [folder] * 2, [None] * 2, [Cache(folder / CACHE_FOLDER)] * 2, 0, True)
    assert [sample.id for sample in found.samples] == ["0/a.png@64", "1/a.png@64"]
    assert [sample.options.num_repeats for sample in found.samples] == [1, 3]
    assert found.warnings == []  # meant, so no duplicate


def test_names_of_every_kind_work(folder: Path):
    wanted = ["a b.png", "猫.png", "é.jpg", "x" * 240 + ".png", "UPPER.PNG", "two.dots.png", "-dash.png", "#%$'.webp"]
    for name in wanted:
        image(folder / name, caption=f"caption of {name}")
    found = look(folder)
    assert sorted(names(found)) == sorted(wanted)
    assert captions(found) == {name: f"caption of {name}" for name in wanted}
    assert found.warnings == found.bad == []


def test_names_that_no_terminal_should_see_are_escaped_when_shown(folder: Path, opened: list[str]):
    image(Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")))
    image(folder / "\x1b[31mred.png")
    (folder / "\x1b]0;title\x07.png").write_text("not an image")
    found = look(folder)
    assert sorted(sample.id for sample in found.samples) == ["0/\\udcff.png@64", "0/\\x1b[31mred.png@64"]
    assert [line.isprintable() for line in listed(found.bad)] == [True]
    opened.clear()
    assert pictures(look(folder)) == pictures(found)
    assert {name for name in opened if name.endswith(".png")} == {"\x1b]0;title\x07.png"}  # the others are remembered


def test_files_that_are_no_images_are_skipped_with_their_reasons(folder: Path):
    image(folder / "good.png")
    (folder / "text.png").write_text("not an image")
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "half.png").write_bytes((folder / "good.png").read_bytes()[:300])
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "fifo.png")  # opening it would wait for ever
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "nothing.png").symlink_to(folder / "missing")
    found = look(folder)
    assert names(found) == ["good.png"]
    assert found.num_images == 8
    reasons = dict(line.split(": ", 1) for line in found.bad)
    assert {Path(path).name for path in reasons} == {
        "text.png", "zero.jpg", "half.png", "folder.png", "fifo.png", "loop.png", "nothing.png"
    }  # fmt: skip
    assert "text" in reasons[str(folder / "text.png")]
    assert "zero bytes" in reasons[str(folder / "zero.jpg")]
    assert "truncated" in reasons[str(folder / "half.png")]
    assert "a folder" in reasons[str(folder / "folder.png")]
    assert "a FIFO" in reasons[str(folder / "fifo.png")]
    assert "not readable" in reasons[str(folder / "loop.png")]


def test_a_symbolic_link_to_an_image_is_an_image(folder: Path, tmp_path: Path):
    image(tmp_path / "elsewhere" / "x.png", caption=None)
    (folder / "a.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    assert names(look(folder)) == ["a.png"]


def test_a_loop_of_folders_ends(folder: Path):
    image(folder / "a.png")
    (folder / "again").symlink_to(folder, target_is_directory=True)
    found = look(folder)
    assert names(found) == ["a.png"]
    assert "again" in the_warning(found, "subfolders, which are not searched: 1")


def test_folders_of_kohyas_scripts_name_the_key_that_reads_them(folder: Path):
    image(folder / "a.png")
    image(folder / "10_mia girl" / "b.png")
    (folder / "notes").mkdir()
    found = look(folder)
    assert "not searched; kohya_folders = true reads them: 1, such as 10_mia girl" in the_warning(
        found, "not searched;"
    )
    assert "which are not searched: 1, such as notes" in the_warning(found, "which are not")
    assert "kohya_folders = true counts them: 1, such as 10_mia girl" in the_warning(
        look(folder, recursive=True), "once;"
    )
    assert not any("kohya's" in warning for warning in look(folder, kohya_folders=True).warnings)


def test_folders_of_kohyas_scripts_are_seen_one_folder_deeper(folder: Path):
    for name in ("img/7_mia/a.png", "reg/1_girl/b.png", "log/c.png"):
        image(folder / name)
    found = look(folder)
    warning = the_warning(found, "kohya_folders = true, reads them")
    assert isinstance(warning, Listing)
    assert warning.entries == ("img", "reg")
    assert "not searched: 1, such as log" in the_warning(found, "which are not")


def test_a_path_that_is_such_a_folder_itself_names_the_number_and_the_name(folder: Path):
    image(folder / "10_mia girl" / "b.png")
    warning = the_warning(look(folder / "10_mia girl"), "kohya's")
    assert "num_repeats = 10 does the same here" in warning
    assert 'trigger_word = "mia girl"' in warning
    assert look(folder / "10_mia girl", num_repeats=10.0).warnings == []


def test_files_that_are_not_used_are_counted(folder: Path):
    image(folder / "a.png")
    for name in ("b.safetensors", "notes.json"):
        (folder / name).write_bytes(b"x")
    (folder / ".anima_cache").mkdir()
    assert "neither images nor captions, not used: 2, such as b.safeten" in the_warning(look(folder), "neither")


def test_hidden_files_and_leavings_of_other_systems_are_left_out(folder: Path):
    image(folder / "a.png")
    for name in (
        "._a.png",
        "._a.txt",
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
        ".hidden.webp",
        "ehthumbs.db",
        "Icon\r",
    ):
        (folder / name).write_bytes(b"\0\5\x16\7")
    for name in ("__MACOSX", "@eaDir", "$RECYCLE.BIN", ".git", "lost+found"):
        image(folder / name / "b.png")
    for recursive in (False, True):
        found = look(folder, recursive=recursive)
        assert (names(found), found.warnings, found.num_images) == (["a.png"], [], 1)


def test_pictures_of_formats_that_are_not_read_are_skipped_by_name(folder: Path):
    image(folder / "a.png")
    for name in ("IMG_1.HEIC", "b.jxl", "clip.mp4", "pbm.PPM", "raw.CR2", "tw.jpg_large"):
        (folder / name).write_bytes(b"x")
        (folder / name).with_suffix(".txt").write_text("a tag")
    found = look(folder)
    found.check(0.0)  # they are not damaged
    assert (names(found), found.num_images, found.warnings) == (["a.png"], 7, [])
    assert [line.removeprefix(f"{folder}/") for line in found.skipped] == [
        "IMG_1.HEIC: HEIC is not read; convert it to PNG, JPEG or WebP",
        "b.jxl: JXL is not read; convert it to PNG, JPEG or WebP",
        "clip.mp4: MP4 is not read; extract its frames as PNG or JPEG",
        "pbm.PPM: PPM is not read; convert it to PNG, JPEG or WebP",
        "raw.CR2: CR2 is not read; develop it to PNG, JPEG or WebP",
        "tw.jpg_large: JPG_LARGE is not read; rename it to .jpg or .png",
    ]


def test_masks_beside_their_images_are_masks_and_told(folder: Path):
    for name in ("a.png", "b.png", "c.png", "a_mask.png", "b-masklabel.png"):
        image(folder / name, caption=None if "mask" in name else "tag")
    image(folder / "c_mask.png", caption="the mask of an actor")  # has a caption, so it is a picture
    image(folder / "d_mask.png", caption=None)  # no mask of any other
    found = look(folder)
    masks = {sample.picture.path.name: sample.picture.mask and sample.picture.mask.name for sample in found.samples}
    expected = {"a.png": "a_mask.png", "b.png": "b-masklabel.png"}
    assert masks == {**dict.fromkeys(("c.png", "c_mask.png", "d_mask.png")), **expected}
    assert "used: 2, such as a_mask.png" in the_warning(found, "used: ")
    assert "trained as images, because they have captions: 1, such as c_mask.png" in the_warning(
        found, "named as masks"
    )


def test_masks_beside_images_may_be_named_in_capitals_and_one_of_several_is_used(folder: Path):
    for name in ("a.PNG", "b.png", "c.jpg"):
        image(folder / name)
    for name in ("a_MASK.PNG", "b-MaskLabel.png", "c_mask.png", "c-masklabel.png", "c_mask.webp"):
        image(folder / name, caption=None)
    found = look(folder)
    masks = {sample.picture.path.name: sample.picture.mask and sample.picture.mask.name for sample in found.samples}
    assert masks == {"a.PNG": "a_MASK.PNG", "b.png": "b-MaskLabel.png", "c.jpg": "c-masklabel.png"}
    warning = the_warning(found, "the image has another")
    assert isinstance(warning, Listing)
    assert warning.entries == ("c_mask.png", "c_mask.webp")


def test_a_text_of_more_than_a_mebibyte_is_no_caption(folder: Path):
    image(folder / "a.png", caption="cat, " * 209_715)
    image(folder / "b.png", caption="cat, " * 209_716)
    found = look(folder)
    assert names(found) == ["a.png"]
    assert found.bad == [f"{folder}/b.png: its caption b.txt: larger than 1.0 MiB, which is no caption"]


@pytest.mark.parametrize("again", [False, True])
def test_masks_that_leave_nothing_or_little_are_named(folder: Path, again: bool):
    white = {"a": (0, 0, 80, 80), "b": (0, 0, 0, 0), "c": (0, 0, 5, 5), "d": (0, 0, 10, 10)}
    for name, box in white.items():
        image(folder / f"{name}.png")
        mask = Image.new("L", (80, 80), 0)
        mask.paste(255, box)
        (folder / "masks").mkdir(exist_ok=True)
        mask.save(folder / "masks" / f"{name}.png")
    found = look(folder, masks=folder / "masks")
    if again:  # from the index
        found = look(folder, masks=folder / "masks")
    assert "nothing of them is trained (white is trained): 1, such as b.png" in the_warning(found, "all black")
    assert "leaves less than 1% of them to train: 1, such as c.png" in the_warning(found, "less than")


def test_a_damaged_mask_skips_its_image_at_the_scan(folder: Path):
    image(folder / "a.png")
    image(folder / "b.png")
    image(folder / "masks" / "b.png", caption=None)
    content = (folder / "masks" / "b.png").read_bytes()
    (folder / "masks" / "b.png").write_bytes(content[:300] + b"\0" + content[301:])
    found = look(folder, masks=folder / "masks")
    assert names(found) == ["a.png"]
    assert "its mask b.png: truncated or damaged" in found.bad[0]


def test_a_mask_folder_counts_before_masks_beside(folder: Path):
    image(folder / "a.png")
    image(folder / "a_mask.png", caption=None)
    image(folder / "masks" / "a.png", caption=None)
    (sample,) = look(folder, masks=folder / "masks").samples
    assert sample.picture.mask == folder / "masks" / "a.png"
    assert "not used, because of mask_path: 1" in the_warning(look(folder, masks=folder / "masks"), "beside")


def test_caption_files_are_read_like_txt(folder: Path):
    image(folder / "a.png", caption=None)
    (folder / "a.caption").write_text("one")
    image(folder / "b.png", caption="two")
    (folder / "b.caption").write_text("not this one")
    found = look(folder)
    assert captions(found) == {"a.png": "one", "b.png": "two"}
    assert "another differs in the ending only: 1, such as b.caption" in the_warning(found, "differs")


def test_the_mask_folder_is_no_stray_subfolder(folder: Path):
    image(folder / "a.png")
    image(folder / "masks" / "a.png", caption=None)
    assert look(folder, masks=folder / "masks").warnings == []


def test_small_images_are_skipped_with_the_reason(folder: Path):
    image(folder / "a.png", 64, 80)
    image(folder / "b.png", 63, 80)
    found = look(folder)
    assert names(found) == ["a.png"]
    assert found.skipped == [f"{folder / 'b.png'}: 63x80 is smaller than min_image_side = 64"]
    assert found.bad == []
    assert names(look(folder, min_image_side=1)) == ["a.png", "b.png"]


def test_extreme_images_are_skipped_at_every_resolution(folder: Path):
    image(folder / "a.png", 80, 80)
    image(folder / "b.png", 400, 80)
    # 5 : 1 cropped to 48x96 keeps a tenth, cropped to 208x48 (aspect 4.33) most of it; both resolutions must agree.
    found = look(folder, resolutions=[64, 128], enable_ar_bucket=True, ar_buckets=[0.5, 1.0], min_kept=0.25)
    assert names(found) == ["a.png", "a.png"]
    (line,) = found.skipped
    assert line.startswith(
        f"{folder / 'b.png'}: 400x80 is too far from every bucket: cropping to 64x64 would keep 20% of it"
    )
    assert names(look(folder, min_kept=0.2)) == ["a.png", "b.png"]


def test_an_image_of_which_just_min_kept_is_left_is_used(folder: Path):
    """In floating point 1001 x 364 in a square keeps a little less, and other sizes a little more, than their share."""
    for width, height, share in ((1001, 364, 364 / 1001), (300, 1000, 0.3), (1000, 70, 0.07), (490, 1000, 0.49)):
        image(folder / "a.png", width, height)
        kept = look(folder, resolutions=[64], enable_ar_bucket=False, min_kept=round(share, 2), min_image_side=1)
        assert names(kept) == (["a.png"] if share >= round(share, 2) else [])
    image(folder / "a.png", 2997, 1000)
    found = look(folder, resolutions=[64], enable_ar_bucket=False, min_kept=0.334)
    assert "would keep 33.3% of it (min_kept = 0.334)" in found.skipped[0]  # and not as much as that


def test_an_image_that_one_resolution_refuses_is_refused_by_all(folder: Path):
    image(folder / "a.png", 160, 80)
    # At 64 the sides are rounded to 96x48, exactly 2 : 1; at 80 to 112x64, which keeps 87.5 %.
    found = look(folder, resolutions=[64, 80], enable_ar_bucket=True, ar_buckets=[2.0], min_kept=0.9)
    assert found.samples == []
    assert len(found.skipped) == 1


def test_the_same_image_twice_is_a_warning(folder: Path):
    image(folder / "a.png")
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes())
    image(folder / "d.png")
    found = look(folder, resolutions=[64, 128])
    assert len(found.samples) == 8
    warning = the_warning(found, "more than once")
    assert warning.startswith("2 images are in the dataset more than once")
    assert f"{folder / 'b.png'}, which equals {folder / 'a.png'}" in warning


def test_the_same_image_in_two_directories_is_a_warning(tmp_path: Path):
    image(tmp_path / "one" / "a.png")
    image(tmp_path / "two" / "a.png")
    found = scan(
        settings(SQUARES, {}, {}),
        [tmp_path / "one", tmp_path / "two"],
        [None, None],
        [Cache(tmp_path / "one" / "c"), Cache(tmp_path / "two" / "c")],
        0,
        True,
    )
    assert "1 image is in the dataset more than once" in the_warning(found, "more than once")


def test_what_the_header_shows_is_warned_of_once_for_all_files(folder: Path):
    for name in ("a.png", "b.png", "c.png"):
        image(folder / name, format="JPEG")
    assert "named .png but holds JPEG: 3, such as a.png" in the_warning(look(folder), "JPEG")


# Subsampling


def test_a_subsample_has_the_right_size_and_is_stable(folder: Path):
    for number in range(20):
        image(folder / f"{number:02}.png", 64, 64, caption=None)
    chosen = names(look(folder, subsample_ratio=0.4))
    assert len(chosen) == 8
    assert chosen == sorted(chosen)
    assert names(look(folder, subsample_ratio=0.4, resolutions=[128])) == chosen
    assert set(names(look(folder, subsample_ratio=0.2))) < set(chosen)
    assert names(look(folder, subsample_ratio=0.4, seed=1)) != chosen
    assert len(names(look(folder, subsample_ratio=0.001))) == 1
    image(folder / "new.png", 64, 64, caption=None)
    assert len({*chosen} - {*names(look(folder, subsample_ratio=0.4))}) <= 1


# Captions


def test_captions_are_found_whatever_the_case_of_their_ending(folder: Path):
    image(folder / "a.png", caption=None)
    (folder / "a.TXT").write_text("upper")
    assert captions(look(folder)) == {"a.png": "upper"}


def test_a_prefix_stands_before_every_caption(folder: Path):
    image(folder / "a.png", caption="a cat")
    image(folder / "b.png", caption="")
    image(folder / "c.png", caption=None)
    found = look(folder, caption_prefix="my style, ")
    assert captions(found) == {"a.png": "my style, a cat", "b.png": "my style, ", "c.png": "my style, "}
    assert "trained with caption_prefix alone: 1, such as c.png" in the_warning(found, "without a .txt")
    assert "trained with caption_prefix alone: 1, such as b.png" in the_warning(found, "empty caption")


def test_missing_and_empty_captions_train_as_the_empty_one_with_a_warning(folder: Path):
    image(folder / "a.png")
    image(folder / "b.png", caption=None)
    image(folder / "c.png", caption=None)
    image(folder / "d.png", caption=" \n")
    found = look(folder)
    assert captions(found) == {"a.png": "a cat", "b.png": "", "c.png": "", "d.png": ""}
    assert "without a .txt caption, trained with the empty one: 2, such as b.png" in the_warning(found, "without")
    assert "with an empty caption, trained with the empty one: 1, such as d.png" in the_warning(found, "with an")


def test_missing_and_empty_captions_can_be_skipped(folder: Path):
    image(folder / "a.png")
    image(folder / "b.png", caption=None)
    image(folder / "c.png", caption="")
    found = look(folder, skip_empty_caption=True)
    assert names(found) == ["a.png"]
    assert found.skipped == [f"{folder / 'b.png'}: its caption is missing", f"{folder / 'c.png'}: its caption is empty"]
    assert found.warnings == found.bad == []


def test_missing_captions_can_be_an_error_for_all_folders_at_once(tmp_path: Path):
    for name in ("one", "two"):
        image(tmp_path / name / "a.png")
        for number in range(MAX_LISTED + 5):
            image(tmp_path / name / f"b{number:02}.png", 16, 16, caption=None)
    dataset = settings({**SQUARES, "missing_caption": "error"}, {}, {})
    with pytest.raises(DataError) as caught:
        scan(dataset, [tmp_path / "one", tmp_path / "two"], [None] * 2, [Cache(tmp_path / "c")] * 2, 0, True)
    for name in ("one", "two"):
        assert f"{tmp_path / name}: {MAX_LISTED + 5} images have no .txt caption" in str(caught.value)
        assert str(tmp_path / name / "b00.png") in str(caught.value)
    assert str(caught.value).count("... and 5 more") == 2


def test_an_empty_caption_is_not_a_missing_one(folder: Path):
    image(folder / "a.png", caption="")
    assert captions(look(folder, missing_caption="error")) == {"a.png": ""}


def test_a_caption_that_is_not_utf8_skips_its_image(folder: Path):
    image(folder / "a.png")
    image(folder / "b.png")
    (folder / "b.txt").write_bytes(b"caf\xe9")
    found = look(folder)
    assert names(found) == ["a.png"]
    assert found.bad == [f"{folder / 'b.png'}: its caption b.txt: not UTF-8 (byte 3 is 0xe9); save it as UTF-8"]


def test_a_caption_without_an_image_is_warned_of(folder: Path):
    image(folder / "a.png")
    (folder / "b.txt").write_text("no image")
    assert "captions without an image: 1, such as b.txt" in the_warning(look(folder), "without an image")


def test_text_that_is_a_special_token_is_warned_of(folder: Path):
    image(folder / "a.png", caption="a < b </b> <3 |x|")
    assert look(folder).warnings == []
    image(folder / "b.png", caption="a cat </s> and more")
    image(folder / "c.png", caption="<|im_end|>")
    assert "special token, as </s> is: 2, such as b.png" in the_warning(look(folder), "special")


def test_a_special_token_in_the_prefix_is_warned_of_without_captions_too(folder: Path):
    image(folder / "a.png", caption=None)
    assert "1, such as a.png" in the_warning(look(folder, caption_prefix="</s>"), "special token")
    assert "1, such as a.png" in the_warning(look(folder, trigger_word="<pad>"), "special token")


def test_images_that_differ_in_their_ending_share_a_caption_but_no_id(folder: Path):
    image(folder / "a.png", caption="shared")
    image(folder / "a.jpg", caption="shared")
    found = look(folder)
    assert [sample.id for sample in found.samples] == ["0/a.jpg@64", "0/a.png@64"]
    assert captions(found) == {"a.jpg": "shared", "a.png": "shared"}
    assert "share caption and mask, because their names differ in the ending only: 2" in the_warning(found, "share")


def test_of_two_captions_the_first_by_name_is_used_and_the_other_warned_of(folder: Path):
    image(folder / "a.png", caption="lower")
    (folder / "a.TXT").write_text("upper")
    found = look(folder)
    assert captions(found) == {"a.png": "upper"}
    assert "captions not used, because another differs in the ending only: 1, such as a.txt" in the_warning(
        found, "not used"
    )


def test_shuffled_captions_take_turns_and_every_resolution_shares_them(folder: Path):
    image(folder / "a.png", caption="1girl, solo, smile, sky, tree")
    found = look(folder, resolutions=[64, 128], cache_shuffle_num=3, caption_prefix="style, ")
    first, second = found.samples
    texts = first.captions(0)
    assert len(set(texts)) == 3
    assert all(text.startswith("style, ") and len(text.split(", ")) == 6 for text in texts)
    assert [first.caption(0, repeat).text for repeat in range(6)] == texts * 2
    assert second.captions(0) == texts
    assert first.captions(1) != texts


def test_without_shuffling_there_is_one_caption(folder: Path):
    image(folder / "a.png", caption="b, a")
    (sample,) = look(folder).samples
    assert sample.captions(0) == ["b, a"]
    assert sample.caption(0, 7).text == "b, a"


# Sub-folders


def test_sub_folders_are_searched_on_request_with_captions_and_masks_of_the_same_path(folder: Path, tmp_path: Path):
    image(folder / "a.png", caption="at the top")
    image(folder / "x" / "a.png", caption="in x")
    image(folder / "x" / "y" / "a.png", caption="in y")
    image(tmp_path / "masks" / "x" / "a.jpg", caption=None)
    found = look(folder, masks=tmp_path / "masks", recursive=True)
    assert {sample.id: sample.caption(0, 0).text for sample in found.samples} == {
        "0/a.png@64": "at the top",
        "0/x/a.png@64": "in x",
        "0/x/y/a.png@64": "in y",
    }
    assert [picture.mask for picture in pictures(found)] == [None, tmp_path / "masks" / "x" / "a.jpg", None]
    assert found.warnings[0] == f"{folder}: images without a mask, trained whole: 2, such as a.png"
    assert names(look(folder)) == ["a.png"]


def test_loops_of_links_end_and_every_folder_is_searched_once(folder: Path, tmp_path: Path):
    image(folder / "x" / "a.png")
    (folder / "x" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "z").symlink_to(folder / "x", target_is_directory=True)
    image(tmp_path / "elsewhere" / "b.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "nowhere").symlink_to(folder / "nowhere")
    found = look(folder, recursive=True)
    assert [sample.id for sample in found.samples] == ["0/link/b.png@64", "0/x/a.png@64"]
    assert "searched under another name, not searched again: 2, such as z" in the_warning(found, "again")


def test_hidden_folders_the_cache_and_the_masks_are_not_searched(folder: Path):
    image(folder / "a.png")
    for name in (".hidden", ".anima_cache", "masks", "my_cache"):
        image(folder / "x" / name / "b.png")
        image(folder / name / "b.png")
    keys = {**SQUARES, "recursive": True}
    cache = Cache(folder / "x" / "my_cache")
    found = scan(settings(keys), [folder], [folder / "x" / "masks"], [cache], 0, True)
    assert [sample.id for sample in found.samples] == ["0/a.png@64", "0/masks/b.png@64", "0/my_cache/b.png@64"]


def test_files_below_each_other_are_remembered_apart(folder: Path, opened: list[str]):
    image(folder / "a.png", 90, 70)
    image(folder / "x" / "a.png", 70, 90)
    first = look(folder, recursive=True)
    opened.clear()
    assert pictures(look(folder, recursive=True)) == pictures(first)
    assert "a.png" not in opened
    assert [picture.width for picture in pictures(first)] == [90, 70]


def test_orders_of_tags_differ_between_files_of_the_same_name(folder: Path):
    for name in ("a.png", "x/a.png"):
        image(folder / name, caption="1girl, solo, smile, sky, tree")
    first, second = look(folder, recursive=True, cache_shuffle_num=3).samples
    assert first.captions(0) != second.captions(0)


def test_kohya_folders_multiply_num_repeats(folder: Path):
    for name in ("a.png", "10_cat/b.png", "3_dog/c.png", "plain/d.png", "0_none/e.png", "20240131_trip/f.png"):
        image(folder / name)
    image(folder / "10_cat" / "deep" / "g.png")
    found = look(folder, kohya_folders=True, num_repeats=0.1)
    repeats = {sample.id: sample.options.num_repeats for sample in found.samples}
    assert repeats == {"0/10_cat/b.png@64": 1.0, "0/3_dog/c.png@64": 0.3, "0/a.png@64": 0.1}  # 3 * 0.1 is more
    assert "not searched: 4, such as 0_none" in the_warning(found, "subfolders")
    deep = look(folder, kohya_folders=True, recursive=True)
    assert {sample.id: sample.options.num_repeats for sample in deep.samples} == {
        "0/0_none/e.png@64": 1,
        "0/10_cat/b.png@64": 10,
        "0/10_cat/deep/g.png@64": 10,
        "0/20240131_trip/f.png@64": 1,
        "0/3_dog/c.png@64": 3,
        "0/a.png@64": 1,
        "0/plain/d.png@64": 1,
    }
    assert deep.warnings == []


def test_numbers_in_folder_names_mean_nothing_unless_asked_for(folder: Path):
    image(folder / "10_cat" / "b.png")
    assert [sample.options.num_repeats for sample in look(folder, recursive=True).samples] == [1]


# captions.json and several captions


def captions_json(folder: Path, content: object) -> Path:
    path = folder / "captions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_captions_json_wins_over_txt_files_and_the_rest_is_warned_of(folder: Path):
    image(folder / "a.png", caption="from a.txt")
    image(folder / "b.png", caption="from b.txt")
    image(folder / "c.png", caption=None)
    captions_json(folder, {"a.png": " from json\r\n", "c.png": "", "gone.png": "x", "x/b.png": "y"})
    found = look(folder)
    assert captions(found) == {"a.png": "from json", "b.png": "from b.txt", "c.png": ""}
    assert found.warnings == [
        f"{folder}: images with an empty caption, trained with the empty one: 1, such as c.png",
        f"{folder}: entries of captions.json without an image: 2, such as gone.png",
        f"{folder}: captions in .txt files not used, because captions.json has them: 1, such as a.txt",
    ]


def test_every_folder_may_have_its_captions_json(folder: Path):
    image(folder / "a.png", caption=None)
    image(folder / "x" / "a.png", 90, 70, caption=None)
    captions_json(folder, {"a.png": "top"})
    captions_json(folder / "x", {"a.png": "below"})
    found = look(folder, recursive=True)
    assert [sample.caption(0, 0).text for sample in found.samples] == ["top", "below"]
    assert found.warnings == []


def test_bad_captions_json_are_errors_with_line_and_column_for_all_folders_at_once(folder: Path):
    image(folder / "a.png")
    image(folder / "x" / "a.png")
    captions_json(folder, '{"a.png": "good",\n "b.png" "bad"}')
    captions_json(folder / "x", {"a.png": 3})
    with pytest.raises(DataError) as caught:
        look(folder, recursive=True)
    first, second = caught.value.problems
    assert first.startswith(f"{folder / 'captions.json'}: not JSON (line 2, column 10: ")
    assert second.startswith(f'{folder / "x" / "captions.json"}: "a.png": expected')


def test_several_captions_take_turns_and_each_is_shuffled(folder: Path):
    image(folder / "a.png", caption=None)
    captions_json(folder, {"a.png": ["one, two, three, four", "five, six, seven, eight, nine"]})
    (sample,) = look(folder).samples
    assert [sample.caption(0, repeat).text for repeat in range(4)] == sample.captions(0) * 2
    assert sample.captions(0) == ["one, two, three, four", "five, six, seven, eight, nine"]
    (sample,) = look(folder, cache_shuffle_num=3).samples
    texts = sample.captions(0)
    assert len(set(texts)) == 6
    assert [sorted(text.split(", ")) for text in texts] == [
        sorted(["one", "two", "three", "four"]),
        sorted(["five", "six", "seven", "eight", "nine"]),
    ] * 3
    assert [sample.caption(0, repeat).text for repeat in range(12)] == texts * 2


def test_the_orders_of_the_first_caption_do_not_depend_on_the_others(folder: Path):
    image(folder / "a.png", caption="one, two, three, four")
    (alone,) = look(folder, cache_shuffle_num=3).samples
    captions_json(folder, {"a.png": ["one, two, three, four", "five, six"]})
    (sample,) = look(folder, cache_shuffle_num=3).samples
    assert sample.captions(0)[::2] == alone.captions(0)


def test_lines_are_captions_on_request(folder: Path):
    image(folder / "a.png", caption="a cat\n\n  on a mat \n")
    image(folder / "b.png", caption="\n \n")
    first, second = look(folder, captions_per_line=True).samples
    assert first.captions(0) == ["a cat", "on a mat"]
    assert second.captions(0) == [""]
    assert look(folder).samples[0].captions(0) == ["a cat\n\n  on a mat"]


# Natural language


@pytest.fixture
def bilingual(folder: Path) -> Path:
    """A folder with an image that has both kinds of captions, and one of each other kind."""
    for name, tags, natural in (
        ("both", "a, b", "A b."),
        ("nl", None, "Only nl."),
        ("tags", "t", None),
        ("z", None, None),
    ):
        image(folder / f"{name}.png", caption=tags)
        if natural is not None:
            (folder / f"{name}_nl.txt").write_text(natural)
    return folder


def test_natural_language_alone(bilingual: Path):
    found = look(bilingual, caption_mode="nl", caption_prefix="art, ", cache_shuffle_num=2)
    assert captions(found) == {
        "both.png": "art, A b.",
        "nl.png": "art, Only nl.",
        "tags.png": "art, ",
        "z.png": "art, ",
    }
    (warning,) = found.warnings
    assert "without a _nl.txt caption, trained with caption_prefix alone: 2, such as tags.png" in warning
    with pytest.raises(DataError, match=r"2 images have no _nl\.txt caption"):
        look(bilingual, caption_mode="nl", missing_caption="error")
    assert names(look(bilingual, caption_mode="nl", skip_empty_caption=True)) == ["both.png", "nl.png"]


def test_tags_alone_leave_natural_language_out_with_a_warning(bilingual: Path):
    found = look(bilingual)
    assert captions(found) == {"both.png": "a, b", "nl.png": "", "tags.png": "t", "z.png": ""}
    assert "not used" in the_warning(found, "natural-language captions (_nl.txt)")
    assert "2, such as both_nl.txt" in the_warning(found, "natural-language captions (_nl.txt)")


def test_mixed_falls_back_to_the_kind_there_is_with_a_count(bilingual: Path):
    found = look(bilingual, caption_mode="mixed")
    texts = {sample.picture.path.name: sample.captions(0) for sample in found.samples}
    assert texts == {"both.png": ["a, b", "A b."], "nl.png": ["Only nl."], "tags.png": ["t"], "z.png": [""]}
    for sample in found.samples:
        assert {sample.caption(0, repeat).text for repeat in range(10)} == set(sample.captions(0))
    assert "trained with their tags alone: 1, such as tags.png" in the_warning(found, "without a natural-language")
    assert "caption (_nl.txt) alone: 1, such as nl.png" in the_warning(found, "images without tags")
    assert "trained with the empty one: 1, such as z.png" in the_warning(found, "without a .txt or _nl.txt caption")
    with pytest.raises(DataError, match=r"1 image has no \.txt or _nl\.txt caption"):
        look(bilingual, caption_mode="mixed", missing_caption="error")


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 0.75, 1.0])
def test_each_image_keeps_the_share_of_natural_language_and_so_does_each_epoch(folder: Path, weight: float):
    for number in range(200):
        image(folder / f"{number:03}.png", 64, 64, caption="t")
        (folder / f"{number:03}_nl.txt").write_text("N")
    samples = look(folder, caption_mode="mixed", nl_weight=weight).samples
    shown = [[sample.caption(0, repeat).text for repeat in range(40)] for sample in samples]
    assert all(abs(texts.count("N") - 40 * weight) < 1 for texts in shown)
    for repeat in range(3):
        # The phases are independent and uniform: the standard deviation is at most sqrt(200) / 2 = 7.
        assert abs(sum(texts[repeat] == "N" for texts in shown) - 200 * weight) < 30
    assert {text for texts in shown for text in texts} == set(samples[0].captions(0))


def test_both_kinds_take_turns_through_all_their_texts(folder: Path):
    image(folder / "a.png", caption="one, two, three, four\nfive, six, seven, eight")
    (folder / "a_nl.txt").write_text("First.\nSecond.\nThird.")
    found = look(
        folder, resolutions=[64, 128], caption_mode="mixed", nl_weight=0.4, captions_per_line=True, cache_shuffle_num=3
    )
    sample, other = found.samples
    shown = [sample.caption(5, repeat).text for repeat in range(300)]
    natural = [text for text in shown if text.endswith(".")]
    tags = [text for text in shown if not text.endswith(".")]
    assert natural[:6] == ["First.", "Second.", "Third."] * 2
    assert len(set(tags[:6])) == 6
    assert tags[:12] == tags[:6] * 2
    assert len(natural) == 120
    assert set(shown) == set(sample.captions(5))
    assert len(sample.captions(5)) == 9
    assert shown == [other.caption(5, repeat).text for repeat in range(300)]
    assert shown != [sample.caption(6, repeat).text for repeat in range(300)]


def test_an_image_named_like_a_natural_language_caption_keeps_its_tags(folder: Path):
    image(folder / "a.png", caption="tags of a")
    image(folder / "a_nl.png", caption="tags of a_nl")
    found = look(folder, caption_mode="mixed")
    assert captions(found) == {"a.png": "tags of a", "a_nl.png": "tags of a_nl"}


def test_a_natural_language_caption_without_an_image_is_warned_of(folder: Path):
    image(folder / "a.png")
    (folder / "b_nl.txt").write_text("x")
    for mode in ("tags", "nl", "mixed"):
        found = look(folder, caption_mode=mode, missing_caption="empty")
        assert "captions without an image: 1, such as b_nl.txt" in the_warning(found, "without an image")


def test_a_natural_language_caption_that_is_not_utf8_skips_its_image(folder: Path):
    image(folder / "a.png")
    (folder / "a_nl.txt").write_bytes(b"caf\xe9")
    assert look(folder, caption_mode="mixed").bad[0].startswith(f"{folder / 'a.png'}: its caption a_nl.txt: not UTF-8")
    assert look(folder).bad == []


# Trigger word and underscores


def test_the_trigger_word_comes_first_of_all_and_only_where_there_is_a_caption(folder: Path):
    for name, text in (("a", "cat, dog"), ("b", ""), ("c", "ohwx, cat"), ("d", "ohwx"), ("e", "ohwxy, cat")):
        image(folder / f"{name}.png", caption=text)
    image(folder / "f.png", caption=None)
    assert captions(look(folder, trigger_word="ohwx", caption_prefix="art, ")) == {
        "a.png": "ohwx, art, cat, dog",
        "b.png": "art, ",
        "c.png": "ohwx, art, cat",
        "d.png": "ohwx, art, ",
        "e.png": "ohwx, art, ohwxy, cat",
        "f.png": "art, ",
    }
    assert captions(look(folder, trigger_word="ohwx"))["d.png"] == "ohwx"


def test_the_trigger_word_is_not_shuffled_and_stands_before_natural_language_too(folder: Path):
    image(folder / "a.png", caption="my_cat; one; two; three; four")
    (folder / "a_nl.txt").write_text("A my_cat.")
    keys = {"cache_shuffle_num": 4, "cache_shuffle_delimiter": "; ", "replace_underscores": True}
    (sample,) = look(folder, caption_mode="mixed", trigger_word="my_cat", **keys).samples
    *tags, natural = sample.captions(0)
    assert natural == "my_cat; A my_cat."
    assert len(set(tags)) == 4
    for text in tags:
        first, *rest = text.split("; ")
        assert first == "my_cat"
        assert sorted(rest) == ["four", "one", "three", "two"]


def test_underscores_become_spaces_on_request(folder: Path):
    image(folder / "a.png", caption="long_hair, ^_^, score_7")
    assert captions(look(folder)) == {"a.png": "long_hair, ^_^, score_7"}
    replaced = look(folder, replace_underscores=True, caption_prefix="my_style, ")
    assert captions(replaced) == {"a.png": "my_style, long hair, ^_^, score_7"}


def test_every_new_key_can_be_set_per_directory(folder: Path, tmp_path: Path):
    image(folder / "a.png", caption="big_cat\nd")
    image(folder / "2_x" / "a.png", caption="big_cat\nd")
    keys = {"recursive": True, "captions_per_line": True, "trigger_word": "w", "replace_underscores": True}
    dataset = settings({**SQUARES, "kohya_folders": True}, keys, {"kohya_folders": False})
    found = scan(dataset, [folder] * 2, [None] * 2, [Cache(tmp_path / "c")] * 2, 0, True)
    assert [(sample.id, sample.options.num_repeats, sample.captions(0)) for sample in found.samples] == [
        ("0/2_x/a.png@64", 2, ["w, big cat", "w, d"]),
        ("0/a.png@64", 1, ["w, big cat", "w, d"]),
        ("1/a.png@64", 1, ["big_cat\nd"]),
    ]


# Masks


def test_masks_are_found_by_stem_with_any_ending(folder: Path, tmp_path: Path):
    image(folder / "a.png")
    image(folder / "b.jpg")
    image(folder / "c.png")
    masks = tmp_path / "masks"
    image(masks / "a.jpg", caption=None)
    image(masks / "b.WEBP", caption=None)
    image(masks / "stray.png", caption=None)
    found = look(folder, masks=masks)
    assert [picture.mask for picture in pictures(found)] == [masks / "a.jpg", masks / "b.WEBP", None]
    assert pictures(found)[0].mask_sha256 == hashlib.sha256((masks / "a.jpg").read_bytes()).hexdigest()
    assert pictures(found)[2].mask_sha256 == ""
    assert found.warnings == [f"{folder}: images without a mask, trained whole: 1, such as c.png"]


def test_a_bad_mask_skips_its_image(folder: Path, tmp_path: Path):
    image(folder / "a.png")
    image(folder / "b.png")
    image(tmp_path / "masks" / "a.png", caption=None)
    (tmp_path / "masks" / "b.png").write_text("not an image")
    found = look(folder, masks=tmp_path / "masks")
    assert names(found) == ["a.png"]
    (line,) = found.bad
    assert line.startswith(f"{folder / 'b.png'}: its mask b.png: not an image")


def test_of_two_masks_the_first_by_name_is_used_and_the_other_warned_of(folder: Path, tmp_path: Path):
    image(folder / "a.png")
    image(tmp_path / "masks" / "a.png", caption=None)
    image(tmp_path / "masks" / "a.jpg", caption=None)
    found = look(folder, masks=tmp_path / "masks")
    assert found.samples[0].picture.mask == tmp_path / "masks" / "a.jpg"
    assert "1, such as a.png" in the_warning(found, "masks not used")


# Too many bad ones, or none at all


def test_too_many_bad_images_stop_with_all_of_them_listed(folder: Path):
    for number in range(8):
        image(folder / f"good{number}.png")
    for number in range(2):
        (folder / f"bad{number}.png").write_text("not an image")
    found = look(folder)
    found.check(0.2)  # a fifth is allowed
    with pytest.raises(DataError) as caught:
        found.check(0.19)
    text = str(caught.value)
    assert "2 images of 10 cannot be used (20.0%, more than max_bad_fraction = 0.19)" in text
    assert all(f"bad{number}.png: not an image" in text for number in range(2))


def test_long_lists_are_cut_with_the_number_left():
    lines = [f"line {number}" for number in range(MAX_LISTED + 3)]
    assert listed(lines) == [*lines[:MAX_LISTED], "... and 3 more"]
    assert listed(lines[:MAX_LISTED]) == lines[:MAX_LISTED]


def test_images_that_a_setting_leaves_out_do_not_count_as_bad(folder: Path):
    image(folder / "a.png")
    image(folder / "b.png", 20, 20)
    look(folder).check(0.0)


def test_an_empty_folder_is_an_error_that_names_it(folder: Path):
    (folder / "a.xyz").write_bytes(b"x")
    with pytest.raises(DataError, match="no image is left to train on") as caught:
        look(folder).check(1.0)
    assert str(folder) in str(caught.value)
    assert "a.xyz" in str(caught.value)


def test_a_folder_whose_images_are_all_skipped_is_an_error_with_the_reasons(folder: Path):
    image(folder / "a.png", 20, 20)
    (folder / "b.png").write_text("not an image")
    with pytest.raises(DataError, match="no image is left to train on") as caught:
        look(folder).check(1.0)
    assert "min_image_side" in str(caught.value)
    assert "b.png: not an image" in str(caught.value)


def test_a_folder_without_an_image_beside_one_with_images_is_warned_of(folder: Path, tmp_path: Path):
    image(folder / "a.png")
    (tmp_path / "empty").mkdir()
    found = scan(
        settings(SQUARES, {}, {}), [folder, tmp_path / "empty"], [None] * 2, [Cache(tmp_path / "c")] * 2, 0, True
    )
    assert str(tmp_path / "empty") in the_warning(found, "holds no image")


def test_folders_that_cannot_be_listed_are_named_together(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError) as caught:
        scan(
            settings(SQUARES, {}, {}),
            [tmp_path / "file", tmp_path / "gone"],
            [None] * 2,
            [Cache(tmp_path / "c")] * 2,
            0,
            True,
        )
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        str(tmp_path / n) for n in ("file", "gone")
    ]


# The memory of file facts


def test_a_second_scan_opens_no_image_and_no_mask(folder: Path, tmp_path: Path, opened: list[str]):
    image(folder / "a.png", 90, 70)
    image(folder / "b.png", format="JPEG")
    image(tmp_path / "masks" / "a.png", caption=None)
    first = look(folder, masks=tmp_path / "masks")
    assert {"a.png", "b.png"} <= set(opened)
    opened.clear()
    second = look(folder, masks=tmp_path / "masks")
    assert [name for name in opened if name.endswith(".png")] == []
    assert "a.txt" in opened  # captions are read each time
    assert pictures(second) == pictures(first)
    assert second.warnings == first.warnings


def test_a_changed_image_is_looked_at_again(folder: Path, opened: list[str]):
    image(folder / "a.png", 90, 70)
    image(folder / "b.png")
    look(folder)
    opened.clear()
    image(folder / "a.png", 70, 90)
    picture = look(folder).samples[0].picture
    assert (picture.width, picture.height) == (70, 90)
    assert picture.sha256 == hashlib.sha256((folder / "a.png").read_bytes()).hexdigest()
    assert "b.png" not in opened


def test_a_replaced_image_with_the_size_and_time_of_the_old_one_is_noticed(folder: Path):
    path = image(folder / "a.png")
    look(folder)
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    while path.stat().st_ctime_ns == status.st_ctime_ns:  # the clock of files ticks a few hundred times a second
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert path.stat().st_size == status.st_size
    assert look(folder).samples[0].picture.sha256 == hashlib.sha256(content).hexdigest()


def test_a_bad_image_is_looked_at_until_it_is_repaired(folder: Path):
    image(folder / "a.png")
    (folder / "b.png").write_text("not an image")
    assert len(look(folder).bad) == len(look(folder).bad) == 1
    image(folder / "b.png")
    assert names(look(folder)) == ["a.png", "b.png"]


def memo_files(folder: Path) -> list[Path]:
    return sorted((folder.parent / "cache").glob("images_*.json"))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"null", b'{"a.png": null}', b'{"a.png": [1, 2, 3]}'])
def test_a_damaged_memory_is_ignored_and_replaced(folder: Path, content: bytes):
    image(folder / "a.png")
    expected = pictures(look(folder))
    (memo,) = memo_files(folder)
    good = memo.read_bytes()
    memo.write_bytes(content)
    assert pictures(look(folder)) == expected
    assert memo.read_bytes() == good


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: {"sha256": entry[3]},  # another shape
        lambda entry: entry[:2] + entry[3:],  # without a time
        lambda entry: [*entry, "more"],
        lambda entry: [*entry[:4], "wide", *entry[5:]],
    ],
)
def test_a_memory_of_another_shape_is_ignored(folder: Path, change):
    image(folder / "a.png")
    expected = pictures(look(folder))
    (memo,) = memo_files(folder)
    entries = json.loads(memo.read_bytes().partition(b"\n")[2])
    content = json.dumps({name: change(entry) for name, entry in entries.items()}).encode()
    memo.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    assert pictures(look(folder)) == expected


def test_no_flipped_bit_of_the_memory_is_believed(folder: Path):
    image(folder / "a.png")
    expected = pictures(look(folder))
    (memo,) = memo_files(folder)
    good = memo.read_bytes()
    for place in range(0, len(good), 3):
        memo.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert pictures(look(folder)) == expected


def test_only_the_process_that_may_write_does(folder: Path):
    image(folder / "a.png")
    look(folder, write=False)
    assert memo_files(folder) == []


def test_a_memory_that_cannot_be_written_is_a_warning(folder: Path, tmp_path: Path):
    image(folder / "a.png")
    (tmp_path / "cache").write_text("a file where the cache should be")
    found = look(folder)
    assert names(found) == ["a.png"]
    assert str(tmp_path / "cache") in the_warning(found, "read the images again")


def test_folders_with_one_cache_keep_apart_what_they_remember(tmp_path: Path, opened: list[str]):
    cache = Cache(tmp_path / "cache")
    folders = [tmp_path / "one", tmp_path / "two"]
    for width, folder in zip((80, 90), folders, strict=True):
        image(folder / "a.png", width, 80)
    for _ in range(2):
        opened.clear()
        found = scan(settings(SQUARES, {}, {}), folders, [None] * 2, [cache] * 2, 0, True)
        assert [sample.picture.width for sample in found.samples] == [80, 90]
    assert "a.png" not in opened


def test_printable_keeps_letters_and_escapes_the_rest():
    assert printable("a 猫 é 🐈") == "a 猫 é 🐈"
    assert printable("\x1b[0m\n\udcff\u202e") == "\\x1b[0m\\n\\udcff\\u202e"


# Sizes, shares and roles


def test_without_enlarging_small_images_get_smaller_buckets_of_the_same_aspect(folder: Path):
    for name, size in {"big": (300, 300), "small": (100, 100), "wide": (150, 75)}.items():
        image(folder / f"{name}.png", *size)
    found = look(folder, resolutions=[128, 256], enable_ar_bucket=True, num_ar_buckets=3, no_upscale=True)
    sizes: dict[str, list[str]] = {}
    for sample in found.samples:
        assert sample.size.width <= sample.picture.width
        assert sample.size.height <= sample.picture.height
        sizes.setdefault(sample.picture.path.stem, []).append(str(sample.size))
    assert sizes == {"big": ["128x128", "256x256"], "small": ["96x96"], "wide": ["144x64"]}
    assert len({sample.id for sample in found.samples}) == 4
    # A size that is a bucket of another resolution is of that bucket: they share batches.
    image(folder / "same.png", 140, 140)
    joined = look(folder, resolutions=[128, 256], enable_ar_bucket=True, num_ar_buckets=3, no_upscale=True)
    assert {sample.resolution for sample in joined.samples if str(sample.size) == "128x128"} == {128}
    assert [sample.resolution for sample in found.samples] == [128, 256, 96, 96]


def test_images_that_are_large_enough_are_the_same_with_and_without_no_upscale(folder: Path):
    """Noise, t and order are drawn for the names of samples."""
    for name, size in {"large": (400, 300), "small": (100, 90)}.items():
        image(folder / f"{name}.png", *size)
    with_it, without = (
        {sample.id: sample.size for sample in look(folder, resolutions=[64, 128], no_upscale=value).samples}
        for value in (True, False)
    )
    assert {name for name in without if name.startswith("0/large")} <= with_it.keys()
    assert all(size == without[name] for name, size in with_it.items() if name in without)
    assert [name for name in with_it if name not in without] == ["0/small.png@80x80"]


def test_enlarging_is_the_default(folder: Path):
    image(folder / "a.png", 100, 100)
    assert [str(sample.size) for sample in look(folder, resolutions=[128, 256]).samples] == ["128x128", "256x256"]


def test_images_that_fit_no_bucket_unenlarged_are_skipped(folder: Path):
    image(folder / "a.png", 100, 12)
    image(folder / "b.png")
    found = look(folder, no_upscale=True, min_image_side=1, min_kept=0)
    assert found.skipped == [f"{folder / 'a.png'}: 100x12 has a side below 16 pixels (no_upscale)"]


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.2, 0.8), (1, 7.5)])
def test_weights_are_shares_of_what_is_seen_in_as_long_an_epoch(tmp_path: Path, weights: tuple[float, float]):
    folders = []
    for name, number in (("a", 7), ("b", 20)):
        for index in range(number):
            image(tmp_path / name / f"{name}{index}.png")
        folders.append(tmp_path / name)
    tables = [{"weight": weight, "num_repeats": repeats} for weight, repeats in zip(weights, (1, 2), strict=True)]
    dataset = settings(dict(SQUARES), *tables)
    found = scan(dataset, folders, [None, None], [Cache(tmp_path / "cache")] * 2, 0, False)
    plan = Plan(found.samples, 0, 1, 1)
    num_epochs = 40
    epochs = [plan.refs_by_bucket(epoch) for epoch in range(num_epochs)]
    per_image = Counter(draw.sample for buckets in epochs for draws in buckets.values() for draw in draws)
    seen: Counter[int] = Counter()
    for index, number in per_image.items():
        seen[found.samples[index].directory] += number
    total = (7 + 2 * 20) * num_epochs
    assert abs(seen[0] + seen[1] - total) <= 2
    assert abs(seen[0] - total * weights[0] / sum(weights)) <= 2
    for directory in (0, 1):
        counts = [per_image[index] for index, sample in enumerate(found.samples) if sample.directory == directory]
        assert max(counts) - min(counts) <= 1


def test_a_weight_for_some_directories_only_is_refused():
    kept = {"role": "regularization"}
    expected = 'has no weight, but another has; give one to all, to none, or to those with role = "regularization"'
    for tables in ([{"weight": 1}, {}], [{"weight": 0.2, **kept}, kept, {}], [{"weight": 1}, kept]):
        assert f"directory[1]: {expected}" in problems({}, *tables)
    assert "the weights of regularization directories are shares of all samples; their sum must be below 1" in problems(
        {}, {}, {"weight": 0.5, **kept}, {"weight": 0.5, **kept}
    )


def test_captions_that_cannot_be_told_apart_into_tags_are_warned_of(folder: Path):
    image(folder / "a.png", caption="1girl,solo,smile")
    image(folder / "b.png", caption="one")
    for keys in ({"shuffle_tags": True}, {"cache_shuffle_num": 2}, {"tag_dropout": 0.1}):
        assert "none of which holds cache_shuffle_delimiter ', '" in the_warning(look(folder, **keys), "delimiter")
    assert not any("delimiter" in warning for warning in look(folder).warnings)
    assert not any(
        "delimiter" in line for line in look(folder, shuffle_tags=True, cache_shuffle_delimiter=",").warnings
    )


def test_prompt_escapes_in_captions_are_warned_of(folder: Path):
    image(folder / "a.png", caption=r"saber_\(fate\)")
    assert "which belong in prompts; unescape_parentheses writes ( and ): 1" in the_warning(look(folder), "prompts")
    found = look(folder, unescape_parentheses=True)
    assert captions(found) == {"a.png": "saber_(fate)"}
    assert not any("prompts" in warning for warning in found.warnings)


def test_transparent_images_are_known_from_their_header(folder: Path):
    Image.new("RGBA", (80, 80), (1, 2, 3, 0)).save(folder / "a.png")
    image(folder / "b.png")
    found = look(folder, alpha_as_mask=True)
    assert [sample.has_mask for sample in found.samples] == [True, False]


@pytest.mark.parametrize(
    ("keys", "own", "shares"),
    [
        ({}, {}, (3, Fraction(3, 4))),  # a fifth of all
        ({"num_repeats": 4}, {}, (12, 3)),
        ({}, {"num_repeats": 2}, (3, 4)),
        ({}, {"kohya_folders": True}, (3, 2)),
        ({"weight": 1}, {}, (Fraction(5, 2), Fraction(5, 2))),
        ({}, {"weight": 0.4}, (3, 2)),
        ({}, {"weight": 0.4, "num_repeats": 5}, (3, 2)),
    ],
)
def test_images_for_regularization_are_a_fifth_unless_a_key_says_how_often(tmp_path, keys, own, shares):
    folders = [tmp_path / "train", tmp_path / "kept"]
    for folder, number in zip(folders, (3, 2), strict=True):
        folder.mkdir()
        for each in range(number):
            image(folder / f"{folder.name}{each}.png", caption="a")
    dataset = settings({**SQUARES, **keys}, {}, {"role": "regularization", **own})
    caches = [Cache(tmp_path / "cache")] * 2
    samples = scan(dataset, folders, [None, None], caches, 0, write=False).samples
    seen = [sum(each.repeats for each in samples if each.directory == index) for index in (0, 1)]
    assert tuple(seen) == shares
    if not keys and not own:
        assert seen[1] / sum(seen) == Fraction(1, 5)


def test_a_directory_for_regularization_without_samples_takes_no_share(tmp_path):
    folders = [tmp_path / name for name in ("train", "kept", "damaged")]
    for folder, number in zip(folders, (10, 4, 2), strict=True):
        folder.mkdir()
        for each in range(number):
            image(folder / f"{folder.name}{each}.png", caption="a")
    for path in folders[2].glob("*.png"):
        path.write_bytes(b"no image")
    kept = {"role": "regularization"}
    dataset = settings(dict(SQUARES), {}, {"weight": 0.2, **kept}, {"weight": 0.3, **kept})
    samples = scan(dataset, folders, [None] * 3, [Cache(tmp_path / "cache")] * 3, 0, write=False).samples
    seen = [sum(each.repeats for each in samples if each.directory == index) for index in (0, 1, 2)]
    assert seen == [10, Fraction(5, 2), 0]
