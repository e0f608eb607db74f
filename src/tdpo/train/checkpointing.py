"""Checkpoints that are complete or absent: written to a temporary folder, listed in a manifest, flushed, then renamed.

``checkpoint-30.partial`` is being written or removed and never read; ``checkpoint-30`` has a ``manifest.json`` with the
size of each of its files, so that one that was cut short on its way (a copy, a full disk) is recognised.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import ProcessorMixin, Trainer
from transformers.trainer import TRAINER_STATE_NAME, TrainerState
from transformers.utils import ADAPTER_CONFIG_NAME
from typing_extensions import override

from tdpo.config import RunOptions
from tdpo.errors import UserError, first_line
from tdpo.files import PARTIAL, flush
from tdpo.models.adapters import adapter_settings, has_adapter
from tdpo.models.load import load_weights
from tdpo.models.multimodal import copy_processor
from tdpo.train.card import FILE as CARD
from tdpo.train.card import write_card
from tdpo.train.record import Shown, public

logger = logging.getLogger("tdpo")

FULL = 2**20
"""Free bytes below which a disk is full."""
MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(folder: Path) -> int:
    """Returns the optimizer step a checkpoint was written at.

    Examples:
        >>> step_of(Path("out/checkpoint-30"))
        30
    """
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder} is not named as a checkpoint is")
    return int(match[1])


def run_state_name(process: int) -> str:
    """Returns the name of the JSON file with the trainer's own state of one process."""
    return f"run_state_{process}.json"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Lists every folder that is named as a checkpoint, by step."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def by_age(folders: list[Path]) -> list[Path]:
    """Sorts checkpoints by the time in their manifests; by step where one has none.

    After resuming from an earlier checkpoint, later steps of the abandoned run are the old ones.
    """
    times = {}
    for folder in folders:
        try:
            times[folder] = float(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["time"])
        except (OSError, ValueError, KeyError, TypeError):
            return sorted(folders, key=step_of)
    return sorted(folders, key=lambda folder: (times[folder], step_of(folder)))


def find_defect(folder: str | Path) -> str:
    """Describes what is wrong with a checkpoint; empty if it is complete."""
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


