"""The caption and the view of each repeat of a sample, as functions of seed, picture and number."""

from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from anima_train.data.buckets import Size
from anima_train.data.cache import Cache, entry_key
from anima_train.data.samples import Caption, Picture, Sample, View
from anima_train.data.settings import DirectoryOptions

TAGS = "1girl, solo, long_hair, blue_eyes, smile, @artist, saber_\\(fate\\)"
LIST = TAGS.split(", ")


def sample(
    captions: tuple[str, ...] = (TAGS,), natural: tuple[str, ...] = (), name: str = "a.png",
    side: tuple[int, int] = (64, 96), alpha: bool = False, mask: str = "", **options: object,
) -> Sample:  # fmt: skip
    picture = Picture(
        Path(name), Path(name), "hash", *side, captions, natural, Path("m.png") if mask else None, mask, alpha
    )
    return Sample(f"0/{name}@40", picture, Size(32, 48), 40, 0, DirectoryOptions(**options), Cache(Path("unused")))  # type: ignore[arg-type]


def texts(drawn: Sample, number: int, seed: int = 0) -> list[str]:
    return [drawn.caption(seed, repeat).text for repeat in range(number)]


# Captions drawn anew for each repeat


def test_shuffled_tags_are_drawn_anew_for_every_repeat_and_are_not_cached():
    drawn = sample(shuffle_tags=True)
    captions = [drawn.caption(0, repeat) for repeat in range(20)]
    assert not any(caption.is_fixed for caption in captions)
    assert len({caption.text for caption in captions}) == 20
    assert all(sorted(caption.text.split(", ")) == sorted(LIST) for caption in captions)
    assert drawn.fixed_captions(0) == []


def test_a_drawn_caption_depends_on_seed_picture_and_repeat_alone():
    drawn = sample(shuffle_tags=True, tag_dropout=0.3)
    forward = texts(drawn, 10)
    backward = [drawn.caption(0, repeat).text for repeat in reversed(range(10))]
    assert backward[::-1] == forward
    assert texts(drawn, 10, seed=1) != forward
    assert texts(sample(name="b.png", shuffle_tags=True, tag_dropout=0.3), 10) != forward


def test_rates_change_neither_latents_nor_the_captions_that_are_cached():
    keys = {sample(tag_dropout=rate, shuffle_tags=rate > 0).views()[0].latent_key("v") for rate in (0.0, 0.1, 0.5)}
    assert len(keys) == 1
    mixed = {"caption_mode": "mixed", "natural": ("A girl.",)}
    assert {tuple(sample(tag_dropout=rate, **mixed).fixed_captions(0)) for rate in (0.1, 0.5)} == {("A girl.",)}


def test_tag_dropout_leaves_out_its_share_of_each_tag_but_not_of_those_kept_or_protected():
    drawn = sample(tag_dropout=0.25, keep_first_n_tags=2, protected_tags=["@artist", "blue eyes", "saber (fate)"])
    number = 2000
    seen = Counter(tag for text in texts(drawn, number) for tag in text.split(", "))
    for tag in ("1girl", "solo", "@artist", "blue_eyes", "saber_\\(fate\\)"):
        assert seen[tag] == number
    for tag in ("long_hair", "smile"):
        # Five standard deviations of a binomial.
        assert abs(seen[tag] - 0.75 * number) < 5 * (number * 0.25 * 0.75) ** 0.5
    order = [LIST.index(tag) for tag in texts(drawn, 1)[0].split(", ")]
    assert order == sorted(order)  # dropping alone does not shuffle


def test_tags_at_the_start_are_neither_shuffled_nor_dropped():
    drawn = sample(shuffle_tags=True, tag_dropout=0.5, keep_first_n_tags=3)
    assert all(text.split(", ")[:3] == LIST[:3] for text in texts(drawn, 50))
    assert len({text.split(", ")[3] for text in texts(drawn, 50) if text.count(", ") > 2}) > 1


def test_a_fixed_number_of_variants_has_dropout_of_its_own_and_is_cached():
    drawn = sample(cache_shuffle_num=3, tag_dropout=0.4, keep_first_n_tags=1)
    captions = [drawn.caption(0, repeat) for repeat in range(9)]
    assert all(caption.is_fixed for caption in captions)
    assert [caption.text for caption in captions] == 3 * drawn.fixed_captions(0)
    assert len({len(text.split(", ")) for text in drawn.fixed_captions(0)}) > 1


def test_natural_language_is_cached_where_tags_are_drawn():
    drawn = sample(natural=("A girl.",), caption_mode="mixed", shuffle_tags=True)
    captions = [drawn.caption(0, repeat) for repeat in range(100)]
    assert {caption.text for caption in captions if caption.is_fixed} == {"A girl."}
    assert sum(caption.is_fixed for caption in captions) == 50
    assert drawn.fixed_captions(0) == ["A girl."]
    assert drawn.captions(0) == [TAGS, "A girl."]


