"""Trains one model with many settings and measures every run: the rows of a reward-KL frontier.

Every run has its own folder with its settings, its measurements and, during training, its latest checkpoint. An
interrupted sweep resumes from these, in one process or several, and ends with the rows of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn
from transformers import TrainerCallback
from typing_extensions import override

from tdpo import objectives
from tdpo.config import PairOptions, TDPOConfig
from tdpo.config.checks import check_values, documented, option
from tdpo.errors import Stopped, UserError, nearest
from tdpo.evaluate.measure import Evaluator, Measurement, MeasureOptions, Samples
from tdpo.files import atomic_write, json_lines
from tdpo.models.fingerprint import weights_hash
from tdpo.models.store import pairs_hash
from tdpo.rl.common import RLOptions
from tdpo.rl.registry import RL
from tdpo.train.checkpointing import checkpoints
from tdpo.train.stopping import handle_signals
from tdpo.train.trainer import TDPOTrainer

SFT = "sft"
SWEPT = {
    "objectives": "objective",
    "betas": "beta",
    "alphas": "alpha",
    "learning_rates": "learning_rate",
    "seeds": "seed",
}
"""The option of a run that each list of the sweep sets."""
OWN = ("label", "dataset_name")
"""Keys of a run in addition to the options of its trainer."""
NO_EFFECT = (
    "output_dir", "resume", "overwrite_output_dir", "run_name", "report_to", "disable_tqdm", "logging_dir",
    "dataloader_num_workers", "num_processes", "accelerate_config", "max_time", "reference_cache", "trackio_space_id",
)  # fmt: skip
"""Options that do not change a run's results; they may differ when a sweep is resumed."""
METRICS = {"implicit_rewards/accuracies": "accuracy", "kl/chosen": "kl_chosen", "kl/rejected": "kl_rejected"}
"""Columns measured on the held-out pairs, by the names of the trainer's metrics."""


@documented
@dataclass
class SweepOptions(MeasureOptions):
    """Options of a sweep and of its measurements.

    Attributes:
        objectives: Objectives to train, each with every beta, alpha, learning rate and seed of these lists; default:
            --objective, unless runs are set. ppo and rloo train on the reward itself.
        betas: Values of beta.
        alphas: Values of alpha, for the objectives that have it.
        learning_rates: Values of the learning rate.
        seeds: Seeds of the data order, and of the samples of ppo and rloo.
        runs: Additional runs: mappings from options of tdpo train (of PPO or RLOO for ppo and rloo) to a value or
            a list of values, as YAML in a file and as JSON objects on the command line; label names the curve,
            dataset_name selects other training pairs.
        prompts_dataset_name: Prompts to sample from, as in --dataset_name; default: those of the held-out pairs.
        num_prompts: Number of prompts to use, from the beginning; default: all.
        entropy_samples: As in tdpo eval --generate; 0, the default, skips predictive entropy and diversity
            within a prompt.
        baseline: Curve that the others are compared with at equal KL; default: the first one.
        equal_kl: KLs, in nats per response, at which rewards are compared; default: evenly spaced over the range that
            every curve covers.
        workers: Number of processes that train runs in parallel; default: one per GPU.
        save_models: Keep the final model of every run.
        output: Page to write at the end; default: report.html in --output_dir.
    """

    objectives: list[str] = option(list)
    betas: list[float] = option(list)
    alphas: list[float] = option(list)
    learning_rates: list[float] = option(list)
    seeds: list[int] = option(list)
    runs: list[str] = option(list)
    prompts_dataset_name: str | None = None
    num_prompts: int | None = None
    entropy_samples: int = 0
    baseline: str | None = None
    equal_kl: list[float] = option(list)
    workers: int | None = None
    save_models: bool = False
    output: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(self, num_prompts=2, workers=1)
        if (self.temperature, self.top_p, self.top_k) != (1.0, 1.0, 0):
            raise UserError("--temperature, --top_p and --top_k change the samples and not the KL: leave them out")

    def settings(self, objective: str) -> list[dict[str, Any]]:
        """Returns the settings of every run, in order, each once.

        Args:
            objective: The objective to use if neither ``objectives`` nor ``runs`` is set.

        Raises:
            UserError: for an entry of ``runs`` that is not a mapping.
        """
        lists: dict[str, list[Any]] = {name: getattr(self, plural) or [None] for plural, name in SWEPT.items()}
        if not self.objectives and not self.runs:
            lists["objective"] = [objective]
        grids = [] if lists["objective"] == [None] else [lists]
        for number, text in enumerate(self.runs, 1):
            try:
                entry = json.loads(text) if isinstance(text, str) else text
            except ValueError as error:
                raise UserError(f"runs, entry {number}: not a JSON object: {text}") from error
            if not isinstance(entry, dict) or not entry.get("objective"):
                raise UserError(f"runs, entry {number}: expected a mapping of options with an objective, found {text}")
            shared = {name: values for name, values in lists.items() if name in ("learning_rate", "seed")}
            grids.append(
                shared | {name: value if isinstance(value, list) else [value] for name, value in entry.items()}
            )
        found: dict[str, dict[str, Any]] = {}
        for grid in grids:
            for values in itertools.product(*grid.values()):
                settings = {name: value for name, value in zip(grid, values, strict=True) if value is not None}
                if "alpha" in settings and not _has_parameter(settings["objective"], "alpha"):
                    if grid is not lists:
                        raise UserError(f"runs: the objective {settings['objective']} has no alpha")
                    del settings["alpha"]
                settings = {"objective": settings.pop("objective"), **settings}
                found.setdefault(json.dumps(settings, sort_keys=True), settings)
        return list(found.values())


