"""Is it faster than to map the file and let the operating system page?

Run it as `python -m benchmarks.offload.paging`. Three contenders run the same tokens with the same
choices through the same experts, each in a process of its own:

- offload: `torchmoe.offload`, with a budget of half the experts' bytes;
- mapped: `torchmoe.nn.Experts` whose matrices are views of the same file, mapped into memory, so
  that the system reads a page when it is first touched and evicts what it thinks is needed least;
- resident: `torchmoe.nn.Experts` in memory without a limit, the bound.

The first two run under one limit of the kernel (a memory cgroup, version 1 or 2, for which this
must run as root or in a group that was handed over): half the experts' bytes, what reading needs,
and a margin for the activations. It covers all that a process allocates from the first experts on,
and the file's pages in the page cache; what Python and torch took before does not count. Where no
such limit can be set, the program says so. Then half of the experts, drawn anew for each call, are
evicted from the mapping and the page cache before the call, which only imitates a full memory.

The outputs must be the same bit for bit, which is checked. A setting is a number of tokens; one
token at a time has favourites among the experts, as text has, and many tokens need them all.
"train" has a backward pass too, through frozen experts to their tokens and weights. Under the limit
experts in memory are tried as well: what becomes of them is the last line.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import mmap
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.contenders import positive
from benchmarks.machine import machine as described
from benchmarks.offload.prediction import Size
from torchmoe.nn import Experts
from torchmoe.offload import offload, write_store
from torchmoe.offload.layout import stored_sizes

OFFLOAD, MAPPED, RESIDENT = "offload", "mapped", "resident"
CONTENDERS = (OFFLOAD, MAPPED, RESIDENT)
SIZE = Size(512, 1024, 64, 2)
TOKENS = (1, 4, 256)
TRAINED = (256,)
MARGIN = 48 << 20  # bytes for what is no expert: activations, the libraries' own buffers
WARM_UP, FEWEST, MOST, SECONDS = 5, 5, 200, 4.0  # calls, and seconds of a setting
FAVOURITES = 1.0  # the exponent of Zipf's law, by which single tokens choose

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Result:
    """One contender with one number of tokens."""

    contender: str
    tokens: int
    trains: bool
    milliseconds: float  # the mean of a call
    median_milliseconds: float
    tokens_per_second: float
    megabytes_read: float  # from the disk, a call
    hit_rate: float | None
    calls: int
    outputs: str  # SHA-256 of the first ones


# ---- the limit


class Limit:
    """A memory cgroup below this process's own, in which children can be put."""

    def __init__(self, folder: Path, file: str) -> None:
        """Takes the new group's folder and the name of the file with the limit."""
        self.folder, self._file = folder, file

    @classmethod
    def make(cls) -> Limit | None:
        """A new group, or None where none can be made."""
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("memory", ""):
                continue
            root = "/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup"
            file = "memory.limit_in_bytes" if controllers else "memory.max"
            folder = Path(root + path, f"torchmoe-{os.getpid()}")
            with contextlib.suppress(OSError):
                folder.mkdir()
                if (folder / file).exists():
                    return cls(folder, file)
                folder.rmdir()
        return None

    def set(self, limit: int) -> None:
        """Limits the bytes of all that are in it."""
        (self.folder / self._file).write_text(str(limit))

    def remove(self) -> None:
        """Takes it away once nobody is in it."""
        self.folder.rmdir()


@contextlib.contextmanager
def limited() -> Iterator[Limit | None]:
    """A group for the children, if there can be one."""
    limit = Limit.make()
    try:
        yield limit
    finally:
        if limit is not None:
            limit.remove()


# ---- the contenders, each in a process of its own


