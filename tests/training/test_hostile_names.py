"""Names, captions, prompts and metadata that want to be obeyed: by a terminal, a browser, or as a path."""

import io
import os
import sys
import tarfile
import unicodedata
from html.parser import HTMLParser

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from anima_train.cli.main import main
from anima_train.core.errors import ConfigError

ESCAPE = "\x1b]0;title\x07\x1b[31m\x9b2J"
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
BIDI = "\u202egnp\u2066\u200b"
HOSTILE = f"{ESCAPE}{MARKUP}{BIDI}\r\n\x00../../../up"
FILE_NAME = f"{ESCAPE}<img src=x onerror=alert(3)>{BIDI}\r\n\u2028..up"  # what a file can be called


def assert_harmless(text):
    """Nothing that a terminal obeys, reorders or cannot show; ends of lines, and returns of live ones, are ours."""
    bad = {letter for letter in text if unicodedata.category(letter) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")}
    assert bad <= set("\n\r"), ascii(text)
    assert "\r\n" not in text


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]


def assert_harmless_page(path):
    """One script at most, its own, and nothing that runs or loads."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("script") <= 1
    assert not {name for name in page.attributes if name.startswith("on")}
    assert "src=x" not in text.replace("&lt;img src=x", "")
    assert_harmless(text)


def png(side=96):
    file = io.BytesIO()
    Image.effect_noise((side, side), 40).convert("RGB").save(file, "PNG")
    return file.getvalue()


def hostile_folder(folder):
    """Good and broken images, all with names and captions of that kind."""
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}{FILE_NAME}.png").write_bytes(png())
        (folder / f"{number}{FILE_NAME}.txt").write_text(HOSTILE.replace("\x00", ""), encoding="utf-8")
    (folder / f"broken{FILE_NAME}.png").write_bytes(b"no image")
    (folder / f"other{FILE_NAME}.docx").write_bytes(b"")
    return folder


def hostile_tar(path):
    """Members that would land outside, links, and a device."""
    with tarfile.open(path, "w") as tar:
        for name in ("../../up.png", "/absolute.png", "a/../../up2.png", f"{FILE_NAME}.png", "plain.png"):
            content = png()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, kind, target in (
            ("passwd.png", tarfile.SYMTYPE, "/etc/passwd"), ("shadow.png", tarfile.LNKTYPE, "../../../etc/shadow"),
            ("device.png", tarfile.CHRTYPE, ""), ("fifo.png", tarfile.FIFOTYPE, ""),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    return path


def tree(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.slow
def test_a_run_with_hostile_data_shows_and_writes_nothing_of_the_kind(trainer, tmp_path, capfd, monkeypatch):
    outside = tmp_path / "up"
    inside = outside / "in"
    inside.mkdir(parents=True)
    folder, archive = hostile_folder(inside / "images"), hostile_tar(inside / "images.tar")
    before = tree(tmp_path)
    trainer.base["output_dir"] = str(inside / f"runs{FILE_NAME}")
    run = trainer(
        max_steps=2,
        dataset={
            "directory": [{"path": str(folder), "trigger_word": HOSTILE}, {"path": str(archive)}],
            "max_bad_fraction": 0.9,
        },
        sampling={"every_n_steps": 2, "width": 64, "height": 64, "steps": 1, "prompts": [HOSTILE.replace("\x00", "")]},
    )  # fmt: skip
    assert run.metrics[-1]["examples"] == 2
    check = ["check", str(trainer.folder / "run.toml"), "--html", str(inside / "check.html")]
    monkeypatch.setattr(sys, "argv", ["anima", *check])
    with pytest.raises(SystemExit):
        main()
    printed = "".join(capfd.readouterr())
    assert "no image" in printed or "not an image" in printed  # the names were shown
    assert_harmless(printed)
    for page in (run.path / "report.html", inside / "check.html"):
        assert_harmless_page(page)
    made = {name for name in tree(tmp_path) - before if not name.startswith("up/in/")}
    assert made == {"run.toml"}
    assert tree(folder.parent / "images") > {".anima_cache"}
    assert not list(tmp_path.rglob("up*.png"))
    assert not list(tmp_path.rglob("absolute.png"))


@pytest.mark.slow
def test_a_lora_with_hostile_metadata_is_only_drawn_with(trainer, tmp_path, capfd, monkeypatch):
    run = trainer(max_steps=1)
    loras = tmp_path / "loras"
    loras.mkdir()
    tensors = load_file(run.path / "weights" / "run.safetensors")
    metadata = {"modelspec.title": HOSTILE, "ss_output_name": HOSTILE, "ss_tag_frequency": MARKUP}
    save_file(tensors, loras / f"{FILE_NAME}.safetensors", metadata)
    damaged = tmp_path / f"damaged{FILE_NAME}.safetensors"
    damaged.write_bytes(b"no lora")
    arguments = ["sample", str(trainer.config()), "--prompt", HOSTILE.replace("\x00", ""), "--size", "64x64"]
    arguments += ["--steps", "1", "--out", str(tmp_path / "out")]
    capfd.readouterr()
    for options, code in ((["--grid", f"x=lora:none,{loras}"], 0), (["--lora", str(damaged)], 4)):
        monkeypatch.setattr(sys, "argv", ["anima", *arguments, *options])
        with pytest.raises(SystemExit) as end:
            main()
        assert (end.value.code or 0) == code
    printed = "".join(capfd.readouterr())
    assert "grid.html" in printed
    assert "this is not a safetensors file" in printed
    assert_harmless(printed)
    assert_harmless_page(tmp_path / "out" / "grid.html")


def test_a_name_of_an_evaluation_set_is_printable(trainer):
    held = {"name": f"held{ESCAPE}", "config": trainer.base["dataset"]}
    with pytest.raises(ConfigError, match="expected a name without control characters") as caught:
        trainer(eval_datasets=[held])
    assert_harmless(str(caught.value))
    assert not os.path.exists(trainer.folder / "runs")