def _has_parameter(objective: str, name: str) -> bool:
    return objective not in RL and name in {field.name for field in fields(objectives.find_objective(objective))}


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        settings: The options it sets, by name.
        args: All its options: those of the sweep, overridden by its settings.
        label: Name of its curve.
        dataset_name: Its training pairs; None for those of the sweep.
    """

    settings: Mapping[str, Any]
    args: TDPOConfig | RLOptions
    label: str
    dataset_name: str | None = None

    @property
    def name(self) -> str:
        """A folder name made of the run's settings."""
        shown = [
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in self.settings.items()
        ]
        text = "-".join(shown).removeprefix("objective=")
        short = "".join(c if c.isalnum() or c in "=.-_" else "_" for c in text)
        return short if len(short) < 100 else f"{short[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def columns(self) -> dict[str, Any]:
        """The first columns of its rows: objective and parameters, empty for those it does not have."""
        args = self.args
        if isinstance(args, TDPOConfig):
            objective = args.build_objective()
            parameters = {name: getattr(objective, name, "") for name in ("beta", "alpha")}
        else:
            parameters = {"beta": args.beta, "alpha": ""}
        return {
            "objective": self.settings["objective"],
            **parameters,
            "learning_rate": float(args.learning_rate),
            "seed": args.seed,
            "label": self.label,
            **({"options": text} if (text := self._other_options()) else {}),
        }

    def _other_options(self) -> str:
        """Returns what else sets the run apart; measurements that differ in it are not averaged as seeds are."""
        own = {name: value for name, value in self.settings.items() if name not in (*SWEPT.values(), "label")}
        return " ".join(f"{name}={value}" for name, value in own.items())


def plan(options: SweepOptions, args: TDPOConfig) -> list[Run]:
    """Returns the runs of a sweep, with all their options checked.

    Args:
        options: Options of the sweep.
        args: Options that all runs share.

    Raises:
        UserError: naming the run, for options that its trainer does not have or that contradict each other.
    """
    runs = []
    for settings in options.settings(args.objective or objectives.DEFAULT):
        own = {name: value for name, value in settings.items() if name not in OWN}
        objective = settings["objective"]
        try:
            name, rl = settings.get("dataset_name"), objective in RL
            run_args = _rl_options(objective, own, args, options, name) if rl else _pair_options(own, args)
        except (UserError, TypeError, ValueError) as error:
            raise UserError(f"run {json.dumps(settings)}: {error}") from error
        runs.append(Run(settings, run_args, str(settings.get("label", objective)), name))
    return runs


