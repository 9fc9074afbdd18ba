"""`anima sample` with the tiny model, from the command line to the PNG."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from anima_train.adapters.addition import adapted_layers
from anima_train.adapters.loha import Loha
from anima_train.adapters.lokr import Lokr
from anima_train.adapters.lora import Lora
from anima_train.adapters.selection import block_linears
from anima_train.cli import draw
from anima_train.cli.draw import choose_sheet
from anima_train.cli.main import COMMANDS, application
from anima_train.config.model_files import find_model_files
from anima_train.config.model_part import load_model_part
from anima_train.core.errors import ConfigError, ModelFileError, NumericError
from anima_train.model.loading import load_transformer
from anima_train.model.tiny import write_tiny
from anima_train.optim.groups import COMPONENTS, LearningRates
from anima_train.run.progress import DrawingBar
from anima_train.sampling.generate import Request
from anima_train.sampling.grids import ChosenLora
from anima_train.sampling.pipeline import LoraSwitch
from anima_train.tools.merge import Source, merge


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, write_tiny(folder)


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """A config whose dataset does not exist."""
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(
        f"output_dir = 'runs'\ndataset = 'nowhere.toml'\n"
        f"[model]\ntype = 'anima'\ntiny_path = '{tiny[0]}'\ndtype = 'float32'\n[optimizer]\ntype = 'adamw'\nlr = 1e-4\n"
    )
    return path


@pytest.fixture(scope="module")
def loras(config, tmp_path_factory):
    """Two LoRAs, the second on the LLM adapter alone."""
    files = find_model_files(load_model_part(config))
    model = load_transformer(files, True, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    paths = []
    for name, part in (("style", ""), ("words", "llm_adapter.")):
        tensors = {}
        for module in block_linears(model):
            if module.startswith(part):
                shape = model.get_submodule(module).weight.shape
                stem = f"diffusion_model.{module}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(2, shape[1], generator=generator) * 0.2
                tensors[f"{stem}.lora_B.weight"] = torch.randn(shape[0], 2, generator=generator) * 0.2
        paths.append(tmp_path_factory.mktemp("loras") / f"{name}.safetensors")
        save_file(tensors, paths[-1])
    return paths


@pytest.fixture
def sample(config, tmp_path, monkeypatch):
    """Run `anima sample` on small pictures; returns the paths of those it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, size="64x48", steps=("--steps", "3")):
        command = ["sample", config, "--size", size, *steps, *arguments]
        result = CliRunner().invoke(application(COMMANDS, "anima"), [str(argument) for argument in command])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return [tmp_path / line for line in result.stdout.splitlines()]

    return run


def pixels(path):
    with Image.open(path) as image:
        return image.tobytes()


def test_pictures_are_numbered_and_hold_their_settings(sample, tmp_path):
    paths = sample(
        "--prompt", "1girl, (solo:1.3)", "--prompt", "", "--negative", "bad", "--seed", "7", "--sampler", "euler"
    )  # fmt: skip
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["samples/00001_7.png", "samples/00002_7.png"]
    with Image.open(paths[0]) as image:
        assert image.size == (64, 48)
        assert image.info["parameters"].startswith("1girl, (solo:1.3)\nNegative prompt: bad\nSteps: 3, Sampler: Euler")
        assert "Seed: 7, Size: 64x48, Model: anima-tiny" in image.info["parameters"]
        facts = json.loads(image.info["anima_train"])
        everything = repr(image.info)
    assert (facts["prompt"], facts["seed"], facts["cfg"]) == ("1girl, (solo:1.3)", 7, 4.0)
    assert str(tmp_path.parent) not in everything
    assert pixels(paths[0]) != pixels(paths[1])


