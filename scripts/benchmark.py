"""Compare speeds, as ratios of two ways of doing the same, in turn in one process, and count what has no noise.

    python scripts/benchmark.py step   [--cases eager,checkpointing] [--device cuda] [--width 1280] [--blocks 4]
                                       [--side 256] [--rank 16] [--rounds 7] [--json]
    python scripts/benchmark.py counts [--cases eager,checkpointing,diffusers] [--side 1024] [--rank 32] [--json]
    python scripts/benchmark.py graphs [--json]
    python scripts/benchmark.py rounding [--cases bfloat16,int8] [--json]
    python scripts/benchmark.py waits  [--json]
    python scripts/benchmark.py start  [--rounds 7] [--json]
    python scripts/benchmark.py vae    [--device cuda] [--side 256] [--rounds 7]
    python scripts/benchmark.py cache  [--images 2000] [--workers 2] [--rounds 7]
    python scripts/benchmark.py scan   [--images 100000]
    python scripts/benchmark.py save   [--megabytes 600] [--rounds 7]
    python scripts/benchmark.py soak   [--steps 2000]

`step`: forward, backward and AdamW step of a LoRA on all 16 linears of a block, ours against diffusers'
    `CosmosTransformer3DModel` with PEFT: the ratio of their times, and that of the bytes kept for the backward pass.
`counts`: kernels, gigabytes of elementwise passes and GiB kept of one step at full size, 28 blocks of width 2048 at
    1024 pixels, on fake CUDA tensors; no GPU is needed.
`graphs`: graphs that compiled blocks have after training at 9 sizes and batches of 1, 2 and 4.
`rounding`: errors of predictions and of a LoRA's gradients, by the type of the base weights, against float64.
`waits`: how often an optimizer step waits for the device.
`start`: seconds until a command is done that does next to nothing.
`vae`: encoding one image, 2-D convolutions against diffusers' 3-D ones.
`cache`: decoding and scaling a folder of JPEG and PNG to 512-pixel buckets, the threads that fill the cache against as
    many threads, and as many processes, that do nothing but call Pillow. At most 1.15 times the better of both.
`scan`: seconds and memory that the first and the second look at a folder of images take, and the plan of an epoch. The
    limits are 60 s and 1 GB.
`save`: how long a step waits for a training state, against copying the tensors to the host, which is all it should wait
    for.
`soak`: a long run of the tiny model in a process of its own, with everything that happens between steps: its memory,
    open files and threads, a quarter of the run at a time. Fails where they grow. On Linux.

The first six print values; with --json each is one JSON object a line, and nothing else is on the standard output.
Absolute times say little on a shared machine; the ratio of two commands run in turn does.
"""

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's anima_train, where it is not installed

import torch

VALUES = ("step", "counts", "graphs", "rounding", "waits", "start")  # these yield values
TABLES = ("vae", "cache", "scan", "save", "soak")  # these print


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=VALUES + TABLES)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cases", type=lambda text: text.split(","), help="of step, counts and rounding")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--side", type=int, help="default 256, of counts 1024")
    parser.add_argument("--rank", type=int, help="default 16, of counts 32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, help="default 2,000 for cache, 100,000 for scan")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--steps", type=int, default=2_000)
    options = parser.parse_args()
    if options.json and options.what in TABLES:
        parser.error(f"{options.what} prints a table, and has no --json")
    if importlib.util.find_spec(f"benchmarks.{options.what}") is None:
        sys.exit(f"{options.what}: scripts/benchmarks/{options.what}.py is not there yet")
    torch.manual_seed(0)
    found = importlib.import_module(f"benchmarks.{options.what}").run(options)
    for values in found or ():
        shown = "  ".join(f"{name} {value}" for name, value in values.items())
        print(json.dumps(values) if options.json else shown, flush=True)


if __name__ == "__main__":
    main()