def test_an_empty_caption_is_cached_whatever_is_drawn():
    drawn = sample(captions=("", "a, b"), shuffle_tags=True)
    assert drawn.caption(0, 0) == Caption("")
    assert not drawn.caption(0, 1).is_fixed
    assert drawn.fixed_captions(0) == [""]
    assert drawn.captions(0) == ["a, b", ""]


def test_trigger_word_and_prefix_stand_first_whatever_is_drawn():
    drawn = sample(shuffle_tags=True, tag_dropout=0.9, trigger_word="sks", caption_prefix="masterpiece, ")
    assert all(text.startswith("sks, masterpiece, ") for text in texts(drawn, 30))


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("1girl, hat", "mia, art, 1girl, hat"),
        ("mia, 1girl, hat", "mia, art, 1girl, hat"),
        ("mia,1girl", "mia, art, 1girl"),
        ("mia\n1girl, hat", "mia\nart, 1girl, hat"),
        ("mia", "mia, art, "),
        ("mia girl, hat", "art, mia girl, hat"),
        ("mia's room, hat", "art, mia's room, hat"),
        ("mia walks to the sea, and sings.", "art, mia walks to the sea, and sings."),
        ("miami, hat", "mia, art, miami, hat"),
    ],
)
def test_a_trigger_word_that_a_caption_begins_with_is_not_put_there_twice(caption, expected):
    drawn = sample((caption,), trigger_word="mia", caption_prefix="art, ")
    assert drawn.evaluation_caption().text == expected
    natural = sample(("",), natural=(caption,), caption_mode="nl", trigger_word="mia", caption_prefix="art, ")
    assert natural.evaluation_caption().text == expected


@pytest.mark.parametrize("replaces", [True, False])
def test_a_trigger_word_is_known_with_underscores_where_those_become_spaces(replaces):
    drawn = sample(("mia_red, 1girl, long_hair",), trigger_word="mia red", replace_underscores=replaces)
    expected = "mia red, 1girl, long hair" if replaces else "mia red, mia_red, 1girl, long_hair"
    assert drawn.evaluation_caption().text == expected


def test_a_first_tag_that_begins_with_the_trigger_word_stays_first():
    drawn = sample(("mia girl, a, b, c, d",), trigger_word="mia", shuffle_tags=True, tag_dropout=0.5)
    assert all(text.startswith("mia girl") for text in texts(drawn, 30))
    assert len(set(texts(drawn, 30))) > 5


def test_regularization_images_get_no_trigger_word():
    drawn = sample(role="regularization", trigger_word="sks")
    assert (texts(drawn, 1), drawn.role) == ([TAGS], "regularization")
    assert sample(trigger_word="sks").role == "train"


def test_evaluation_uses_the_first_caption_as_it_is_in_the_file():
    varied = {"shuffle_tags": True, "tag_dropout": 0.5, "cache_shuffle_num": 4, "horizontal_flip": True}
    for options in (varied, {**varied, "cache_shuffle_num": 0}, {}):
        assert sample(("a, b, c", "d"), **options).evaluation_caption() == Caption("a, b, c")
    natural = sample(natural=("One.", "Two."), caption_mode="nl", captions=("",))
    assert natural.evaluation_caption() == Caption("One.")


def test_escapes_and_underscores_are_rewritten_before_tags_are_told_apart():
    drawn = sample(
        unescape_parentheses=True, replace_underscores=True, natural=("\\(Her\\) eyes.",), caption_mode="mixed"
    )
    assert drawn.captions(0) == ["1girl, solo, long hair, blue eyes, smile, @artist, saber (fate)", "(Her) eyes."]
    assert sample().captions(0) == [TAGS]


# Views


def test_a_flipped_dataset_shows_every_picture_both_ways_in_turn():
    pictures = [sample(name=f"{number}.png", horizontal_flip=True) for number in range(400)]
    firsts = Counter()
    for picture in pictures:
        shown = [picture.view(0, repeat).mirrored for repeat in range(6)]
        assert shown in ([False, True] * 3, [True, False] * 3)
        firsts[shown[0]] += 1
    assert abs(firsts[True] - 200) < 50
    assert [view.mirrored for view in pictures[0].views()] == [False, True]


def test_without_flips_nothing_is_mirrored():
    picture = sample()
    assert [picture.view(0, repeat) for repeat in range(3)] == 3 * [View(picture)]
    assert picture.views() == [View(picture)]


@pytest.mark.parametrize(
    ("side", "position", "expected"),
    [
        ((64, 96), "top", (0.5, 0.5)),  # of the bucket's own aspect ratio: nothing is cut
        ((64, 200), "top", (0.5, 0.0)),
        ((64, 200), "left", (0.5, 0.5)),
        ((200, 96), "top", (0.5, 0.5)),
        ((200, 96), "left", (0.0, 0.5)),
        ((200, 96), [0.25, 0.75], (0.25, 0.5)),
    ],
)
def test_the_crop_position_counts_along_the_side_that_is_cut(side, position, expected):
    assert View(sample(side=side, crop_position=position)).crop.position == expected