def latest_complete(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """Finds the newest complete checkpoint, and returns a line for each newer one that was passed over."""
    passed: list[str] = []
    for folder in reversed(by_age(checkpoints(output_dir))):
        defect = find_defect(folder)
        if not defect and (folder / run_state_name(0)).is_file():
            return folder, passed
        passed.append(f"{folder.name} is incomplete and is passed over: {defect or 'it has only the model'}")
    return None, passed


def remove(folder: Path) -> None:
    """Removes a checkpoint; it is renamed first, so that none that is half removed keeps its name."""
    partial = folder.with_name(f"{folder.name}.old{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    folder.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def rotate(output_dir: str | Path, keep: int | None, written: Path, best: str | None) -> None:
    """Removes the oldest checkpoints beyond ``keep``; never the one just written, nor the best.

    Transformers' ``rotate_checkpoints`` counts damaged checkpoints too, and of those written within a second it keeps
    the one with the highest step, which need not be the one just written.

    Args:
        output_dir: The folder of the checkpoints.
        keep: How many may stay; None or 0 keeps all.
        written: The one just written. It is complete, so one that can be resumed from always stays.
        best: The best by the metric, or None.
    """
    if not keep or keep < 0 or find_defect(written):
        return
    complete = by_age([path for path in checkpoints(output_dir) if not find_defect(path)])
    protected = {written.resolve()} | ({Path(best).resolve()} if best else set())
    spare = [path for path in complete if path.resolve() not in protected]
    for path in spare[: max(len(complete) - keep, 0)]:
        remove(path)


def find_checkpoint(args: RunOptions, resume: str | bool | None) -> Path | None:
    """Finds the checkpoint that a run starts from, or None.

    Args:
        args: The run; its options decide where ``resume`` is None.
        resume: A folder, or True for the newest complete checkpoint of ``output_dir``.

    Raises:
        UserError: if True finds none, and for both options at once.
    """
    if resume is None and args.resume and args.resume_from_checkpoint:
        raise UserError("--resume and --resume_from_checkpoint contradict each other; --resume takes the newest")
    resume = args.resume_from_checkpoint if resume is None else resume
    if resume is not True and (resume is not None or not args.resume):
        return Path(resume) if resume else None
    newest, passed = latest_complete(str(args.output_dir))
    if newest is None and resume:
        raise UserError("; ".join([f"{args.output_dir}: no complete checkpoint to resume from", *passed]))
    if newest is None:
        passed.append(f"--resume: no complete checkpoint in {args.output_dir}, the run starts from the beginning")
    for line in passed:
        logger.warning(line)
    return newest


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
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    manifest.write_text(json.dumps({"time": time.time(), "sizes": sizes}, indent=1))
    flush(manifest)
    for inner in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush(inner)


def commit(written: Path, final: Path) -> None:
    """Seals a checkpoint and renames it to its final name, replacing one that may have that name."""
    seal(written)
    if final.exists():
        remove(final)
    written.rename(final)
    flush(final.parent)


def move_into(partial: Path, folder: Path) -> None:
    """Moves every file of ``partial`` into ``folder``, each atomically, over those of the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            flush(path)
            target = folder / path.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    flush(folder)
    shutil.rmtree(partial)


@contextmanager
def write_errors(what: str, partial: Path, output_dir: str | Path) -> Iterator[None]:
    """Removes a half-written ``partial`` and reports what could not be written, why, and what is left to resume from.

    Raises:
        UserError: in place of any error of the file system and of the writers above it.
    """
    try:
        yield
    except Exception as error:
        words = ("PytorchStreamWriter", "unexpected pos", "No space left", "os error")
        writers = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
        if not (writers or isinstance(error, OSError) or type(error).__name__ == "SafetensorError"):
            raise
        free = shutil.disk_usage(Path(output_dir)).free
        shutil.rmtree(partial, ignore_errors=True)
        latest, _ = latest_complete(output_dir)
        stays = f"{latest.name} is complete, --resume continues from it" if latest else "there is no earlier checkpoint"
        reason = first_line(error)
        if writers and "No space left" not in reason and free < FULL:
            reason = f"No space left on device ({reason})"  # torch's writer does not say why it failed
        raise UserError(
            f"{what} could not be written to {output_dir} ({free / 2**20:.1f} MiB free): {reason}. {stays}"
        ) from error


def restore_run(trainer: Any, folder: Path) -> dict[str, Any]:
    """Restores what a checkpoint holds beside the Trainer's own state, and checks that it is of the same run.

    Returns:
        The states of ``trainer.run_parts`` in this process; none where the checkpoint has none for it.

    Raises:
        UserError: if data, batch size, optimizer or adapter are others than those of the checkpoint.
    """
    trainer._loading = str(folder)
    args, accelerator = trainer.args, trainer.accelerator
    own, first = (folder / run_state_name(process) for process in (accelerator.process_index, 0))
    for file in trainer.checkpoint_files:
        file.load(folder)
    if not first.is_file():
        logger.warning("%s was not written by tdpo: the log after resuming starts from zero", folder)
        return {}
    state = json.loads((own if own.is_file() else first).read_text(encoding="utf-8"))
    if args.auto_find_batch_size:  # transformers takes the batch size that was found from there, but later
        found = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).train_batch_size
        trainer._train_batch_size = found or trainer._train_batch_size
    now = trainer.run_state()
    for name, what in (("pairs", "pairs of training data"), ("pairs_per_step", "pairs per optimizer step")):
        if state[name] != now[name] and not args.ignore_data_skip:
            raise UserError(
                f"{folder} was written with {state[name]} {what}, now there are {now[name]}: its position in the "
                "data would be another. Use the same data, and the same product of processes, "
                "--per_device_train_batch_size and --gradient_accumulation_steps; --ignore_data_skip starts the "
                "data from its beginning"
            )
    for what, then, since in _differing(state, now):
        raise UserError(
            f"{folder} was written with {what} {then}, now it is {since}: the weights of the model or of the optimizer "
            "would not fit. Resume with the options it was begun with"
        )
    if (rate := state.get("learning_rate", args.learning_rate)) != args.learning_rate:
        logger.warning(
            "%s continues its schedule with a learning rate of %g; --learning_rate %g has no effect",
            folder, rate, args.learning_rate,
        )  # fmt: skip
    if state["processes"] != now["processes"]:
        logger.warning(
            "%s was written by %d processes, now there are %d: random numbers and the first log will differ",
            folder, state["processes"], now["processes"],
        )  # fmt: skip
        return {}
    return state["parts"] if own.is_file() else {}


def _differing(state: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields the options of optimizer and adapter that are others than a checkpoint's, with both values."""
    if state.get("optim", now["optim"]) != now["optim"]:
        yield "--optim", state["optim"], now["optim"]
    then, since = state.get("adapter", now["adapter"]), now["adapter"]
    if then.keys() != since.keys():
        yield "adapters", ", ".join(then) or "none", ", ".join(since) or "none"
        return
    for adapter, settings in then.items():
        for name, value in settings.items():
            if since[adapter].get(name) != value:
                yield f"{name} of the adapter", value, since[adapter].get(name)


class CheckpointingTrainer(Trainer):
    """A Trainer whose checkpoints and models are complete or absent, and resume with every sum they had."""

    args: RunOptions
    run_parts: dict[str, Any]
    """State of this process between two logs, by its name in a checkpoint; each has ``state`` and ``load``."""
    checkpoint_files: list[Any]
    """Objects with a file of their own in each checkpoint; each has ``save(folder)`` and ``load(folder)``."""
    record: Any = None
    """The :class:`~tdpo.train.record.RecordCallback`; without it no model card is written."""
    _partial: Path | None = None
    _loading = ""

    def run_state(self) -> dict[str, Any]:
        """Returns the state of this process beside the Trainer's own, as JSON; it makes resumed logs exact."""
        processes = self.accelerator.num_processes
        return {
            "pairs": len(self.train_dataset),  # type: ignore[arg-type]
            "pairs_per_step": self._train_batch_size * self.args.gradient_accumulation_steps * processes,
            "processes": processes,
            "optim": str(getattr(self.args.optim, "value", self.args.optim)).removesuffix("_fused"),
            "learning_rate": self.args.learning_rate,
            "adapter": adapter_settings(self.model),
            "parts": {name: part.state() for name, part in self.run_parts.items()},
        }

    def stopping(self) -> bool:
        """Returns whether the run stops before its end and will be resumed."""
        return False

    @override
    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    @override
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._partial is not None:  # not before the checkpoint has its name
            return
        args = self.args
        self.args = cast("RunOptions", Shown(args))  # saved there for the upload, whose token it needs
        try:
            super()._push_from_checkpoint(checkpoint_folder)
        finally:
            self.args = args

    @override
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes the Trainer's checkpoint to a temporary folder, then commits it.

        The Trainer writes into ``_get_output_dir()/checkpoint-N``; that folder is replaced meanwhile, for every
        kind of sharding.
        """
        output_dir = Path(str(self.args.output_dir))
        final = output_dir / f"checkpoint-{self.state.global_step}"
        partial = final.with_name(final.name + PARTIAL)
        written = partial / final.name
        with write_errors(final.name, partial, output_dir):
            self._partial, only_model = partial, self.args.save_only_model
            if self.stopping():  # what it resumes from must be there
                self.args.save_only_model = False
            try:
                super()._save_checkpoint(model, trial)
                resumable = not self.args.save_only_model
            finally:
                self._partial, self.args.save_only_model = None, only_model
            if self.state.best_global_step == self.state.global_step:  # noted under the name of the partial one
                self.state.best_model_checkpoint = str(final)
                if self.args.should_save:
                    self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            if resumable:
                own = written / run_state_name(self.accelerator.process_index)
                own.write_text(json.dumps(self.run_state()), encoding="utf-8")
                for file in self.checkpoint_files if self.args.should_save else ():
                    file.save(written)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                commit(written, final)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_local_main_process and written.is_dir():  # this machine has a disk of its own
                commit(written, final)
            shutil.rmtree(partial, ignore_errors=True)
        if self.args.should_save:
            rotate(output_dir, self.args.save_total_limit, final, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    @override
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model as the Trainer does; every file appears complete or not at all."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        partial = folder / f"model{PARTIAL}"
        if self.is_fsdp_enabled:  # sharded state dicts are for resuming; a model is saved in one piece
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        with write_errors("the model", partial, folder):
            super().save_model(str(partial), _internal_call=True)
            if self.args.should_save:
                (partial / CARD).unlink(missing_ok=True)  # peft's card would replace one that is there
                move_into(partial, folder)
                write_card(self, folder)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @override
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes a tied weight, which a gathered state dict holds under two names, once, and options without secrets.

        A multimodal model named without its processor keeps the processor's files.
        """
        model: Any = self.model
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        if state_dict:
            state_dict = {name: weight for name, weight in state_dict.items() if tied.get(name) not in state_dict}
        args, self.args = self.args, public(self.args)
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args = args
        folder = output_dir or str(self.args.output_dir)
        if self.args.should_save and not isinstance(self.processing_class, ProcessorMixin):
            copy_processor(model, Path(folder))
        if self.args.should_save and has_adapter(model) and model.get_base_model().can_generate():
            # The end tokens of the trained model; `tdpo merge` and every command that loads the adapter read them.
            model.get_base_model().generation_config.save_pretrained(folder)

    @override
    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the model card of :mod:`tdpo.train.card`; arguments of transformers' card go into its header."""
        if self.is_world_process_zero():
            given = inspect.signature(Trainer.create_model_card).bind(self, *args, **kwargs).arguments
            given.pop("self")
            write_card(self, Path(str(self.args.output_dir)), **given)

    @override
    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository; without network or login there is one message."""
        try:
            super().init_hf_repo(token, private)
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"--push_to_hub: no repository can be made: {reason}") from error

    @override
    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Loads what the Trainer did not find by name; a tied weight is saved once and lacks nothing."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        if load_result.unexpected_keys or set(load_result.missing_keys) - set(tied):
            load_weights(self.model, self._loading)

    @override
    def _load_best_model(self) -> None:
        """Loads the best checkpoint, also of an adapter with a name, which has a folder of its own there."""
        best, model = self.state.best_model_checkpoint, self.model
        self._loading = str(best)
        if has_adapter(model):
            own = Path(str(best)) / str(model.active_adapters[0])  # type: ignore[union-attr,index]
            self.state.best_model_checkpoint = str(own) if (own / ADAPTER_CONFIG_NAME).is_file() else best
        try:
            super()._load_best_model()
        finally:
            self.state.best_model_checkpoint = best