def test_the_same_seed_gives_the_same_bytes_and_overwrites_nothing(sample):
    first = sample("--prompt", "a", "--prompt", "b", "--seed", "1", "--out", "one")
    content = first[1].read_bytes()
    again = sample("--prompt", "b", "--seed", "1", "--out", "one")  # whatever is drawn before it
    other = sample("--prompt", "b", "--seed", "2", "--out", "one")
    assert [path.name for path in (*again, *other)] == ["00003_1.png", "00004_2.png"]
    assert again[0].read_bytes() == content == first[1].read_bytes()
    assert pixels(other[0]) != pixels(again[0])


def test_attention_is_computed_as_the_config_says(sample):
    (by_math,) = sample("--prompt", "a", "--set", "attention='math'")
    (fused,) = sample("--prompt", "a")
    for first, second in zip(pixels(by_math), pixels(fused), strict=True):
        assert abs(first - second) <= 2
    with pytest.raises(ConfigError, match='attention: found "cudnn", which does not work on the CPU'):
        sample("--prompt", "a", "--set", "attention='cudnn'")


def test_every_setting_changes_the_picture(sample, tmp_path):
    changes = ["", "cfg = 2", "cfg = 1", "shift = 1", 'negative_prompt = "x"', "steps = 4", "seed = 1"]
    (tmp_path / "p.toml").write_text("\n".join(f'[[prompt]]\nprompt = "a"\n{change}' for change in changes))
    assert len({pixels(path) for path in sample("--prompts", "p.toml")}) == len(changes)


@pytest.mark.slow
def test_loras_change_the_picture_by_their_strength(sample, loras):
    style, words = loras

    def drawn(*chosen):
        return pixels(sample("--prompt", "1girl", *(part for lora in chosen for part in ("--lora", lora)))[0])

    plain = drawn()
    assert drawn(f"{style}:0") == plain
    with_style, with_words, with_both = drawn(style), drawn(words), drawn(style, words)
    assert len({plain, with_style, with_words, with_both, drawn(f"{style}:-0.5")}) == 5
    assert drawn(words, f"{style}:1.0") == with_both


def test_loras_are_named_in_the_picture(sample, loras):
    (path,) = sample("--prompt", "1girl", "--lora", f"{loras[0]}:0.5", "--lora", loras[1])
    with Image.open(path) as image:
        assert image.info["parameters"].startswith("1girl <lora:style:0.5> <lora:words:1>\n")
        found = json.loads(image.info["anima_train"])["loras"]
    assert [(lora["name"], lora["strength"]) for lora in found] == [("style", 0.5), ("words", 1.0)]


def test_a_checkpoint_takes_the_place_of_the_transformer(sample, tiny, tmp_path):
    same, other = tmp_path / "same.safetensors", tmp_path / "other.safetensors"
    tensors = load_file(tiny[1].transformer)
    save_file(tensors, same)
    save_file({name: tensor * 1.1 for name, tensor in tensors.items()}, other)
    paths = [sample("--prompt", "a", *given)[0] for given in ((), ("--checkpoint", same), ("--checkpoint", other))]
    plain, with_same, with_other = map(pixels, paths)
    assert plain == with_same != with_other
    with Image.open(paths[2]) as image:
        assert "Model: other," in image.info["parameters"]


def test_a_checkpoint_needs_no_other_transformer(tiny, tmp_path):
    paths = tiny[1]
    config = tmp_path / "run.toml"
    config.write_text(
        f"[model]\ntype = 'anima'\ntransformer_path = 'nowhere.safetensors'\nvae_path = '{paths.vae}'\n"
        f"llm_path = '{paths.llm}'\ntokenizer_path = '{paths.tokenizer}'\nt5_tokenizer_path = '{paths.t5_tokenizer}'\n"
    )
    files = find_model_files(load_model_part(config, transformer=paths.transformer))
    assert files.transformer == paths.transformer
    with pytest.raises(ConfigError, match=r'run\.toml: model\.transformer_path: "nowhere\.safetensors" does not exist'):
        load_model_part(config)