def _pair_options(own: Mapping[str, Any], args: TDPOConfig) -> TDPOConfig:
    _check_names(own, [field.name for field in fields(TDPOConfig) if field.init])
    shared = [field.name for field in fields(PairOptions) if field.name in own]
    if shared:
        raise UserError(f"{shared[0]} is one for all runs, which share tokenised pairs: give --{shared[0]}")
    return replace(args, **own)


def _rl_options(
    objective: str, own: Mapping[str, Any], args: TDPOConfig, options: SweepOptions, dataset_name: str | None
) -> RLOptions:
    """Returns the options of PPO or RLOO; steps, measuring and length are the sweep's unless a run sets them."""
    kind = RL[objective].options
    names = [field.name for field in fields(kind)]
    if dataset_name:
        raise UserError(f"{objective} takes its prompts from --dataset_name, not from a dataset of its own")
    _check_names({name: value for name, value in own.items() if name != "objective"}, names)
    shared = {
        "steps": args.max_steps, "eval_every": int(args.eval_steps or 0), "max_new_tokens": options.max_new_tokens,
        "learning_rate": args.learning_rate, "seed": args.seed, **({} if args.beta is None else {"beta": args.beta}),
    }  # fmt: skip
    return kind(**{name: value for name, value in {**shared, **own}.items() if name != "objective"})


