"""`anima compare` with the tiny model: which pictures it draws, its page, and what judges say."""

import json
import os
import pickle
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer
from typer.testing import CliRunner

from anima_train.adapters.selection import block_linears
from anima_train.cli.main import COMMANDS, application
from anima_train.config.model_files import find_model_files
from anima_train.config.model_part import load_model_part
from anima_train.core.errors import ConfigError
from anima_train.model.loading import load_transformer
from anima_train.model.tiny import write_tiny
from anima_train.sampling.comparison import find_checkpoints
from anima_train.sampling.grids import ChosenLora
from anima_train.sampling.judges import clip_pixels
from anima_train.sampling.pipeline import LoraSwitch

try:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
except ModuleNotFoundError:  # older versions have one class alone
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

TABLE = "[sampling]\nwidth = 32\nheight = 48\nsteps = 1\nprompts = ['a <b>', { prompt = 'c', seed = 3 }]\n"


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, write_tiny(folder)


@pytest.fixture(scope="module")
def run(model_files, tmp_path_factory):
    """The folder of a run that has saved LoRAs."""
    folder = tmp_path_factory.mktemp("runs") / "style"
    (folder / "weights").mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "config.toml").write_text(
        f"[model]\ntype = 'anima'\ntiny_path = '{model_files[0]}'\ndtype = 'float32'\n{TABLE}"
    )
    transformer = load_transformer(files_of(folder), False, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module in block_linears(transformer):
        rows, columns = transformer.get_submodule(module).weight.shape
        tensors[f"diffusion_model.{module}.lora_A.weight"] = torch.randn(2, columns, generator=generator) * 0.2
        tensors[f"diffusion_model.{module}.lora_B.weight"] = torch.randn(rows, 2, generator=generator) * 0.2
    for name, factor in (("style", 1.0), ("style-best", 0.8), ("style-s000900", 0.9), ("style-s000050", 0.1)):
        scaled = {key: tensor * (factor if "lora_B" in key else 1) for key, tensor in tensors.items()}
        save_file(scaled, folder / "weights" / f"{name}.safetensors")
    return folder


def files_of(folder):
    return find_model_files(load_model_part(folder / "config.toml"))


def command(*arguments):
    """Run the command; return its standard output."""
    result = CliRunner().invoke(application(COMMANDS, "anima"), ["compare", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def drawn(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    output = command(run, "--checkpoints", "50,best,final", "--strengths", "0.5,1", "--out", out, "--json")
    return out, json.loads(output)


def pixels(path):
    with Image.open(path) as image:
        return image.tobytes()


def test_the_base_comes_first_and_each_checkpoint_at_each_strength_after_it(drawn):
    found = [(each["checkpoint"], each["strength"], each["prompt"], each["seed"]) for each in drawn[1]["pictures"]]
    columns = [("base", None)]
    columns += [(name, strength) for name in ("step 50", "best", "final") for strength in (0.5, 1)]
    assert found == [(*column, *row) for row in (("a <b>", 0), ("c", 3)) for column in columns]


def test_a_cell_is_the_picture_that_anima_sample_draws(run, drawn, tmp_path):
    pictures = {(each["prompt"], each["checkpoint"], each["strength"]): each["path"] for each in drawn[1]["pictures"]}
    assert len({pixels(path) for path in pictures.values()}) == len(pictures)
    for key, lora in (
        (("c", "base", None), []),
        (("c", "final", 0.5), ["--lora", f"{run}/weights/style.safetensors:0.5"]),
    ):
        arguments = ["sample", run / "config.toml", "--prompt", "c", "--seed", "3", "--out", tmp_path, *lora]
        result = CliRunner().invoke(application(COMMANDS, "anima"), list(map(str, arguments)))
        assert pixels(result.stdout.strip()) == pixels(pictures[key])


def test_the_page_is_a_table_without_scripts_and_names_what_the_script_filters_by(drawn):
    page = (drawn[0] / "compare.html").read_text()
    assert drawn[1]["page"] == str(drawn[0] / "compare.html")
    heads = re.findall(r'<th scope="col" data-checkpoint="(.*?)" data-strength="(.*?)"', page)
    assert heads == [("base", ""), *((name, s) for name in ("step 50", "best", "final") for s in ("0.5", "1"))]
    rows = re.findall(r'<tr data-prompt="(.*?)">(.*?)</tr>', page, re.DOTALL)
    assert [(prompt, cells.count("data:image/jpeg")) for prompt, cells in rows] == [("a &lt;b&gt;", 7), ("c", 7)]
    assert "http" not in page.replace("http-equiv", "")
    assert str(drawn[0]) not in page


def test_an_adapter_of_any_kind_is_drawn_on_the_base_and_a_whole_model_instead_of_it(model_files, tmp_path):
    for part in ("lora_A.weight", "lokr_w1", "hada_w1_a", "dora_scale"):
        save_file({f"diffusion_model.blocks.0.mlp.layer1.{part}": torch.ones(2, 2)}, tmp_path / f"{part}.safetensors")
    shutil.copy(model_files[1].transformer, tmp_path / "whole.safetensors")
    assert [each.label for each in find_checkpoints(tmp_path, "run") if not each.is_lora] == ["whole"]


def test_without_flags_all_checkpoints_are_drawn_by_step_into_the_folder_of_the_run(run, tmp_path):
    (tmp_path / "p.txt").write_text("one\n")
    page = command(run, "--prompts", tmp_path / "p.txt", "--quiet").splitlines()[-1]
    assert page == str(run / "compare" / "compare.html")
    heads = re.findall(r'data-checkpoint="(.*?)"', (run / "compare" / "compare.html").read_text())
    assert heads == ["base", "step 50", "step 900", "best", "final"]


def test_a_whole_model_has_no_strength(run, model_files, tmp_path):
    folder = tmp_path / "whole"
    (folder / "weights").mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "config.toml").write_text((run / "config.toml").read_text())
    tensors = load_file(model_files[1].transformer)
    save_file({name: tensor * 1.1 for name, tensor in tensors.items()}, folder / "weights" / "whole.safetensors")
    with pytest.raises(ConfigError, match=r"--strengths: has no effect on whole\.safetensors, a whole model"):
        command(folder, "--strengths", "0.5,1")
    found = json.loads(command(folder, "--json"))["pictures"]
    assert [(each["checkpoint"], each["strength"]) for each in found] == [("base", None), ("final", None)] * 2
    assert len({pixels(each["path"]) for each in found}) == 4


def test_another_strength_of_a_lora_reads_no_file(run, tmp_path):
    files = files_of(run)
    transformer = load_transformer(files, False, torch.float32, torch.device("cpu"))
    copy = tmp_path / "lora.safetensors"
    save_file(load_file(run / "weights" / "style.safetensors"), copy)
    switch = LoraSwitch(transformer, files)
    base = transformer.blocks[0].mlp.layer1.weight.clone()
    switch.set((ChosenLora(copy, 1.0),))
    whole = transformer.blocks[0].mlp.layer1.weight - base
    copy.unlink()
    switch.set((ChosenLora(copy, 0.5),))
    torch.testing.assert_close(transformer.blocks[0].mlp.layer1.weight - base, whole / 2, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoints", "bets"], r'found "bets", expected one of 50, 900, best, final; did you mean best\?'),
        (["--checkpoints", "last,x"], 'found "x"'),
        (["--strengths", "0,1"], "--strengths: 0 is the base"),
        (["--strengths", "0.5,much"], '--strengths: found "much", expected numbers'),
        (["--prompts", "none.txt"], '--prompts: "none.txt" cannot be read'),
        (["--judge", "taste"], 'judge: found "taste", expected one of clip'),
        (["--judge", "clip"], "judge: .*write clip:PATH"),
        (["--judge", "clip:."], "judge clip:.: no CLIP can be loaded from there"),
    ],
)  # fmt: skip
def test_mistakes_are_sentences_before_anything_is_drawn(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        command(run, "--out", "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_run_or_without_weights_or_prompts_is_told(run, tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        command(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.toml").write_text((run / "config.toml").read_text().partition("[sampling]")[0])
    with pytest.raises(ConfigError, match="there are no weights yet"):
        command(tmp_path)
    (tmp_path / "weights").symlink_to(run / "weights")
    with pytest.raises(ConfigError, match=r"the run has no \[sampling\] prompts; give --prompts FILE"):
        command(tmp_path)


# Judges


def redness(path, scale=1.0):
    with Image.open(path) as image:
        return scale * sum(image.convert("RGB").tobytes())


def test_an_installed_judge_scores_each_picture_against_the_words_of_its_prompt(run, installed, tmp_path):
    installed("red")
    (tmp_path / "p.txt").write_text("(smile:1.2)\n")
    arguments = (run, "--checkpoints", "final", "--prompts", tmp_path / "p.txt", "--out", tmp_path / "out", "--json")
    for flags, scale in (((), 1.0), (("--judge", "red:2"), 2.0)):
        found = json.loads(command(*arguments, *flags))
        assert found["judges"] == [{"name": "redness", "higher_is_better": False}]
        for each in found["pictures"]:
            assert each["scores"] == {"redness": redness(each["path"], scale) + len("smile")}
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "redness: lower fits the prompt better" in page
    means = re.search(r'<th scope="row">mean redness</th><td>(.*?)</td><td>(.*?)</td>', page).groups()
    exact = [each["scores"]["redness"] for each in found["pictures"]]
    assert exact[0] != exact[1]
    assert [float(mean) for mean in means] == pytest.approx(exact, rel=1e-4)


def test_a_judge_that_fails_is_told_and_the_pictures_stay(run, installed, tmp_path, capfd):
    installed("broken", "absent")
    found = json.loads(command(run, "--checkpoints", "final", "--out", tmp_path / "out", "--json"))
    assert (found["judges"], len(found["pictures"])) == ([], 4)
    with pytest.raises(ConfigError, match=r"judge absent: taste_judges:absent cannot be loaded \(RuntimeError: needs"):
        command(run, "--judge", "absent", "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_clip_from_a_folder_gives_the_cosine_of_picture_and_prompt(run, clip_folder, tmp_path):
    folder, model = clip_folder
    found = json.loads(
        command(run, "--checkpoints", "final", "--judge", f"clip:{folder}", "--out", tmp_path / "o", "--json")
    )
    assert found["judges"] == [{"name": "CLIP clip", "higher_is_better": True}]
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for each in found["pictures"]:
        with Image.open(each["path"]) as image:
            values = clip_pixels(image.convert("RGB"), 32)[None]
        words = tokenizer([each["prompt"]], return_tensors="pt")
        with torch.no_grad():
            out = model(input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=values)
        # CLIP's own logit is the cosine times the exponential of a weight.
        cosine = float(out.logits_per_image / model.logit_scale.detach().exp())
        assert each["scores"]["CLIP clip"] == pytest.approx(100 * cosine, abs=1e-3)


def test_clip_sees_pictures_as_its_own_processor_prepares_them():
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = processor([picture], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(clip_pixels(picture, 32), expected, atol=0.02, rtol=0)


class Mine:
    """An object whose unpickling makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_a_clip_in_a_pickle_is_refused(run, clip_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (clip_folder[0] / "model.safetensors").unlink()
    (clip_folder[0] / "pytorch_model.bin").write_bytes(pickle.dumps(Mine()))
    with pytest.raises(ConfigError, match="no CLIP can be loaded from there"):
        command(run, "--judge", "clip:clip", "--out", "out")
    assert not (tmp_path / "unpickled").exists()