def test_prompts_come_from_files_too(sample, tmp_path):
    (tmp_path / "p.toml").write_text('[[prompt]]\nprompt = "b"\nwidth = 32\n[[prompt]]\nprompt = "c"\nseed = 9\n')
    (tmp_path / "p.txt").write_text("b\n")
    paths = sample("--prompt", "a", "--prompts", "p.toml", "--seed", "2")
    assert [path.name for path in paths] == ["00001_2.png", "00002_2.png", "00003_9.png"]
    sizes = []
    for path in paths:
        with Image.open(path) as image:
            sizes.append(image.size)
    assert sizes == [(64, 48), (32, 48), (64, 48)]
    assert pixels(sample("--prompts", "p.txt")[0]) == pixels(sample("--prompt", "b")[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to draw"),
        (["--prompt", "a", "--size", "64"], "--size: found .*expected WIDTHxHEIGHT"),
        (["--prompt", "a", "--size", "65x64"], "--size: found 65 .*a multiple of 16"),
        (["--prompt", "a", "--steps", "0"], "--steps: found 0"),
        (["--prompt", "a", "--sampler", "eular"], '--sampler: .*did you mean "euler"'),
        (["--prompt", "a", "--cfg", "1", "--negative", "b"], "--negative: has no effect with cfg 1"),
        (["--prompt", "a", "--lora", "x:inf"], "found the strength inf"),
        (["--prompt", "a", "--prompts", "none.toml"], "none.toml: does not exist"),
        (["--prompt", "a", "--set", "epochs=3"], "--set epochs: has no effect here"),
        (["--prompt", "a", "--set", 'model.dtyp="x"'], r"--set model\.dtyp: unknown key; did you mean dtype"),
        (["--prompt", "a", "--grid", "x=cfgs:1,2"], '--grid x: found "cfgs".*did you mean cfg'),
        (["--prompt", "a", "--grid", "x=cfg_scale:1,2"], "it is called cfg"),
        (["--prompt", "a", "--cfg", "2", "--grid", "x=cfg:1,2"], "--cfg: has no effect with --grid x=cfg"),
        (["--prompt", "a", "--grid", "x=cfg:1,2", "--gallery", "file"], "--gallery: cannot be drawn together"),
        (["--prompt", "{}", "--gallery", "none.txt"], '--gallery: "none.txt" cannot be read'),
        (["--prompt", "{}", "--gallery", "file"], "--gallery: the file holds no line"),
        (["--prompt", "a", "--out", "file"], "--out: file cannot be a folder"),
        (["--prompt", "(a:inf)"], 'has the weight inf; write'),
    ],
)  # fmt: skip
def test_mistakes_are_sentences(sample, tmp_path, arguments, message):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=message):
        sample(*arguments)
    assert not list(tmp_path.glob("**/*.png"))


def test_a_mistake_of_width_and_height_is_told_once(sample):
    with pytest.raises(ConfigError) as caught:
        sample("--prompt", "a", size="130x130")
    (problem,) = caught.value.problems
    assert problem.startswith("--size: found 130 ")


def test_a_lora_that_is_none_or_does_not_fit_is_refused_before_anything_is_drawn(sample, tiny, tmp_path):
    with pytest.raises(ModelFileError, match=r"style\.safetensors: there is no such file"):
        sample("--prompt", "a", "--lora", "style.safetensors:0.5")
    (tmp_path / "styles.safetensors").touch()
    near = r'style\.safetensor: there is no such file; did you mean "styles\.safetensors"\?'
    with pytest.raises(ModelFileError, match=near):
        sample("--prompt", "a", "--lora", "style.safetensor")
    with pytest.raises(ModelFileError, match="expected a LoRA; this looks like an Anima transformer"):
        sample("--prompt", "a", "--lora", tiny[1].transformer)
    with pytest.raises(ModelFileError, match=r"a:b\.safetensors: there is no such file"):
        sample("--prompt", "a", "--lora", "a:b.safetensors")
    assert not list(tmp_path.glob("**/*.png"))