def _check_names(settings: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in settings:
        if name not in known:
            raise UserError(f"no option {name!r}.{nearest(name, known)}")


@dataclass
class Sweep:
    """Trains and measures runs, and collects their rows.

    Attributes:
        folder: Output folder.
        runs: The runs, in the order of the rows.
        load_policy: Loads the SFT model that every run starts from.
        tokenizer: Its tokenizer.
        pairs: Returns the training pairs of a dataset by name; for None those of the sweep.
        held_out: Held-out pairs.
        prompts: Returns the prompts of the training data, for ppo and rloo.
        evaluator: Measures policies; its reference is the SFT model.
        report: Called with a line of text for every run and measurement.
        save_models: Keep the final model of every run.
        peft_config: Wraps every policy in an adapter.
    """

    folder: Path
    runs: Sequence[Run]
    load_policy: Callable[[], nn.Module]
    tokenizer: Any
    pairs: Callable[[str | None], Any]
    held_out: Any
    prompts: Callable[[], Sequence[Any]]
    evaluator: Evaluator
    report: Callable[[str], None] = lambda line: None
    save_models: bool = False
    peft_config: Any = None
    _made_of: dict[str, Any] = field(default_factory=dict, init=False)

    def execute(self) -> list[str]:
        """Trains every run that no other process has finished or is training.

        Returns:
            Error messages of runs that could not be finished.

        Raises:
            UserError: if a folder holds a run with other options.
        """
        self._made_of = self._fingerprint()
        for run in self.runs:
            self._check_run(run)
        with FileLock(self.folder / "sft.lock"):
            _check(self.folder / "sft-run.json", self._made_of)
            self._measure_sft()
        failures = []
        for number, run in enumerate(self.runs, 1):
            folder = self._folder(run)
            if (folder / "finished").exists():
                continue
            try:
                with FileLock(folder / "run.lock", timeout=0):
                    if not (folder / "finished").exists():
                        self.report(f"[{number}/{len(self.runs)}] {run.name}")
                        self._train(run)
                        (folder / "finished").touch()
            except Timeout:
                continue  # another process trains it
            except UserError as error:
                failures.append(f"{run.name}: {error}")
                self.report(failures[-1])
        return failures

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row for the SFT model and one for every run and measurement so far."""
        first = json.loads((self.folder / "sft.json").read_text())
        rows = [
            {"objective": SFT, **dict.fromkeys(("beta", "alpha", "learning_rate", "seed"), ""), "label": SFT, **first}
        ]
        for run in self.runs:
            for path in sorted(self._folder(run).glob("step-*.json")):
                rows.append({**run.columns, **json.loads(path.read_text())})
        return rows

    def unfinished(self) -> list[str]:
        """Returns the names of the runs that are not at their end."""
        return [run.name for run in self.runs if not (self._folder(run) / "finished").exists()]

    def seconds(self) -> dict[str, float]:
        """Returns the wall time of training and of measuring, over all runs so far."""
        found = [json.loads(path.read_text()) for path in self.folder.glob("runs/*/seconds.json")]
        return {name: sum(part[name] for part in found) for name in ("train", "measure")}

    def _folder(self, run: Run) -> Path:
        return self.folder / "runs" / run.name

    def _fingerprint(self) -> dict[str, Any]:
        """Returns what every run depends on in addition to its own options."""
        evaluator = self.evaluator
        options = {
            name: value
            for name, value in asdict(evaluator.options).items()
            if name in MeasureOptions.__dataclass_fields__
        }
        prompts = json.dumps([prompt.ids for prompt in evaluator.prompts]).encode()
        return {
            "weights": weights_hash(evaluator.reference),
            "held_out": pairs_hash(pair.key for pair in self.held_out),
            "prompts": hashlib.sha256(prompts).hexdigest(),
            "reward": [getattr(evaluator.reward, name, None) for name in ("name", "label", "output")],
            "measured": {name: value for name, value in options.items() if name != "samples_dir"},
            "adapter": None if self.peft_config is None else str(self.peft_config.to_dict()),
        }

    def _check_run(self, run: Run) -> None:
        """Makes the run's folder, or refuses one that holds a run of other options or pairs."""
        options = run.args.to_dict() if isinstance(run.args, TDPOConfig) else asdict(run.args)
        own = {name: value for name, value in options.items() if name not in NO_EFFECT}
        pairs = [pair.key for pair in self.pairs(run.dataset_name)]
        rows = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()  # their order decides about the batches
        made_of = {**own, **self._made_of, "dataset_name": run.dataset_name, "pairs": rows}
        self._folder(run).mkdir(parents=True, exist_ok=True)
        _check(self._folder(run) / "run.json", json.loads(json.dumps(made_of, default=str)))

    def _measure_sft(self) -> None:
        path = self.folder / "sft.json"
        if not path.exists():
            reference, samples = self.evaluator.reference, self.evaluator.reference_samples
            self._write_samples(self.folder / "samples-sft.jsonl", samples)
            self._write(path, 0, self.evaluator.measure(reference, samples), {})  # last: it says that all is there

    def _train(self, run: Run) -> None:
        """Trains one run, from its latest checkpoint if it has one."""
        folder, seconds = self._folder(run), _Seconds(self._folder(run) / "seconds.json")

        def measure(step: int, policy: nn.Module, metrics: Mapping[str, float] | None = None) -> None:
            with seconds.of("measure"):
                seconds.move((metrics or {}).get("runtime", 0.0))  # of the held-out pairs
                samples = self.evaluator.sample(policy)
                found = self.evaluator.measure(policy, samples)
                self._write_samples(folder / "samples.jsonl", samples)
                self._write(folder / f"step-{step:07d}.json", step, found, metrics or {})
            reward = "" if found.reward is None else f"reward {found.reward.mean:.4g}, "
            self.report(f"  step {step}: {reward}KL {found.kl_policy_reference.mean:.4g} nats")

        with seconds.of("train"):
            if isinstance(run.args, TDPOConfig):
                self._train_pairs(run, run.args, measure)
            else:
                policy = self.load_policy()
                reward = self.evaluator.reward
                if reward is None:
                    raise UserError(f"{run.settings['objective']} needs --reward")
                train = RL[run.settings["objective"]].train
                train(
                    policy, self.evaluator.reference, self.tokenizer, self.prompts(), reward, run.args, measure,
                    folder / "checkpoints",
                )  # fmt: skip
                if self.save_models:
                    policy.save_pretrained(folder / "model")  # type: ignore[operator]
                    self.tokenizer.save_pretrained(folder / "model")
        for path in [*folder.glob("checkpoint-*"), folder / "checkpoints"]:
            shutil.rmtree(path, ignore_errors=True)
        seconds.write()

    def _train_pairs(self, run: Run, args: TDPOConfig, measure: Callable[..., None]) -> None:
        """Trains on preference pairs; an interrupted run resumes from its latest checkpoint, bit for bit."""
        folder = self._folder(run)
        made_of = [run.dataset_name or "", args.layout, args.bf16, args.fp16]
        cache = self.folder / "reference" / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]
        fixed = args.reference in ("auto", "cached") and not args.sync_ref_model
        uses_reference = args.build_objective().uses_reference and fixed
        args = replace(
            args, output_dir=str(folder), resume=bool(checkpoints(folder)), eval_strategy="steps",
            save_strategy="steps", save_steps=args.eval_steps or 0, save_total_limit=1, disable_tqdm=True,
            report_to="none", reference_cache=str(cache) if uses_reference else None,
        )  # fmt: skip
        with FileLock(self.folder / "reference.lock"):  # the first process fills the cache
            trainer = TDPOTrainer(
                model=self.load_policy(), args=args, train_dataset=self.pairs(run.dataset_name),
                eval_dataset=self.held_out, processing_class=self.tokenizer, peft_config=self.peft_config,
            )  # fmt: skip
        trainer.add_callback(MeasureCallback(measure))
        with handle_signals(trainer.stop_request.handle):
            trainer.train()
        # A signal at the last step, which its checkpoint has, stops the sweep too: the next run must not begin.
        if code := trainer.stop_request.stop_code(trainer.state) or trainer.stop_request.code:
            step = f"step {trainer.state.global_step} of {trainer.state.max_steps}"
            raise Stopped(f"interrupted at {step} of {run.name}: the same command resumes the sweep", code)
        last = f"step-{trainer.state.global_step:07d}.json"
        if not (folder / last).exists():  # the last step is not a multiple of --eval_steps
            trainer.evaluate()
        if self.save_models:
            trainer.save_model(str(folder / "model"))

    @staticmethod
    def _write(path: Path, step: int, found: Measurement, metrics: Mapping[str, float]) -> None:
        """Writes a measurement as the last columns of its row."""
        columns = found.columns()
        named = {name.replace("kl_policy_reference", "kl"): value for name, value in columns.items()}
        held_out = {short: metrics[name] for name, short in METRICS.items() if name in metrics}
        atomic_write(path, json.dumps({"step": step, **named, **held_out}) + "\n")

    def _write_samples(self, path: Path, samples: Samples) -> None:
        """Writes prompts, responses and rewards as JSON lines, which ``tdpo judge`` reads."""
        rewards = [None] * len(samples.texts) if samples.rewards is None else samples.rewards.tolist()
        rows = (
            {"prompt": prompt.content, "response": text, "reward": reward}
            for prompt, texts, found in zip(self.evaluator.prompts, samples.texts, rewards, strict=True)
            for text, reward in zip(texts, found or [None] * len(texts), strict=True)
        )
        atomic_write(path, json_lines(rows))


