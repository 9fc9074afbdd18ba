"""Decoding and resizing in processes of their own, so that neither the VAE nor the GIL makes it wait.

`Workers.run` is called from threads, each of which waits for one process; `python -m anima_train.data.workers` is such
a process. It imports Pillow and numpy, never torch. Work and results go through its pipes: a length, a JSON header,
raw bytes. It ends when its standard input does, so it never outlives the run.
"""

import dataclasses
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from PIL import Image

if sys.platform == "linux":
    import fcntl

from anima_train.core.errors import DataError
from anima_train.data.image_headers import BadImage, Unreadable, read_file
from anima_train.data.images import Crop, decode_alpha, decode_and_crop, decode_mask, mask_to_latent

MIN_ITEMS = 32  # with fewer, starting processes takes longer than it saves
MAX_WORKERS = 16  # more than any VAE needs
MODULE = "anima_train.data.workers"
PIPE_BYTES = 2**20

Source = Path | bytes  # a file, or its content


@dataclass(frozen=True)
class PixelWork:
    """An image to be decoded, scaled and cropped."""

    name: str  # for messages
    source: Source
    sha256: str  # of the file, as it was when its size was read
    crop: Crop


@dataclass(frozen=True)
class MaskWork:
    """A mask to be made from a mask file, from an image's opacity, or from both."""

    name: str  # for messages
    mask: Source | None
    image: Source | None  # None: its opacity does not count
    mask_sha256: str
    image_sha256: str
    image_size: tuple[int, int]  # (width, height), upright
    crop: Crop


Work = PixelWork | MaskWork


def result(work: Work) -> np.ndarray:
    """The work done: `pixels` or `mask`."""
    return pixels(work) if isinstance(work, PixelWork) else mask(work)


def pixels(work: PixelWork) -> np.ndarray:
    """The image as (h, w, 3) uint8.

    Raises:
        BadImage: it cannot be decoded; `Unreadable` where it cannot be read, or is another one by now.
    """
    return np.array(decode_and_crop(content(work.source, work.sha256), work.crop))


def mask(work: MaskWork) -> np.ndarray:
    """The mask as (1, h // 8, w // 8) float32 in [0, 1]; where file and opacity both count, their product.

    Raises:
        BadImage: as `pixels`, of the mask file or of the image.
    """
    weights = Image.new("L", work.image_size, "white")
    if work.mask is not None:
        try:
            weights = decode_mask(content(work.mask, work.mask_sha256), work.image_size)
        except BadImage as error:
            name = f" {work.mask.name}" if isinstance(work.mask, Path) else ""
            raise type(error)(f"its mask{name}: {error}") from error
    if work.image is not None:
        alpha = decode_alpha(content(work.image, work.image_sha256))
        alpha = alpha.resize(work.image_size, Image.Resampling.BILINEAR)
        weights = Image.composite(weights, Image.new("L", work.image_size), alpha)  # the product, rounded to nearest
    return mask_to_latent(weights, work.crop)


def content(source: Source, sha256: str) -> bytes:
    """The bytes of a file, read once: what is decoded is what has been checked.

    Raises:
        BadImage: as `read_file`; `Unreadable` where they are not the bytes with this hash.
    """
    found = source if isinstance(source, bytes) else read_file(source)
    if hashlib.sha256(found).hexdigest() != sha256:
        raise Unreadable("changed while the run was starting")
    return found


# In this process: who does the work