def test_each_cell_of_a_grid_equals_the_picture_drawn_alone(sample, loras, tmp_path):
    style, words = loras
    *pictures, png, html = sample(
        "--prompt", "1girl", "--lora", style, "--lora", words, "--out", "grid",
        "--grid", "x=lora_strength:0.37,-1", "--grid", "y=cfg:1,3.5",
    )  # fmt: skip
    # Those of one strength are drawn together.
    wanted = [(strength, cfg) for strength in ("0.37", "-1") for cfg in ("1", "3.5")]
    alone = [
        sample("--prompt", "1girl", "--cfg", cfg, "--lora", f"{style}:{strength}", "--lora", f"{words}:{strength}")[0]
        for strength, cfg in wanted
    ]
    assert [path.read_bytes() for path in pictures] == [path.read_bytes() for path in alone]
    assert len({pixels(path) for path in pictures}) == 4
    assert (png.name, html.name) == ("grid.png", "grid.html")
    page = html.read_text()
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    assert re.findall(r'<th scope="col">(.*?)</th>', rows[0]) == ["lora_strength: 0.37", "lora_strength: -1"]
    assert [re.findall(r'<th scope="row">(.*?)</th>', row) for row in rows[1:]] == [["cfg: 1"], ["cfg: 3.5"]]
    assert [re.findall(r'title="0000(\d)_0.png"', row) for row in rows[1:]] == [["1", "3"], ["2", "4"]]
    with Image.open(png) as image:
        facts = json.loads(image.info["anima_train"])
        colours = image.convert("RGB")
    assert facts["grid"]["x"] == {"key": "lora_strength", "values": ["lora_strength: 0.37", "lora_strength: -1"]}
    assert (facts["prompt"], facts["model"]) == ("1girl", "anima-tiny")
    assert not {"cfg", "loras"} & facts.keys()
    assert str(tmp_path.parent) not in repr(facts)
    for number, corner in zip((0, 2, 1, 3), sheet_corners(colours.size, 64, 48), strict=True):
        with Image.open(pictures[number]) as picture:
            box = (*corner, corner[0] + 64, corner[1] + 48)
            assert colours.crop(box).tobytes() == picture.tobytes()


def sheet_corners(size, width, height, gap=3):
    """Upper left corners of two by two pictures at the lower right of a sheet, row by row."""
    lefts, tops = (
        [side - 2 * (step + gap), side - step - gap] for side, step in zip(size, (width, height), strict=True)
    )
    return [(left, top) for top in tops for left in lefts]


@pytest.mark.slow
def test_the_bar_gets_the_steps_in_the_order_in_which_pictures_are_drawn(sample, loras, monkeypatch):
    bars = []
    monkeypatch.setattr(draw, "DrawingBar", lambda *given, **more: bars.append(DrawingBar(*given, **more)) or bars[-1])
    axes = ("--grid", f"x=lora:none,{loras[0]}", "--grid", "y=steps:1,2")
    *pictures, _, _ = sample("--prompt", "1girl", *axes, size="16x16", steps=())
    steps = []
    for path in pictures:
        with Image.open(path) as image:
            steps.append(int(re.search(r"Steps: (\d+)", image.info["parameters"])[1]))
    assert bars[0].num_steps == steps == [1, 2, 1, 2]


def test_a_folder_of_checkpoints_is_an_axis_in_the_order_of_its_steps(sample, loras, tmp_path):
    weights = tmp_path / "run" / "weights"
    weights.mkdir(parents=True)
    tensors = load_file(loras[0])
    for name, factor in (("run", 1.0), ("run-s000900", 0.9), ("run-s000050", 0.05)):
        save_file({key: tensor * factor for key, tensor in tensors.items()}, weights / f"{name}.safetensors")
    *pictures, _, html = sample("--prompt", "a", "--grid", f"x=lora:none,{weights}", "--grid", "y=prompt")
    labels = re.findall(r'<th scope="col">(.*?)</th>', html.read_text())
    assert labels == ["no LoRA", "run-s000050", "run-s000900", "run"]
    files = [None, *(weights / f"{label}.safetensors" for label in labels[1:])]
    alone = [sample("--prompt", "a", *(["--lora", file] if file else []))[0] for file in files]
    assert [path.read_bytes() for path in pictures] == [path.read_bytes() for path in alone]