def _check(path: Path, made_of: Mapping[str, Any]) -> None:
    """Notes what a folder's figures are made of, or refuses a folder whose figures are made of something else."""
    if not path.exists():
        atomic_write(path, json.dumps(made_of, indent=1, sort_keys=True) + "\n")
    before = json.loads(path.read_text())
    changed = [name for name in {**before, **made_of} if before.get(name) != made_of.get(name)]
    if changed:
        names = ", ".join(sorted(changed))
        raise UserError(f"{path.parent} holds a run with another {names}; remove it, or give another --output_dir")


class MeasureCallback(TrainerCallback):
    """Measures the policy whenever the trainer evaluates it."""

    def __init__(self, measure: Callable[..., None]) -> None:
        self.measure = measure

    @override
    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **kwargs: Any
    ) -> None:
        self.measure(state.global_step, model, {name.removeprefix("eval_"): value for name, value in metrics.items()})


class _Seconds:
    """Adds up the wall time of a run's parts, across interruptions; a nested part counts only once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spent = json.loads(path.read_text()) if path.exists() else {"train": 0.0, "measure": 0.0}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        started, before = time.perf_counter(), sum(self.spent.values())
        try:
            yield
        finally:
            inner = sum(self.spent.values()) - before
            self.spent[part] += time.perf_counter() - started - inner
            self.write()

    def move(self, evaluation: float) -> None:
        """Moves seconds from training to measuring."""
        self.spent["measure"] += evaluation
        self.spent["train"] -= evaluation

    def write(self) -> None:
        """Writes the times so far."""
        atomic_write(self.path, json.dumps(self.spent) + "\n")
