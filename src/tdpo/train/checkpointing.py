"""Checkpoints that are whole or not there: written aside, listed in a manifest, made durable, then renamed.

``checkpoint-30.partial`` is being written or removed and never read; ``checkpoint-30`` has a ``manifest.json`` with the
size of each of its files, so that one that was cut short on its way (a copy, a full disk) is recognised.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tdpo.errors import UserError
from tdpo.files import PARTIAL, flush

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(folder: Path) -> int:
    """The optimizer step a checkpoint was written at.

    Example:
        >>> step_of(Path("out/checkpoint-30"))
        30
    """
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder} is not named as a checkpoint is")
    return int(match[1])


def run_state_name(process: int) -> str:
    """The file with what the trainer itself remembers of one process; it is JSON, nothing in it runs."""
    return f"run_state_{process}.json"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Every folder that is named as a checkpoint, by step."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def flaw(folder: str | Path) -> str:
    """What is wrong with a checkpoint, in words; empty if it is whole."""
    folder = Path(folder)
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sizes"]
        for name, size in sizes.items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                return f"{name} is missing" if found is None else f"{name} has {found} of {size} bytes"
    except FileNotFoundError:
        return f"{MANIFEST} is missing, which is written last"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return ""


def newest_whole(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one that was passed over."""
    passed: list[str] = []
    for folder in reversed(checkpoints(output_dir)):
        wrong = flaw(folder) or ("" if (folder / run_state_name(0)).is_file() else "it has the model alone")
        if not wrong:
            return folder, passed
        passed.append(f"{folder.name} is not whole and is passed over: {wrong}")
    return None, passed


def remove(folder: Path) -> None:
    """Removes a checkpoint; one that is half removed has lost its name first."""
    aside = folder.with_name(f"{folder.name}.old{PARTIAL}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def rotate(output_dir: str | Path, keep: int | None, written: Path, best: str | None) -> None:
    """Removes the oldest checkpoints beyond ``keep``; never the one just written, nor the best.

    Args:
        output_dir: Where the checkpoints are.
        keep: How many may stay; None or 0 keeps all.
        written: The one just written. It is whole, so one that can be resumed from always stays.
        best: The best by the metric, or None.
    """
    if not keep or keep < 0 or flaw(written):
        return
    whole = [path for path in checkpoints(output_dir) if not flaw(path)]
    # By age, not by step: after going on from an earlier checkpoint, later steps of the abandoned run are the old ones.
    whole.sort(key=lambda path: (path.stat().st_mtime_ns, step_of(path)))
    protected = {written.resolve()} | ({Path(best).resolve()} if best else set())
    spare = [path for path in whole if path.resolve() not in protected]
    for path in spare[: max(len(whole) - keep, 0)]:
        remove(path)


def clear_partial(output_dir: str | Path) -> None:
    """Removes what an interrupted run was writing or removing."""
    for path in Path(output_dir).glob(f"checkpoint-*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)
    for path in Path(output_dir).glob(f"*{PARTIAL}-*"):
        path.unlink(missing_ok=True)


def seal(folder: Path) -> None:
    """Makes the files of a folder durable and lists their sizes in its manifest, written last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    for path in files:
        flush(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"sizes": {str(p.relative_to(folder)): p.stat().st_size for p in files}}, indent=1))
    flush(manifest)
    for inner in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush(inner)


def publish(aside: Path, final: Path) -> None:
    """Gives a sealed checkpoint its name, in place of one that may have it."""
    if final.exists():
        remove(final)
    aside.rename(final)
    flush(final.parent)


def move_into(aside: Path, folder: Path) -> None:
    """Moves every file of ``aside`` into ``folder``, each whole or not at all, over those of the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(aside.rglob("*")):
        if path.is_file():
            flush(path)
            target = folder / path.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    flush(folder)
    shutil.rmtree(aside)


@contextmanager
def told_what_stays(what: str, aside: Path, output_dir: str | Path) -> Iterator[None]:
    """Removes a half-written ``aside`` and says what could not be written, why, and what stays.

    Raises:
        UserError: in place of any error of the file system and of the writers above it.
    """
    try:
        yield
    except Exception as error:
        if not is_write_error(error):
            raise
        free = shutil.disk_usage(Path(output_dir)).free
        shutil.rmtree(aside, ignore_errors=True)
        whole, _ = newest_whole(output_dir)
        stays = f"{whole.name} stays whole, --resume goes on from it" if whole else "no earlier checkpoint is there"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{what} could not be written whole to {output_dir} ({free / 2**20:.1f} MiB free): {reason}. {stays}"
        ) from error


def is_write_error(error: BaseException) -> bool:
    """Whether an error is a disk's: the system's own, or what torch and safetensors make of it."""
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        return True
    words = ("PytorchStreamWriter", "unexpected pos", "No space left", "os error")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