def test_a_gallery_draws_the_prompt_with_each_line(sample, tmp_path):
    (tmp_path / "artists.txt").write_text("@one\n\n@two, (three:1.2)\n@one\n<b>\n")
    *pictures, png, html = sample("--prompt", "1girl, {}, solo", "--gallery", "artists.txt")
    lines = ["@one", "@two, (three:1.2)", "<b>"]
    alone = sample(*(part for line in lines for part in ("--prompt", f"1girl, {line}, solo")), "--out", "alone")
    assert [path.read_bytes() for path in pictures] == [path.read_bytes() for path in alone]
    captions = re.findall("<figcaption>(.*?)</figcaption>", html.read_text())
    assert captions == ["@one", "@two, (three:1.2)", "&lt;b&gt;"]
    with Image.open(png) as image:
        assert json.loads(image.info["anima_train"])["gallery"] == lines


def test_prompts_are_an_axis(sample):
    *pictures, _, html = sample("--grid", 'y=prompt:"a, b",c', "--seed", "3")
    assert re.findall(r'<th scope="row">(.*?)</th>', html.read_text()) == ["a, b", "c"]
    alone = sample("--prompt", "a, b", "--prompt", "c", "--seed", "3", "--out", "alone")
    assert [path.read_bytes() for path in pictures] == [path.read_bytes() for path in alone]