def test_only_what_is_cut_differently_gets_another_key():
    plain = View(sample(side=(64, 200))).latent_key("v")
    # As it was before crops had positions: no older entry is made again.
    assert plain == entry_key("latent", image="hash", width=32, height=48, vae="v")
    assert View(sample(side=(64, 200), crop_position="left")).latent_key("v") == plain
    top = View(sample(side=(64, 200), crop_position="top")).latent_key("v")
    mirrored = View(sample(side=(64, 200)), mirrored=True).latent_key("v")
    assert len({plain, top, mirrored}) == 3


@pytest.mark.parametrize(
    ("side", "positions"),
    [((64, 200), ["top", "center", "bottom", [0.5, 0.25]]), ((200, 96), ["left", "center", "right", [0.25, 0.5]])],
)
def test_every_position_of_the_crop_has_latents_and_a_mask_of_its_own(side, positions):
    views = [View(sample(side=side, crop_position=position, mask="mask hash")) for position in positions]
    assert len({view.latent_key("v") for view in views}) == len(positions)
    assert len({view.mask_key() for view in views}) == len(positions)


def test_masks_follow_the_crop_and_the_alpha():
    masked = {"mask": "mask hash", "side": (64, 200)}
    keys = {
        View(sample(**masked)).mask_key(),
        View(sample(**masked), mirrored=True).mask_key(),
        View(sample(**masked, crop_position="top")).mask_key(),
        View(sample(**masked, alpha=True, alpha_as_mask=True)).mask_key(),
    }
    assert len(keys) == 4
    assert View(sample(**masked, alpha=False, alpha_as_mask=True)).mask_key() in keys


def test_only_transparent_pictures_have_their_alpha_as_mask():
    assert sample(alpha=True, alpha_as_mask=True).has_mask
    assert not sample(alpha=False, alpha_as_mask=True).has_mask
    assert not sample(alpha=True).has_mask
    assert sample(mask="m").has_mask


def test_repeats_are_exact():
    assert sample(num_repeats=0.1).repeats == Fraction(1, 10)


SHARES = {"tags": 4.0, "nl": 2.0, "tags_nl": 3.0, "nl_tags": 1.0}


def way(text):
    """What a caption of "a, b" and "One." is."""
    return {"a": "tags", "O": "nl"}[text[0]] if "\n" not in text else {"a": "tags_nl", "O": "nl_tags"}[text[0]]


def test_captions_of_both_kinds_are_used_in_their_shares_from_the_first_repeats_on():
    options = {"caption_mode": "mixed", "caption_shares": SHARES}
    mixed = [sample(("a, b",), natural=("One.",), name=f"{number}.png", **options) for number in range(50)]
    for first, last in ((0, 10), (37, 47)):
        seen = Counter(way(each.caption(0, repeat).text) for each in mixed for repeat in range(first, last))
        assert all(abs(seen[name] - 50 * share) < 25 for name, share in SHARES.items())
    total = Counter(way(mixed[0].caption(0, repeat).text) for repeat in range(1000))
    assert all(abs(total[name] - 100 * share) <= 2 for name, share in SHARES.items())


def test_every_caption_of_both_kinds_is_encoded_before_training():
    options = {"caption_mode": "mixed", "caption_shares": SHARES, "cache_shuffle_num": 3, "trigger_word": "mia"}
    mixed = sample(("a, b, c, d", "e, f"), natural=("One.", "Two.", "Three."), **options)
    captions = [mixed.caption(0, repeat) for repeat in range(500)]
    assert all(caption.is_fixed for caption in captions)
    assert {caption.text for caption in captions} == set(mixed.fixed_captions(0))
    both = {text for text in mixed.fixed_captions(0) if "\n" in text}
    assert all(text.startswith("mia, ") for text in mixed.fixed_captions(0))
    assert len(both) == 12  # each way pairs the six orders of tags with the three sentences in turn


def test_tags_beside_sentences_are_drawn_anew_and_the_sentences_stay():
    options = {"caption_mode": "mixed", "caption_shares": {"tags_nl": 1.0}, "shuffle_tags": True, "tag_dropout": 0.3}
    captions = [sample(("a, b, c, d, e",), natural=("One, two.",), **options).caption(0, k) for k in range(30)]
    assert not any(caption.is_fixed for caption in captions)
    assert all(caption.text.endswith("\nOne, two.") for caption in captions)
    assert len({caption.text for caption in captions}) > 20


def test_with_captions_of_one_kind_shares_change_nothing():
    options = {"caption_mode": "mixed", "caption_shares": SHARES}
    assert {sample(("a, b",), **options).caption(0, repeat).text for repeat in range(20)} == {"a, b"}
    only = sample(("",), natural=("One.",), **options)
    assert {only.caption(0, repeat).text for repeat in range(20)} == {"One."}


def test_shares_that_are_all_zero_are_refused():
    assert list(DirectoryOptions(caption_shares={"tags": 0.0}).problems()) == [
        "caption_shares: found no share above 0, so that no caption would be used"
    ]