def mapped(path: Path, size: Size) -> tuple[Experts, mmap.mmap]:
    """Experts whose matrices are views of the file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        # Copy on write, since torch wants to be allowed to write.
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    experts = size.make("meta")
    for name, parameter in experts.named_parameters():
        tensor = torch.frombuffer(
            view,
            dtype=parameter.dtype,
            count=parameter.numel(),
            offset=8 + length + header[name]["data_offsets"][0],
        )
        setattr(experts, name, nn.Parameter(tensor.view_as(parameter), requires_grad=False))
    return experts, view


class HalfEvicted:
    """Mapped experts of which a random half is evicted before each call."""

    def __init__(self, path: Path, experts: Experts, view: mmap.mmap) -> None:
        """Takes what `mapped` gave."""
        self._path, self._experts, self._view = path, experts, view
        self._random = torch.Generator().manual_seed(0)

    def __call__(self) -> None:
        """Evicts."""
        tensors = [parameter.detach() for parameter in self._experts.parameters()]
        start = min(tensor.data_ptr() for tensor in tensors)
        data = len(self._view) - sum(tensor.nbytes for tensor in tensors)  # the header's bytes
        count = self._experts.num_experts
        chosen = torch.randperm(count, generator=self._random)[: count // 2].tolist()
        with self._path.open("rb") as file:
            for tensor in tensors:
                bytes_each = tensor.nbytes // count
                for expert in chosen:
                    begin = data + tensor.data_ptr() - start + expert * bytes_each
                    end = begin + bytes_each
                    begin -= begin % mmap.PAGESIZE
                    self._view.madvise(mmap.MADV_DONTNEED, begin, end - begin)
                    os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)


def choices(size: Size, tokens: int, random: torch.Generator) -> Tensor:
    """[T, K], different experts for a token; a few tokens have favourites, many have none."""
    shares = torch.ones(size.experts)
    if tokens <= size.experts // 8:
        shares = torch.arange(1, size.experts + 1, dtype=torch.float32) ** -FAVOURITES
        # Not in the order of the file.
        shares = shares[torch.randperm(size.experts, generator=torch.Generator().manual_seed(1))]
    return torch.multinomial(shares.expand(tokens, -1), size.top_k, generator=random)


def contend(options: argparse.Namespace) -> Result:
    """Runs a contender in this process."""
    size, path, tokens = options.size[0], options.store, options.tokens[0]
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, size.hidden, generator=random, requires_grad=options.train)
    warm_up(tokens)
    if options.group:
        # What was allocated before stays with the group that this process comes from.
        Path(options.group, "cgroup.procs").write_text(str(os.getpid()))
    evict: Callable[[], object] = int  # nothing
    call: Call
    if options.contender == OFFLOAD:
        call = offloaded = offload(size.make("meta"), budget=budget_of(size), store=path)
    else:
        experts, view = mapped(path, size)
        call = experts
        if options.contender == RESIDENT:
            call = copy.deepcopy(experts)  # into memory
        elif not options.group:
            evict = HalfEvicted(path, experts, view)
    seconds: list[float] = []
    digest = hashlib.sha256()
    with torch.inference_mode(not options.train):
        for number in range(-WARM_UP, MOST):
            if number == 0:
                read = bytes_from_disk()
                if options.contender == OFFLOAD:
                    offloaded.reset_counters()
            indices = choices(size, tokens, random)
            weights = torch.full(indices.shape, 1 / size.top_k, requires_grad=options.train)
            evict()
            begin = time.perf_counter()
            found = [call(x, indices, weights)]
            if options.train:
                found += torch.autograd.grad(found[0].sum(), (x, weights))
            end = time.perf_counter()
            if number < FEWEST:
                for tensor in found:
                    digest.update(bytes(tensor.untyped_storage()))
            if number >= 0:
                seconds.append(end - begin)
            if number >= FEWEST and sum(seconds) > options.seconds:
                break
    mean = statistics.mean(seconds)
    return Result(
        contender=options.contender,
        tokens=tokens,
        trains=options.train,
        milliseconds=1e3 * mean,
        median_milliseconds=1e3 * statistics.median(seconds),
        tokens_per_second=tokens / mean,
        megabytes_read=(bytes_from_disk() - read) / len(seconds) / 1e6,
        hit_rate=offloaded.hit_rate if options.contender == OFFLOAD else None,
        calls=len(seconds),
        outputs=digest.hexdigest(),
    )


def warm_up(tokens: int) -> None:
    """Lets torch and the library allocate what they keep."""
    experts = Experts(32, 32, 4).requires_grad_(False)
    small = offload(experts, budget=1 << 20)
    with torch.inference_mode():
        small(torch.randn(tokens, 32), torch.zeros(tokens, 1, dtype=torch.int64),
              torch.ones(tokens, 1))  # fmt: skip


def budget_of(size: Size) -> int:
    """Half of the experts, and what reading needs."""
    expert_bytes, window_bytes = stored_sizes("paging", size.make("meta"))
    return size.experts // 2 * expert_bytes + window_bytes


def bytes_from_disk() -> int:
    """That this process has had read."""
    found = re.search(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


# ---- the comparison


@dataclass(frozen=True)
class Setting:
    """What every contender is asked."""

    size: Size
    store: Path
    tokens: int
    trains: bool
    seconds: float


def start(contender: str, setting: Setting, group: Path | None) -> subprocess.CompletedProcess[str]:
    """Runs a contender in a new process to its end."""
    command = [
        *(sys.executable, "-m", "benchmarks.offload.paging", "--contender", contender),
        *("--size", str(setting.size), "--store", str(setting.store)),
        *("--tokens", str(setting.tokens), "--seconds", str(setting.seconds)),
        *("--threads", str(torch.get_num_threads())),
        *(["--train"] if setting.trains else []),
        *([] if group is None else ["--group", str(group)]),
    ]
    drop_from_cache(setting.store)
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run(contender: str, setting: Setting, group: Path | None) -> Result:
    """What a contender has measured."""
    done = start(contender, setting, group)
    if done.returncode != 0:
        raise SystemExit(f"paging: {contender} ended with {done.returncode}: {done.stderr[-2000:]}")
    return Result(**json.loads(done.stdout))


def fate(setting: Setting, group: Path) -> str:
    """What becomes of experts in memory under the limit."""
    done = start(RESIDENT, setting, group)
    if done.returncode == -signal.SIGKILL:
        return "killed by the system"
    return "it runs" if done.returncode == 0 else f"ends with {done.returncode}"


def drop_from_cache(path: Path) -> None:
    """So that whoever reads it pays for it, and its pages count in the reader's group."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(setting: Setting, limit: Limit | None) -> list[Result]:
    """Every contender in one setting."""
    found = []
    for contender in CONTENDERS:
        group = limit.folder if limit is not None and contender != RESIDENT else None
        found.append(run(contender, setting, group))
    if len({result.outputs for result in found}) > 1:
        raise SystemExit(f"paging: the contenders do not agree with {setting.tokens} tokens")
    return found


