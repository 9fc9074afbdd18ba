"""Several processes that train together: they start from the same facts, and where one fails, all end.

Every process has a connection to process 0 and a thread that listens to it, because the main thread may wait for days
in a collective operation that a failed process will never join. A process that fails says so, and why; one that is
killed closes its connection, which says enough. Process 0 prints the first failure and passes it on.
"""

import contextlib
import hmac
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from io import BufferedRWPair
from types import TracebackType

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from anima_train import __version__
from anima_train.config.load import LoadedConfig
from anima_train.core.errors import ConfigError, DataError, Interrupted, UserError
from anima_train.core.format import count, printable_lines
from anima_train.data.loader import CachedData
from anima_train.data.plan import Plan
from anima_train.data.scan import Scan
from anima_train.run.manifest import LIBRARIES, dataset_digest

CONNECT = 60.0  # seconds in which every process must have reached process 0
GREETING = 5.0  # seconds in which a process that has reached it says who it is
CAUSE = 1.0  # seconds in which a process that fails may hear that another one failed first, and took it along
BY_ITSELF = 5.0  # seconds in which a process comes to its own end after another one was interrupted
ANSWER = 10.0  # seconds in which process 0 ends a process that has told it of a failure
FLUSH = 5.0  # seconds in which output must be taken: a pipe that nobody reads holds no process back
MAX_SHOWN = 100  # characters of a value in a message


@dataclass(frozen=True)
class Failure:
    """Why all processes have to end."""

    text: str
    exit_code: int
    is_stop: bool = False  # somebody has asked for it, and each process may have heard that itself
    trace: str = ""  # where it was, if it is a fault of ours
    at: float = field(default_factory=time.time)  # seconds since the epoch

    @classmethod
    def of(cls, error: BaseException, rank: int) -> "Failure":
        """What an exception on one process means for all."""
        if isinstance(error, UserError):
            text = "\n".join(f"{error.label} (process {rank}): {problem}" for problem in error.problems)
            return cls(text, error.exit_code, isinstance(error, Interrupted))
        if isinstance(error, KeyboardInterrupt):
            return cls(f"stopped (process {rank}): at once, by Ctrl-C", 130)
        trace = "".join(traceback.format_exception(error))
        return cls(f"error (process {rank}): {type(error).__name__}: {error}", 1, trace=trace)

    @classmethod
    def silent(cls, rank: int) -> "Failure":
        """What it means that a process is gone and has said nothing."""
        return cls(
            f"error (process {rank}): it ended without a message: it was killed, perhaps for want of memory, or it "
            "crashed; see the system's log",
            1,
        )


class Together:
    """While it is entered, a failure of one process ends all of them, and is printed once.

    It returns from a failure only where there is one process, or where the run was interrupted: there each process
    comes to its end in good order.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank: int = accelerator.process_index
        self.num_processes: int = accelerator.num_processes
        self.connections: dict[int, BufferedRWPair] = {}  # to process 0; of process 0, to all others
        self.has_left = threading.Event()
        self.has_news = threading.Event()  # of another's failure
        self.ending = threading.Lock()

    def __enter__(self) -> "Together":
        if self.num_processes == 1:
            return self
        self.connections = accept_all(self.num_processes) if self.rank == 0 else {0: connect(self.rank)}
        for rank, connection in self.connections.items():
            threading.Thread(target=self.listen, args=(rank, connection), name=f"process {rank}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.num_processes == 1:
            return
        if error is None or isinstance(error, Interrupted):
            self.tell(None if error is None else Failure.of(error, self.rank))
            self.has_left.set()
            return
        failure = Failure.of(error, self.rank)
        # One that all processes meet is told by process 0, and what follows from another's failure by that one.
        if (self.rank or not isinstance(error, UserError)) and self.has_news.wait(CAUSE):
            time.sleep(BY_ITSELF + ANSWER)  # the listener ends this process
        if self.rank:
            self.tell(failure)
            time.sleep(ANSWER)
        self.end(failure, is_told=True)

    def tell(self, failure: Failure | None) -> None:
        """Send a failure to all that this process is connected to; None: it needs the others no more."""
        line = json.dumps(None if failure is None else asdict(failure)) + "\n"
        for connection in self.connections.values():
            with contextlib.suppress(OSError):  # it is gone already
                connection.write(line.encode())
                connection.flush()

    def listen(self, rank: int, connection: BufferedRWPair) -> None:
        """Wait for a word of another process, and end this one where it is a failure, or silence."""
        try:
            line = connection.readline()
        except OSError:
            line = b""
        if not line:
            self.has_news.set()
            self.end(Failure.silent(rank), is_told=self.rank == 1)
        elif (message := json.loads(line)) is not None:
            self.has_news.set()
            self.end(Failure(**message), is_told=False)

    def end(self, failure: Failure, is_told: bool) -> None:
        """End this process without waiting for anything; process 0 prints the failure and ends the others.

        Args:
            failure: the reason.
            is_told: whether this process prints it, although it is not process 0.
        """
        if self.has_left.wait(BY_ITSELF if failure.is_stop else 0):
            return
        self.ending.acquire()  # for good: the first failure is the one that counts
        last = threading.Timer(FLUSH, os._exit, (failure.exit_code,))
        last.daemon = True
        last.start()
        if self.rank == 0 or is_told:
            with contextlib.suppress(OSError, ValueError):  # closed
                print(f"{failure.trace}{printable_lines(failure.text)}", file=sys.stderr, flush=True)
        if self.rank == 0:
            self.tell(failure)
        write_error_file(failure.text, failure.at)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(failure.exit_code)  # `sys.exit` would only end the thread, and wait for others


def accept_all(num_processes: int) -> dict[int, BufferedRWPair]:
    """Process 0's connections to all others.

    Raises:
        ConfigError: some of them could not be made.
    """
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(num_processes)
    has_both = not is_one_machine and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if has_both else socket.AF_INET
    host = "127.0.0.1" if is_one_machine else os.environ.get("MASTER_ADDR", socket.gethostname())
    address = (host if is_one_machine else "", 0)
    secret = secrets.token_hex().encode()  # keeps out others on the network
    connections: dict[int, BufferedRWPair] = {}
    with socket.create_server(address, family=family, backlog=num_processes, dualstack_ipv6=has_both) as server:
        broadcast_object_list([host, server.getsockname()[1], secret])
        deadline = time.monotonic() + CONNECT
        while len(connections) < num_processes - 1:
            try:
                server.settimeout(max(0.001, deadline - time.monotonic()))
                accepted, _ = server.accept()
            except OSError as error:
                raise ConfigError(
                    f"{num_processes - 1 - len(connections)} of the processes did not reach process 0 at {host} in "
                    f"{CONNECT:.0f} s ({error}); the machines must let TCP connections between them through"
                ) from error
            with contextlib.suppress(OSError):  # of a stranger, who says nothing
                accepted.settimeout(GREETING)
                connection = accepted.makefile("rwb")
                given, _, rank = connection.readline(2 * len(secret)).partition(b" ")
                if hmac.compare_digest(given, secret):
                    accepted.settimeout(None)
                    connections[int(rank)] = connection
    return connections


def connect(rank: int) -> BufferedRWPair:
    """Another process's connection to process 0.

    Raises:
        ConfigError: it could not be made.
    """
    host, port, secret = broadcast_object_list([None, None, None])
    try:
        made = socket.create_connection((host, port), timeout=CONNECT)
        made.sendall(b"%s %d\n" % (secret, rank))
    except OSError as error:
        raise ConfigError(
            f"process {rank} cannot reach process 0 at {host}, port {port} ({error}); the machines must let TCP "
            "connections between them through"
        ) from error
    made.settimeout(None)
    return made.makefile("rwb")


def write_error_file(text: str, failed_at: float) -> None:
    """Have `torchrun` show this failure at the foot of its own report.

    Every process writes it, as `torchrun` shows what the first one has left that it sees gone.

    Args:
        text: what is shown.
        failed_at: seconds since the epoch.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        facts = {"message": {"message": text, "extraInfo": {"timestamp": str(int(failed_at))}}}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump(facts, file)


