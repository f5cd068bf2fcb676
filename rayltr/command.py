"""What the commands share: options, exit codes, one clear line for every error."""

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, NoReturn

from rayltr import catalogue, records
from rayltr.data import Data, load, recognise
from rayltr.spec import Fn, Stage, chain, dump, fn
from rayltr.studies import Plan

USAGE, PREFLIGHT, FAILED, INTERRUPTED = 2, 3, 4, 130
"""Exit codes: bad input; machines, storage or data that do not fit; some trials failed; interrupted, to be resumed."""

PROBE = -2.0
"""Stands for the share of a GPU that a trial is measured to need (`--gpus-per-trial auto`)."""

LEAST = {
    **dict.fromkeys(("trials", "epochs", "batch", "workers", "stack", "cpus_per_trial", "threads", "size", "ratio"), 1),
    **dict.fromkeys(("concurrent", "finalists", "gpus_per_trial", "seed", "imbalance_seed", "snapshot_seconds"), 0),
}
"""The smallest value of each option that is a number."""

VERSIONS = ("rayltr", "torch", "torchvision", "ray", "optuna", "timm", "numpy", "pyarrow")


NVIDIA = Path("/proc/driver/nvidia")


class Refused(Exception):
    """The command ends here, with the exit code given; the message says why and what is possible."""

    def __init__(self, message: str, code: int = PREFLIGHT):
        super().__init__(message)
        self.code = code


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without a page of usage before it; knows options by their whole names only."""

    def __init__(self, **about: Any):
        super().__init__(**about, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def run(main: Callable[[Sequence[str] | None], int], arguments: Sequence[str] | None = None) -> int:
    """Calls a command and turns what a user can mend into one line on standard error and an exit code."""
    try:
        return main(arguments)
    except Refused as refusal:
        code, text = refusal.code, str(refusal)
    except ValueError as error:
        code, text = USAGE, str(error)
    except OSError as error:
        code, text = PREFLIGHT, str(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        sys.stdout = None
        return 0
    print(f"rayltr: {' '.join(text.split())}", file=sys.stderr)
    return code


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """The options, if their numbers and the name of the run make sense; else raises ValueError for the first."""
    for name, least in LEAST.items():
        value = getattr(options, name, None)
        if isinstance(value, (int, float)) and not value >= least:  # nan is no number either
            hint = f": did you mean {1 / value:g}?" if name == "ratio" and 0 < value < 1 else ""
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {value}{hint}")
    if "://" in getattr(options, "storage", ""):
        raise ValueError(f"--storage {options.storage} is no folder; a cluster shares one by NFS, say")
    if options.name and (Path(options.name).name != options.name or options.name == ".."):
        raise ValueError(f"--name {options.name} is no name of a folder; --storage says where the folder lies")
    return options


def data_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is trained on and how long."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="NAME|PATH", help="a source by name (digits, cifar10, cifar100, "
                       "synthetic), or a folder of images, Parquet or list files (default: the study's)")  # fmt: skip
    group.add_argument("--ratio", type=float, metavar="R", help="build a long tail: largest / smallest class, >= 1")
    group.add_argument("--profile", choices=("exponential", "step", "pareto"), help="shape of the tail that is built")
    group.add_argument("--imbalance-seed", type=int, metavar="N", help="which images the long tail keeps (default 0)")
    group.add_argument("--paper-split", action="store_true", help="exactly the published training set")
    group.add_argument("--validation", choices=("surplus", "official", "cv", "holdout"), help="default: what fits")
    group.add_argument("--size", type=int, metavar="PX", help="resize and crop images to PX x PX")
    group.add_argument("--skip-corrupt", action="store_true", help="leave out images that cannot be read")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, metavar="E", help="length of a whole chain; every stage keeps its share")
    group.add_argument("--batch", type=int, metavar="B", help="images per step, over all workers")
    group.add_argument("--backbone", metavar="NAME[:ARG]", help="e.g. resnet32, timm:resnet50, torchvision:resnet18")
    group.add_argument("--precision", choices=catalogue.PRECISIONS, help="a search: bf16 where the hardware has it")
    group.add_argument("--seed", type=int, metavar="N", help="of weights and batches (default: the recipe's own, 0)")


def source_of(options: argparse.Namespace, default: Fn) -> Fn:
    """The source that the options name, with their changes.  Raises ValueError for one that does not exist."""
    source = default if options.data is None else named_source(options.data)
    changes = {name: getattr(options, name) for name in ("ratio", "profile", "imbalance_seed", "validation", "size")}
    changes |= {name: getattr(options, name) or None for name in ("paper_split", "skip_corrupt")}
    source = source.but(**{name: value for name, value in changes.items() if value is not None})
    catalogue.completed("source", source)
    return source


def named_source(text: str) -> Fn:
    if text in catalogue.names("source"):
        return fn(text)
    if Path(text).exists():
        return recognise(Path(text).absolute())
    known = catalogue.nearest(text, catalogue.names("source"))
    raise ValueError(f"unknown source {text!r}, and no such path: {known}; or the path of a folder")


def plan_of(options: argparse.Namespace, place: str, default: Stage) -> Plan:
    """The plan that the options ask for.  `place`: name or path of the study; `default`: a chain, for its source."""
    name, _, argument = (options.backbone or "").partition(":")
    return Plan(
        study=place,
        source=source_of(options, default.source),
        epochs=options.epochs,
        batch=options.batch,
        backbone=fn(name, **({"model": argument} if argument else {})) if name else None,
        precision=options.precision,
        seed=options.seed,
    )


def native_precision() -> str:
    """bf16 where there is an NVIDIA GPU or the processor computes in it, else fp32: elsewhere it is emulated."""
    if (NVIDIA / "version").exists():
        return "bf16"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def opened(source: Fn) -> Data:
    """The data of a source.  Raises `Refused` with one line for what cannot be read."""
    try:
        return load(source)
    except (ValueError, OSError) as error:
        raise Refused(str(error)) from error


def usable(device: str | None) -> None:
    """Raises `Refused` for a device that torch cannot compute on here."""
    if device is None:
        return
    try:
        import_module("torch").empty(0, device=device)  # only now: it takes seconds
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"the device {device} cannot be used: {str(error).splitlines()[0]}") from error


def fitting_batch(images: int) -> int:
    """Images per step for small sets, so that an epoch has ten steps or more: 16 ... 128."""
    return max(size for size in (16, 32, 64, 128) if size == 16 or images >= 10 * size)


def described(source: Fn, data: Data) -> str:
    """One line about the data."""
    ratio = source.get("ratio")
    built = f", ratio {ratio:g}" if ratio else ""
    counts = data.counts
    even = "; they are not long-tailed, --ratio R makes them so" if counts.max() < 2 * counts.min() else ""
    return (
        f"{source.get('root', source.name)}{built}: {len(data.classes)} classes, {counts.sum()} training images "
        f"({counts.max()} to {counts.min()} per class), {len(data.val)} validation images{even}"
    )


def fingerprint(*values: Any) -> str:
    """Eight hex digits that name what was asked."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def plan_json(plan: Plan) -> dict[str, Any]:
    return {name: dump(value) for name, value in vars(plan).items()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The name of this machine's processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def gpus() -> list[str]:
    """The names of this machine's NVIDIA GPUs, as the driver tells them on Linux: torch would take seconds to load."""
    files = sorted(NVIDIA.glob("gpus/*/information"))
    return [name for path in files for name in re.findall(r"^Model:\s*(.+)", path.read_text(), re.MULTILINE)]


def typed(program: str, more: Sequence[str], arguments: Sequence[str] | None) -> str:
    """The command as the user typed it (`arguments` None: on the command line), and `more`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return shlex.join(["python", "-m", program, *words, *more])


def begin(run: Path, study: str, data: Data, options: argparse.Namespace, more: Mapping[str, Any]) -> None:
    """Writes the run.json of a new run.  Raises `Refused` for a storage that cannot be written or a folder in use."""
    if run.exists() and not (run.is_dir() and not any(run.iterdir())):
        raise Refused(f"{run} exists and is no run; choose another --name")
    about = {"digest": data.digest, "classes": list(data.classes), "counts": data.counts.tolist()}
    about["size"] = list(data.size)
    info = {
        "study": study,
        "data": data.manifest | about,
        "arguments": vars(options),
        "versions": versions(),
        "machine": {"processor": processor(), "gpus": gpus()},
        "seeds": {"seed": options.seed or 0, "imbalance_seed": options.imbalance_seed or 0},
        "openings": [],
        **more,
    }
    try:
        records.write_run(run, info)
    except OSError as error:
        raise Refused(f"the storage {run.parent} cannot be written: {error}") from error


def count_opening(run: str | Path, trials: Sequence[str], when: datetime | None = None) -> None:
    """Notes in run.json that trials meet the test split; before anything is seen, so that no interruption hides it."""
    info = records.read_run(run)
    opening = {"when": (when or datetime.now(UTC)).isoformat(timespec="seconds"), "trials": [*trials]}
    records.write_run(run, {**info, "openings": [*info["openings"], opening]})


def locked(run: Path) -> IO[str]:
    """Keeps other commands from writing to a run while the file is open.  Raises `Refused` when another one does."""
    lock = open(run / "lock", "a+")  # noqa: SIM115 - the caller holds it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        raise Refused(f"{run} is in use: {lock.read()} writes to it") from error
    except OSError:  # some network file systems have no locks
        return lock
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def length(stage: Stage) -> int:
    return sum(own.epochs for own in chain(stage))