def num_workers(number_of_items: int, processes_on_this_machine: int) -> int:
    """How many worker processes pay off for each process of a run: 0 (none) to 16."""
    if number_of_items < MIN_ITEMS:
        return 0
    return min(MAX_WORKERS, max(1, usable_cpus() // processes_on_this_machine))


def usable_cpus() -> int:
    """The CPUs that this process may use."""
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """A number of processes that do work for any number of threads; each is started when it is first needed.

    Not multiprocessing: its spawned processes import the main module and with it torch, which takes seconds and
    hundreds of megabytes each, and its forked ones break once there are threads or CUDA.
    """

    def __init__(self, number: int) -> None:
        """`number` of processes; 0: the threads themselves do the work, in this process."""
        self.number = number
        self.processes: list[subprocess.Popen[bytes]] = []  # that have been started
        self.idle: list[subprocess.Popen[bytes]] = []
        self.is_closed = False
        self.changed = threading.Condition()  # guards the three above

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def num_threads(self) -> int:
        """How many threads keep all processes busy: while some hand over a result, one has the next work ready."""
        return max(2, self.number + 1)

    def run(self, work: Work) -> np.ndarray:
        """Have the work done, and wait for it.

        Raises:
            BadImage: as `pixels` and `mask`.
            DataError: memory ran out, or the process died; other work is not affected.
            RuntimeError: the workers are closed.
        """
        try:
            if self.number == 0:
                return result(work)
            with self.one_process(work) as process:
                header, parts = exchange(process, work)
        except MemoryError as error:
            raise DataError(f"{work.name}: there is not enough memory to decode it") from error
        except ProcessDied as error:
            if self.is_closed:
                raise RuntimeError("the workers were closed") from error
            raise DataError(f"{work.name}: the process decoding it {error}") from error
        return result_of(work, header, parts)

    @contextmanager
    def one_process(self, work: Work) -> Iterator[subprocess.Popen[bytes]]:
        """A process that nobody else uses meanwhile; where that ends with an exception, so does the process."""
        with self.changed:
            self.changed.wait_for(lambda: self.is_closed or self.idle or len(self.processes) < self.number)
            if self.is_closed:
                raise RuntimeError("the workers are closed")
            if self.idle:
                process = self.idle.pop()
            else:
                try:
                    process = start()
                except OSError as error:
                    raise DataError(f"{work.name}: no process can be started to decode it: {error}") from error
                self.processes.append(process)
        is_usable = False
        try:
            yield process
            is_usable = True
        finally:
            with self.changed:
                is_usable = is_usable and not self.is_closed
                if is_usable:
                    self.idle.append(process)
                else:
                    self.processes.remove(process)
                self.changed.notify()
            if not is_usable:
                end(process)

    def close(self) -> None:
        """End all processes, those at work too: they hold nothing that could be lost."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()
            idle, self.idle = self.idle, []
            busy = [process for process in self.processes if process not in idle]
            self.processes = [process for process in self.processes if process in busy]
            for process in busy:  # the thread that waits for it will see its pipe end
                process.kill()
        for process in idle:
            end(process)


class ProcessDied(Exception):
    """A worker process ended before it answered; the message says how."""


def start() -> subprocess.Popen[bytes]:
    """A new worker process, which finds modules where this one does."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OPENBLAS_NUM_THREADS": "1",  # numpy's, which would make one for each CPU and use none
    }
    # -P: the current folder is not where modules are looked for, unless it is here.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    if sys.platform == "linux":
        # A whole result fits, else worker and thread wake each other for every 64 KB. Refused to users with many pipes.
        with suppress(OSError):
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(OSError):  # what could not be written to it is still in the buffer
            pipe.close()


def exchange(process: subprocess.Popen[bytes], work: Work) -> tuple[dict[str, Any], list[bytearray]]:
    """Give a process work, and wait for its answer.

    Raises:
        ProcessDied: there is none.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        send(process.stdin, *work_message(work))
        return receive(process.stdout)
    except (OSError, EOFError) as error:
        raise ProcessDied(last_words(process)) from error


def last_words(process: subprocess.Popen[bytes]) -> str:
    """How a process ended that has closed its pipes."""
    status = process.wait()
    if status >= 0:
        return f"ended (exit status {status}); what it wrote to the terminal says why"
    reason = "perhaps memory ran out" if -status == getattr(signal, "SIGKILL", None) else "perhaps the file crashed it"
    return f"was killed (signal {-status}); {reason}; if it happens again, free memory or take the image away"


def result_of(work: Work, header: dict[str, Any], parts: Sequence[bytearray]) -> np.ndarray:
    """What a worker's answer says: an array, or the exception that doing the work raised."""
    error = header.get("error")
    if error == "memory":
        raise DataError(f"{work.name}: there is not enough memory to decode it")
    if error is not None:
        raise (Unreadable if error == "unreadable" else BadImage)(header["reason"])
    return np.frombuffer(parts[0], dtype=header["dtype"]).reshape(header["shape"])


# Messages


def send(file: IO[bytes], header: dict[str, Any], parts: Sequence[bytes | memoryview]) -> None:
    """Write one message: the header's length in 4 bytes, the header as JSON, the parts."""
    # Names that are no UTF-8 survive: Python holds their bytes as lone surrogates, which JSON escapes.
    text = json.dumps({**header, "parts": [memoryview(part).nbytes for part in parts]}).encode("ascii")
    file.write(struct.pack(">I", len(text)) + text)
    for part in parts:
        file.write(part)
    file.flush()


def receive(file: IO[bytes]) -> tuple[dict[str, Any], list[bytearray]]:
    """Read one message; raises EOFError if there is none, or only half of one."""
    (length,) = struct.unpack(">I", read_exactly(file, 4))
    header = json.loads(read_exactly(file, length))
    return header, [read_exactly(file, length) for length in header.pop("parts")]


def read_exactly(file: IO[bytes], length: int) -> bytearray:
    """So many bytes; raises EOFError if the file ends before."""
    data = bytearray(length)
    if file.readinto(data) != length:  # type: ignore[attr-defined]  # IO does not have it, binary files do
        raise EOFError
    return data


def work_message(work: Work) -> tuple[dict[str, Any], list[bytes]]:
    """Header and parts that hold the work."""
    header: dict[str, Any] = {field.name: getattr(work, field.name) for field in dataclasses.fields(work)}
    sources: dict[str, Source] = {name: value for name, value in header.items() if isinstance(value, Path | bytes)}
    header.update(
        dict.fromkeys(sources),
        sources={name: "path" if isinstance(source, Path) else "bytes" for name, source in sources.items()},
        crop=dataclasses.asdict(work.crop),
        kind=type(work).__name__,
    )
    # Absolute, because this process may have gone to another folder since it started the worker.
    return header, [os.fsencode(part.absolute()) if isinstance(part, Path) else part for part in sources.values()]


def work_of(header: dict[str, Any], parts: Sequence[bytearray]) -> Work:
    """The work in a message."""
    kind = header.pop("kind")
    for (name, source), part in zip(header.pop("sources").items(), parts, strict=True):
        header[name] = Path(os.fsdecode(bytes(part))) if source == "path" else bytes(part)
    crop = header.pop("crop")
    header["crop"] = Crop(**{**crop, "position": tuple(crop["position"])})
    if kind == "PixelWork":
        return PixelWork(**header)
    return MaskWork(**{**header, "image_size": tuple(header["image_size"])})


# In a worker process


def answer(work: Work) -> tuple[dict[str, Any], list[memoryview]]:
    """Header and parts of the message that says what came of the work."""
    try:
        array = np.ascontiguousarray(result(work))
    except Unreadable as error:
        return {"error": "unreadable", "reason": str(error)}, []
    except BadImage as error:
        return {"error": "bad", "reason": str(error)}, []
    except MemoryError:
        return {"error": "memory"}, []
    return {"dtype": str(array.dtype), "shape": array.shape}, [array.data]


def main() -> None:
    """Do work until standard input ends."""
    # Ctrl-C reaches every process in the terminal, but it is for the run to say when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that nothing that prints gets between the messages
    while True:
        try:
            header, parts = receive(sys.stdin.buffer)
        except EOFError:
            return
        reply = answer(work_of(header, parts))
        try:
            send(replies, *reply)
        except OSError:  # the run is gone; not `return`, which would try to flush what is left
            os._exit(0)


if __name__ == "__main__":
    main()