def settled(loaded: LoadedConfig, accelerator: Accelerator) -> LoadedConfig:
    """The configuration with process 0's name of the run, and a note where processes run different programs.

    Raises:
        ConfigError: the processes have read different configurations.
    """
    values = loaded.config.model_dump(exclude={"monitoring": {"wandb_api_key"}})
    problems = differences(accelerator, dict(flat(values)))
    if problems:
        raise ConfigError([*problems, "all processes must get the same configuration: copy the files to all machines"])
    versions = {"anima-train": __version__, **{name: version(name) for name in LIBRARIES}}
    notes = [f"{line}; install the same version everywhere" for line in differences(accelerator, versions)]
    (name,) = broadcast_object_list([loaded.run_name])  # it may come from the clock
    return replace(loaded, run_name=name, notes=(*loaded.notes, *notes))


def check_same_data(scans: Mapping[str, Scan], accelerator: Accelerator) -> None:
    """Check that all processes have found the same images and captions.

    Raises:
        DataError: they have not.
    """
    if accelerator.num_processes == 1:
        return
    facts = {
        f"dataset {name}": f"{count(len(found.samples), 'sample')} (sha256 {dataset_digest(found.samples)[:16]})"
        for name, found in scans.items()
    }
    if problems := differences(accelerator, facts):
        remedy = "all processes must see the same images and captions: a folder was changed while the run started, or "
        raise DataError([*problems, f"{remedy}it is not the same on all machines; start again when it is"])


def check_same_plan(data: CachedData, plan: Plan, num_steps: int, accelerator: Accelerator) -> None:
    """Check that all processes are about to make the same steps from the same latents and text.

    Raises:
        DataError: they are not.
    """
    if accelerator.num_processes == 1:
        return
    buckets = Counter(f"{sample.size}@{sample.resolution}" for sample in plan.samples)
    facts = {
        "samples": f"{len(plan.samples):,} (sha256 {dataset_digest(plan.samples)[:16]})",
        "buckets": ", ".join(f"{bucket}: {number:,}" for bucket, number in sorted(buckets.items())),
        "batch sizes": str(plan.batch_sizes),
        "seed": str(plan.seed),
        "micro-batches per step": str(plan.micro_batches_per_step),
        "steps": f"{num_steps:,}",
        "VAE": f"sha256 {data.vae_identity[:16]}",
        "text encoder": str(data.text_identity),
    }
    if problems := differences(accelerator, facts):
        remedy = "all processes must train on the same: make the cache and the model's files the same on all machines"
        raise DataError([*problems, remedy])


def differences(accelerator: Accelerator, facts: Mapping[str, str]) -> list[str]:
    """In which of these facts which processes differ from process 0; every process gets the same answer."""
    first, *others = gather_object([dict(facts)])
    return [
        f"process {rank} differs from process 0 in {name}: {shown(theirs.get(name))} there, {shown(first.get(name))} "
        "here"
        for rank, theirs in enumerate(others, start=1)
        for name in dict.fromkeys((*first, *theirs))
        if theirs.get(name) != first.get(name)
    ]


def shown(value: str | None) -> str:
    """A value as messages show it."""
    if value is None:
        return "nothing"
    return value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]}..."


def flat(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Every key path in nested tables and lists with its value, as text."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from flat(inner, f"{key}[{index}]")
    else:
        yield key, repr(value)
