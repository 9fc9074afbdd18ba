"""Measure on a toy what a LoRA costs a model, and what bounds are worth: the figures of docs/forgetting.md.

    python scripts/forgetting_experiment.py FOLDER [--seeds 0,1,2,3,4] [--only "plain,regularization 20"] [--steps 240]
                                            [--base tests/data_files/forgetting] [--base-steps 7000] [--no-pictures]
                                            [--save-base FOLDER] [--time] [--tables]

Pictures of 8 x 8 flat cells show one of eight patterns in six colours on three grounds; a model of a million
parameters in the official file layout learns to draw them from captions, by a full fine-tune of random weights.
Adapters then learn a ninth pattern, with a word that the base has never seen, from 20 pictures. All of it goes through
the program's own loop and keys. A small network that reads patterns judges pictures, if it finds 80 % of the base's
right.

A run that is there is not made again: the same command goes on where it was stopped. `FOLDER/results.json` has what was
logged; tables are printed. One thread: more of them, beside other programs, wait for each other most of the time. On
one core of its own the base takes a quarter of an hour, a run about 25 seconds.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "1")

import torch
from forgetting.judge import look, trained_judge
from forgetting.runs import World, copy_base, make_base, run, step_seconds
from forgetting.tables import Runs, everything
from safetensors.torch import load_file

from anima_train.model.tiny import write_weights

KEPT_ON = ("retention", "training latents", "class caption", "empty caption")
METHODS = (
    "plain", "regularization 20", *(f"preservation on {on} {share}" for share in (20, 50) for on in KEPT_ON), "both 20",
    "rank 4", "rank 64", "lr 0.00015", "lr 0.001", "LLM adapter", "DoRA", "LoKr", "T-LoRA", "early",
)  # fmt: skip
ROUNDS = 8  # of steps that are timed, each method in turn
ENOUGH = 0.8  # of the base's pictures that have to be right, or pictures tell nothing


def main() -> None:
    """Make the base, the runs that are missing, and the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for everything that is made")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="of pictures, LoRA and noise; methods are paired by them")
    parser.add_argument("--only", default=",".join(METHODS), help="methods, separated by commas, in this order")
    parser.add_argument("--steps", type=int, default=240, help="of each run")
    parser.add_argument("--base", type=Path, help="a folder with a base that is there already")
    parser.add_argument("--base-steps", type=int, default=7000, help="of the base, where it is made")
    parser.add_argument("--save-base", type=Path, help="write the base there, for --base")
    parser.add_argument("--no-pictures", action="store_true", help="losses only: in a third less time")
    parser.add_argument(
        "--time", action="store_true", help="measure the processor's time for a step of each method, too"
    )
    parser.add_argument("--tables", action="store_true", help="only print the tables of what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder.resolve()
    world = World(folder, options.steps)
    results = folder / "results.json"
    found = json.loads(results.read_text()) if results.is_file() else {"base": {}, "runs": [], "seconds": {}}
    if not options.tables:
        make(world, options, found, results)
    runs = by_method(found["runs"])
    print(everything(runs, found["seconds"]) if "plain" in runs else "no tables: there is no plain run to compare with")


def make(world: World, options: argparse.Namespace, found: dict, results: Path) -> None:
    """Make what is missing, and write each result as soon as it is there."""
    if options.base is not None:
        copy_base(world, options.base)
    make_base(world, options.base_steps)
    if options.save_base is not None:
        for name, path in (("transformer", world.files.transformer), ("vae", world.files.vae)):
            write_weights(options.save_base / f"{name}.safetensors", load_file(path))  # without the run's metadata
    base_look = None if options.no_pictures else found["base"] or seen_of_base(world, found)
    if base_look is not None and base_look["old right"] < ENOUGH:
        print(f"that is below {ENOUGH:.0%}: pictures tell nothing, and only losses are measured", file=sys.stderr)
        base_look = None
    methods = options.only.split(",")
    for seed in map(int, options.seeds.split(",")):
        for method in methods:
            if any((each["method"], each["seed"]) == (method, seed) for each in found["runs"]):
                continue
            start = time.monotonic()
            found["runs"].append(run(world, method, seed, None if method == "early" else base_look))
            results.write_text(json.dumps(found))
            print(f"{method}, seed {seed}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    for turn in range(ROUNDS if options.time else 0):
        for method in methods:
            found["seconds"].setdefault(method, []).append(step_seconds(world, method, turn))
        results.write_text(json.dumps(found))


def seen_of_base(world: World, found: dict) -> dict[str, float]:
    """Return what the judge sees in the base's pictures, and keep it among the results."""
    found["base"] = look(trained_judge(world.folder / "judge.safetensors"), world.files, number=96)
    print(f"the base draws {found['base']['old right']:.0%} of the patterns right")
    return found["base"]


def by_method(runs: list[dict]) -> Runs:
    """Return the runs by method and seed, in the order of `METHODS`."""
    found: Runs = {}
    for each in runs:
        found.setdefault(each["method"], {})[each["seed"]] = each
    order = {method: place for place, method in enumerate(METHODS)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


if __name__ == "__main__":
    main()