def test_loras_can_be_exchanged_without_a_trace(config, loras):
    files = find_model_files(load_model_part(config))
    model = load_transformer(files, False, torch.bfloat16, torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    switch = LoraSwitch(model, files)
    for chosen in ((ChosenLora(loras[0]),), (ChosenLora(loras[1]), ChosenLora(loras[0], 0.3)), ()):
        switch.set(chosen)
        same = [torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()]
        assert all(same) == (not chosen)


KINDS = {
    "lokr": Lokr(rank=2, decompose_factor=4, alpha=3.0),
    "loha": Loha(rank=2),
    "dora": Lora(rank=2, use_dora=True),
    "whole difference": None,
}


@pytest.fixture(scope="module")
def adapters(config, tmp_path_factory):
    """A file of each kind that is no plain LoRA, on the transformer and the LLM adapter."""
    folder, files = tmp_path_factory.mktemp("adapters"), find_model_files(load_model_part(config))
    rates = LearningRates(dict.fromkeys(COMPONENTS, 1e-4))
    generator = torch.Generator().manual_seed(1)
    for name, adapter in KINDS.items():
        model = load_transformer(files, True, torch.float32, torch.device("cpu"))
        if adapter is None:
            some = {"x_embedder.proj.1.weight", "blocks.0.self_attn.q_norm.weight"}
            tensors = {
                f"diffusion_model.{key[:-6]}diff": torch.randn(weight.shape, generator=generator) * 0.2
                for key, weight in model.named_parameters() if key in some or key.endswith("mlp.layer1.weight")
            }  # fmt: skip
        else:
            adapter.attach(model, rates, seed=0)
            for _, layer in adapted_layers(model):
                for parameter in layer.parameters():
                    if parameter.requires_grad:
                        noise = torch.randn(parameter.shape, generator=generator)
                        parameter.data = parameter * (1 + 0.2 * noise) if parameter.any() else noise * 0.1
            tensors = adapter.tensors(model)
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_with_any_adapter_is_that_of_the_checkpoint_with_it(kind, adapters, tiny, sample):
    file = adapters / f"{kind}.safetensors"
    merged = adapters / f"merged {kind}.safetensors"
    merge([Source(file, 0.5)], merged, into=tiny[1].transformer, dtype=torch.float32)
    (expected,) = sample("--prompt", "a", "--checkpoint", merged)
    (found,) = sample("--prompt", "a", "--lora", f"{file}:0.5")
    differences = [abs(a - b) for a, b in zip(pixels(found), pixels(expected), strict=True)]
    assert max(differences) <= 1
    # Another strength and file before it, in the same grid, leave no trace.
    *grid, _, _ = sample("--prompt", "a", "--grid", f"x=lora:{adapters}/loha.safetensors,{file}:2,none,{file}:0.5")
    assert pixels(grid[3]) == pixels(found)
    assert len({pixels(path) for path in (*grid[1:], expected)}) >= 3
    assert pixels(grid[2]) == pixels(sample("--prompt", "a")[0])


def test_an_adapter_that_does_not_fit_is_refused_before_the_model_is_loaded(adapters, sample, tmp_path):
    tensors = load_file(adapters / "lokr.safetensors")
    key = next(key for key in tensors if key.endswith("lokr_w2_a"))
    save_file({**tensors, key: torch.cat([tensors[key], tensors[key]])}, tmp_path / "wide.safetensors")
    with pytest.raises(ModelFileError, match=r"wide\.safetensors: changes 1 weight of another shape than"):
        sample("--prompt", "a", "--lora", "wide.safetensors")
    deeper = {key.replace("blocks.1.", "blocks.7."): tensor for key, tensor in tensors.items()}
    save_file(deeper, tmp_path / "deep.safetensors")
    with pytest.raises(ModelFileError, match=r"keys for nothing in the transformer: .*blocks\.7"):
        sample("--prompt", "a", "--lora", "deep.safetensors")


def test_a_picture_that_is_not_finite_is_an_error(sample):
    with pytest.raises(NumericError, match='the picture of "a" became NaN'):
        sample("--prompt", "a", "--cfg", "1e38")


def test_without_prompts_those_of_the_config_are_drawn_with_its_settings_or_those_of_flags(config, sample, tmp_path):
    with_prompts = tmp_path / "with_prompts.toml"
    table = "[sampling]\nwidth = 48\nheight = 64\nsteps = 2\nprompts = ['a', { prompt = 'b', seed = 3, cfg = 1.0 }]\n"
    with_prompts.write_text(f"{config.read_text()}{table}")
    command = ["sample", str(with_prompts), "--out", "own"]
    invoke = CliRunner().invoke
    paths = [
        [tmp_path / line for line in invoke(application(COMMANDS, "anima"), arguments).stdout.splitlines()]
        for arguments in (command, [*command, "--seed", "9"])
    ]
    assert [len(each) for each in paths] == [2, 2]
    alone = sample("--prompt", "b", "--seed", "3", "--cfg", "1", "--steps", "2", size="48x64")[0]
    assert pixels(paths[0][1]) == pixels(alone)
    assert [path.name.rpartition("_")[2] for path in paths[1]] == ["9.png", "9.png"]


SHARED = """[sampling]
width = 48
height = 64
steps = 2
cfg = 2.5
negative_prompt = "blurry"
prompts = [{ prompt = "of the config", seed = 3 }]
"""


def facts_of(path):
    with Image.open(path) as image:
        return json.loads(image.info["anima_train"])


def test_the_settings_of_the_config_hold_for_prompts_of_flags_and_files_too(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shared.toml").write_text(f"{config.read_text()}{SHARED}")
    (tmp_path / "p.toml").write_text('[[prompt]]\nprompt = "c"\ncfg = 1.0\n[[prompt]]\nprompt = "d"\nsteps = 1\n')

    def drawn(*arguments):
        result = CliRunner().invoke(application(COMMANDS, "anima"), ["sample", "shared.toml", *arguments])
        assert result.exit_code == 0, result.output
        keys = ("prompt", "width", "height", "steps", "cfg", "negative_prompt", "seed")
        found = [facts_of(tmp_path / line) for line in result.stdout.splitlines() if "/0" in line]
        return [tuple(facts[key] for key in keys) for facts in found]

    assert drawn("--prompt", "a", "--cfg", "3") == [("a", 48, 64, 2, 3.0, "blurry", 0)]
    assert drawn("--prompt", "a", "--cfg", "1", "--size", "64x48") == [("a", 64, 48, 2, 1.0, "", 0)]
    assert drawn("--prompts", "p.toml") == [("c", 48, 64, 2, 1.0, "", 0), ("d", 48, 64, 1, 2.5, "blurry", 0)]
    assert drawn("--negative", "dark") == [("of the config", 48, 64, 2, 2.5, "dark", 3)]
    assert drawn("--grid", "x=prompt:e,f") == [(name, 48, 64, 2, 2.5, "blurry", 0) for name in "ef"]


def test_a_negative_prompt_for_a_config_without_guidance_is_refused(config, tmp_path):
    plain = tmp_path / "plain.toml"
    plain.write_text(f"{config.read_text()}[sampling]\ncfg = 1.0\nprompts = ['a']\n")
    for prompt in ([], ["--prompt", "b"]):
        arguments = ["sample", str(plain), "--negative", "dark", *prompt]
        result = CliRunner().invoke(application(COMMANDS, "anima"), arguments)
        assert (
            str(result.exception)
            == "--negative: has no effect with cfg 1 (of Turbo the default); leave it out, or write another cfg"
        )


def test_a_size_beside_axes_over_width_and_height_is_refused_and_half_of_it_noted(capsys):
    one = Request(prompt="a")
    both = ["x=width:64,80", "y=height:64"]
    with pytest.raises(ConfigError, match="--size: has no effect with --grid x=width and --grid y=height"):
        choose_sheet(both, None, [one], {"width": 96, "height": 96}, [], {})
    assert len(choose_sheet(both, None, [one], {}, [], {}).cells) == 2
    sheet = choose_sheet(["x=width:64,80"], None, [one], {"width": 96, "height": 96}, [], {})
    assert [cell.request.width for cell in sheet.cells] == [64, 80]
    assert capsys.readouterr().err == "note: --size: its width has no effect, as --grid x=width sets it\n"


def test_a_quiet_command_prints_paths_and_no_note(sample, capfd):
    one, *_ = sample("--prompt", "a", "--grid", "x=width:16", "--quiet", size="32x16", steps=("--steps", "1"))
    assert one.is_file()
    assert "note" not in capfd.readouterr().err


def test_turbo_is_drawn_with_its_own_cfg_and_steps_where_nothing_else_is_set(config, tiny, tmp_path):
    turbo = tmp_path / "anima-turbo-v1.0.safetensors"
    turbo.write_bytes(tiny[1].transformer.read_bytes())
    always = ["sample", config, "--prompt", "a", "--size", "32x16", "--checkpoint", turbo, "--out", tmp_path / "out"]

    def drawn(*arguments):
        result = CliRunner().invoke(application(COMMANDS, "anima"), [str(word) for word in (*always, *arguments)])
        with Image.open(result.stdout.strip()) as image:
            facts = json.loads(image.info["anima_train"])
        return facts["cfg"], facts["steps"], "looks like Turbo: cfg 1 and steps 10, where nothing else" in result.stderr

    assert drawn() == (1, 10, True)
    assert drawn("--cfg", "2", "--steps", "1")[:2] == (2, 1)
    words = [str(word) for word in (*always, "--negative", "b")]
    refused = CliRunner().invoke(application(COMMANDS, "anima"), words).exception
    assert "--negative: has no effect with cfg 1 (of Turbo the default)" in str(refused)


def test_keys_of_sampling_hold_against_the_defaults_of_turbo(config, tmp_path):
    path = tmp_path / "turbo.toml"
    text = config.read_text().replace("tiny_path", "transformer_path = 'anima_turbo.safetensors'\n#")
    (tmp_path / "anima_turbo.safetensors").touch()
    path.write_text(f"{text}[sampling]\nsteps = 12\nprompts = ['a', {{prompt = 'b', cfg = 3}}]\n")
    sampling = load_model_part(path).sampling
    assert [(each.cfg, each.steps) for each in sampling.prompts] == [(1, 12), (3, 12)]