def row(result: Result, ours: Result) -> str:
    """One line of the table."""
    hits = "" if result.hit_rate is None else f"{result.hit_rate:.2f}"
    what = "train" if result.trains else "infer"
    return (
        f"{result.tokens:>6} {what} {result.contender:<9} {result.milliseconds:>9.2f} ms "
        f"{result.median_milliseconds:>9.2f} ms {result.tokens_per_second:>9.1f} "
        f"{result.megabytes_read:>8.1f} MB {hits:>8} {result.calls:>5} "
        f"{result.milliseconds / ours.milliseconds:>8.2f}"
    )


HEAD = (
    f"{'tokens':>6} {'':<5} {'':<9} {'mean call':>12} {'median':>12} {'tokens/s':>9} {'read':>11} "
    f"{'hit rate':>8} {'calls':>5} {'of ours':>8}"
)


def main(arguments: list[str] | None = None) -> int:
    """Compares and prints a table; with --contender runs one and prints JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offload.paging",
        description="Compares offloaded experts with mapped ones under the same memory limit.",
    )
    parser.add_argument(
        "--size", type=Size.parse, action="append", metavar="H,I,E,K", help=f"default {SIZE}"
    )
    parser.add_argument(
        "--tokens", type=positive, action="append", help=f"may be repeated (default: {TOKENS})"
    )
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each contender")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the numbers, too")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=positive, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.contender:
        torch.set_num_threads(options.threads)
        print(json.dumps(asdict(contend(options))))
        return 0
    size = options.size[0] if options.size else SIZE
    print(*(f"{name}: {value}" for name, value in described().items()), sep="; ")
    results = []
    with (
        tempfile.TemporaryDirectory(prefix="torchmoe-offload-", dir=options.folder) as folder,
        limited() as limit,
    ):
        store = Path(folder, "experts.safetensors")
        write_store(store, size.make())
        if limit is None:
            print("no memory cgroup can be made here: mapped experts are evicted before each call")
        else:
            limit.set(budget_of(size) + MARGIN)
            print(f"limit: {(budget_of(size) + MARGIN) / 1e6:.0f} MB in {limit.folder}")
        print(f"H,I,E,K = {size}, {store.stat().st_size / 1e6:.0f} MB of experts\n{HEAD}")
        settings = [
            Setting(size, store, tokens, trains, options.seconds)
            for trains, usual in ((False, TOKENS), (True, TRAINED))
            for tokens in options.tokens or usual
        ]
        for setting in settings:
            found = compare(setting, limit)
            print(*(row(result, found[0]) for result in found), sep="\n", flush=True)
            results += found
        if limit is not None:
            print(f"experts in memory, under the limit: {fate(settings[0], limit.folder)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
