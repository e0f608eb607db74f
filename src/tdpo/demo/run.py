"""The embedded default: from a grammar to three aligned policies, a table and a figure, without a download.

texts -> tokenizer and model -> SFT -> sampled and ranked completions -> dpo, tdpo1, tdpo2 from the same SFT model,
measured every few steps. Training and evaluation are the trainers everybody uses; only the world is the demo's own.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback
from typing_extensions import override

import tdpo
from tdpo import SFTConfig, SFTTrainer, TDPOConfig, TDPOTrainer, objectives
from tdpo.data.dataset import prepare_pairs
from tdpo.data.tokenise import Tokeniser
from tdpo.demo import show, world
from tdpo.demo.grammar import reward
from tdpo.demo.results import OBJECTIVES, DemoOptions, DemoResult, Point
from tdpo.errors import UserError
from tdpo.evaluate.diversity import measure_samples
from tdpo.evaluate.estimates import Estimate
from tdpo.evaluate.generate import Sampling
from tdpo.evaluate.preference import evaluate_pairs
from tdpo.models.reference import Reference
from tdpo.report.plots import LABELS

WARMUP = 0.05
CLIP = 10.0
SAMPLING_BATCH = 256
EVALUATION_BATCH = 64
MARK = ".tdpo-demo"
"""A file that says the folder is the demo's own."""
ENTRIES = (
    "base", "sft", "dpo", "tdpo1", "tdpo2", "pairs", "sft.jsonl", "prompts.jsonl", "samples.jsonl", "results.json",
    "frontier.png",
)  # fmt: skip
"""Everything the demo writes into its folder."""


def run_demo(options: DemoOptions | None = None, console: Console | None = None) -> DemoResult:
    """Runs the demo and leaves models, pairs, numbers and the figure in ``options.output_dir``.

    Args:
        options: Sizes and seeds; the defaults take two to three minutes on two CPU cores.
        console: Where progress and results are printed, standard output by default.

    Returns:
        Everything that was measured; ``results.json`` holds the same.

    Raises:
        UserError: if the folder holds files the demo did not write, or the sizes are too small to give a pair.
    """
    options = options or DemoOptions()
    folder = claim(Path(options.output_dir).expanduser())
    threads = torch.get_num_threads()
    # A model this small gains little from a second thread, and loses everything where another process wants the core.
    torch.set_num_threads(1)
    try:
        return _Demo(options, folder, console or Console(highlight=False)).run()
    finally:
        torch.set_num_threads(threads)


def claim(folder: Path) -> Path:
    """Makes the folder the demo's: new or empty folders are marked, marked ones are cleared of :data:`ENTRIES`.

    Anything else in a marked folder stays: models trained there from the demo's own, say.

    Raises:
        UserError: naming the folder, if it is a file, cannot be written, or holds files of anybody else.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output_dir {folder}: is a file; the demo needs a folder")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
            raise UserError(
                f"--output_dir {folder}: holds files that the demo did not write, and it would replace some of them; "
                "name a new folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).write_text(
            "Written by tdpo demo, which replaces in this folder: " + ", ".join(ENTRIES) + "\n", encoding="utf-8"
        )
        for path in (folder / name for name in ENTRIES):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written: {error.strerror or error}") from error
    return folder


class _Demo:
    """The stages of the demo; each leaves in attributes what later ones read, and returns what to print of it."""

    def __init__(self, options: DemoOptions, folder: Path, console: Console) -> None:
        self.options, self.folder, self.console = options, folder, console
        self.tokenizer: Any
        self.model: nn.Module
        self.sft: Point
        self.sampling = partial(Sampling, options.max_new_tokens, batch_size=SAMPLING_BATCH)
        self.counts: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.trajectories: dict[str, list[Point]] = {}
        self.samples: dict[str, list[str]] = {}

    def run(self) -> DemoResult:
        """Runs every stage, then writes and prints the results."""
        started = time.perf_counter()
        self.stage("texts, tokenizer, model", self.build)
        self.stage("supervised fine-tuning", self.fine_tune)
        self.stage("preference pairs", self.make_pairs)
        self.stage("measuring the SFT model", self.measure_sft)
        for name in OBJECTIVES:
            self.stage(LABELS[name], partial(self.align, name))
        seconds = self.seconds | {"total": time.perf_counter() - started}
        result = DemoResult(self.options, self.sft, self.trajectories, self.counts, seconds, _versions())
        self.report(result)
        return result

    def stage(self, title: str, work: Callable[[], str]) -> None:
        """Runs one stage between two printed lines and keeps its wall time."""
        number = f"[{len(self.seconds) + 1}/{4 + len(OBJECTIVES)}]"
        self.console.print(f"{number} {title} ...", markup=False)
        started = time.perf_counter()
        outcome = work()
        self.seconds[title] = time.perf_counter() - started
        self.console.print(f"{number} {title}: {outcome}  ({self.seconds[title]:.1f} s)", markup=False, soft_wrap=True)

    def build(self) -> str:
        """Draws the texts and prompts, trains the tokenizer and makes a model with random weights."""
        options = self.options
        self.texts, self.train_prompts, self.prompts = world.make_texts(
            options.sft_texts, options.train_prompts, options.held_out_prompts, options.seed
        )
        world.write_jsonl(self.folder / "sft.jsonl", ({"text": text} for text in self.texts))
        world.write_jsonl(self.folder / "prompts.jsonl", ({"prompt": prompt} for prompt in self.prompts))
        self.tokenizer = world.build_tokenizer(self.texts)
        self.model = world.build_model(self.tokenizer, options.seed)
        self.tokenizer.save_pretrained(self.folder / "base")
        self.model.save_pretrained(self.folder / "base")
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.counts |= {"sft_texts": len(self.texts), "vocabulary": len(self.tokenizer), "parameters": parameters}
        return f"{len(self.texts)} texts, vocabulary {len(self.tokenizer)}, {parameters:,} parameters"

    def fine_tune(self) -> str:
        """Fine-tunes the model on the texts: the SFT model, the reference of all that follows."""
        options = self.options
        shared = self.arguments("sft", options.sft_steps, options.sft_learning_rate, 2 * options.batch_size)
        args = SFTConfig(**shared, lr_scheduler_type="linear")
        rows = [{"text": text} for text in self.texts]
        trainer = SFTTrainer(self.model, args, rows, processing_class=self.tokenizer)
        trainer.train()
        trainer.save_model()
        loss = next(log["loss"] for log in reversed(trainer.state.log_history) if "loss" in log)
        self.counts["sft_loss"] = loss
        return f"{options.sft_steps} steps, loss {loss:.3f} nats per token"

    def make_pairs(self) -> str:
        """Samples completions of every prompt, ranks them by reward and makes pairs of them."""
        options, train_prompts = self.options, self.train_prompts
        sampling = self.sampling(num_samples=options.samples_per_prompt, seed=options.seed + 1)
        ranked = world.rank_samples(self.model, self.tokenizer, [*train_prompts, *self.prompts], sampling)
        self.train_rows = world.every_pair(ranked[: len(train_prompts)], options.min_margin)
        self.held_out_rows = world.extreme_pairs(ranked[len(train_prompts) :], options.min_margin)
        if not self.train_rows or not self.held_out_rows:
            raise UserError(
                "the samples gave no preference pair: the SFT model is too little trained for its texts to end, or "
                "there are too few prompts (--sft_steps, --train_prompts, --held_out_prompts)"
            )
        (self.folder / "pairs").mkdir()
        world.write_jsonl(self.folder / "pairs" / "train.jsonl", self.train_rows)
        world.write_jsonl(self.folder / "pairs" / "test.jsonl", self.held_out_rows)
        sampled = len(ranked) * options.samples_per_prompt
        self.counts |= {
            "samples_ranked": sampled,
            "samples_left_out": sampled - sum(len(completions) for _, completions in ranked),
            "train_prompts": len(train_prompts),
            "held_out_prompts": len(self.prompts),
            "train_pairs": len(self.train_rows),
            "held_out_pairs": len(self.held_out_rows),
        }
        return f"{len(self.train_rows)} for training, {len(self.held_out_rows)} held out, from {sampled} samples"

    def measure_sft(self) -> str:
        """Measures the SFT model: its reward and entropy, and the zeros every trajectory starts from."""
        pairs = prepare_pairs(self.held_out_rows, Tokeniser(self.tokenizer))
        objective = objectives.dpo(self.options.beta)
        held_out = evaluate_pairs(self.model, self.model, pairs, objective, EVALUATION_BATCH)
        self.sft, self.samples["sft"] = self.measure(self.model, self.model, 0, held_out)
        return f"reward {self.sft.reward:.3f}"

    def align(self, name: str) -> str:
        """Trains one objective from the SFT model's folder, and measures the policy every few steps."""
        options = self.options
        args = TDPOConfig(
            **self.arguments(name, options.steps, options.learning_rate, options.batch_size),
            lr_scheduler_type="constant_with_warmup",
            objective=name,
            beta=options.beta,
            alpha=options.alpha if name == "tdpo2" else None,
            per_device_eval_batch_size=EVALUATION_BATCH,
            eval_strategy="steps",
            eval_steps=options.eval_every,
        )
        trainer = TDPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(self.folder / "sft"),
            args=args,
            train_dataset=self.train_rows,
            eval_dataset=self.held_out_rows,
            processing_class=self.tokenizer,
        )
        self.trajectories[name] = [self.sft]
        trainer.add_callback(PointCallback(self, name, trainer.reference))
        trainer.train()
        trainer.save_model()
        last = self.trajectories[name][-1]
        return f"reward {last.reward:.3f}, KL(policy || reference) {last.samples.kl:.2f} nats"

    def arguments(self, name: str, steps: int, learning_rate: float, batch_size: int) -> dict[str, Any]:
        """Returns the training arguments that fine-tuning and every objective have in common."""
        return {
            "output_dir": str(self.folder / name),
            "seed": self.options.seed,
            "max_steps": steps,
            "warmup_steps": int(WARMUP * steps),
            "learning_rate": learning_rate,
            "per_device_train_batch_size": batch_size,
            "logging_steps": 10,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": not self.console.is_terminal,
            "max_grad_norm": CLIP,
        }

    def measure(
        self, policy: nn.Module, reference: nn.Module | Reference, step: int, held_out: Mapping[str, float]
    ) -> tuple[Point, list[str]]:
        """Draws one sample per held-out prompt, with the same seed for every policy, and measures the samples."""
        prompt_ids = self.tokenizer(self.prompts, add_special_tokens=False)["input_ids"]
        sampling = self.sampling(seed=self.options.seed + 2)
        drawn = world.complete(policy, self.tokenizer, self.prompts, sampling)
        responses = [samples[0] for samples in drawn]
        completions = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
        rewards = torch.tensor([reward(p + text) for p, text in zip(self.prompts, completions, strict=True)])
        diversity = measure_samples(policy, reference, prompt_ids, responses, SAMPLING_BATCH)
        return Point(step, Estimate.of(rewards), diversity, dict(held_out)), completions

    def report(self, result: DemoResult) -> None:
        """Writes samples, numbers and figure, then prints the table and what to try next."""
        folder, prompts = self.folder, self.prompts
        rows: list[dict[str, Any]] = [
            {"model": name, "prompt": prompt, "completion": text, "reward": reward(prompt + text)}
            for name, completions in self.samples.items()
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        world.write_jsonl(folder / "samples.jsonl", rows)
        (folder / "results.json").write_text(json.dumps(result.as_dict(), indent=2) + "\n", encoding="utf-8")
        show.draw(result, folder / "frontier.png")
        shown = {row["model"]: (row["completion"], row["reward"]) for row in rows[:: len(prompts)]}
        out = partial(self.console.print, soft_wrap=True, markup=False)
        self.console.print()
        self.console.print(show.result_table(result.rows))
        self.console.print(show.legend(result), markup=False)
        self.console.print()
        self.console.print(show.side_by_side(prompts[0], shown))
        out(f"\nAll numbers: {folder}/results.json   figure: {folder}/frontier.png")
        out("Next steps:")
        for command in show.next_commands(folder):
            out(f"  {command}")
        out(f"{result.seconds['total']:.0f} s in all")


class PointCallback(TrainerCallback):
    """Adds a point to a trajectory of the demo whenever the trainer evaluates the policy."""

    def __init__(self, demo: _Demo, name: str, reference: Reference) -> None:
        self.demo, self.name, self.reference = demo, name, reference

    @override
    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **kwargs: Any
    ) -> None:
        named = {key.removeprefix("eval_"): value for key, value in metrics.items()}
        held_out = {key: value for key, value in named.items() if "/" in key or key == "loss"}
        point, texts = self.demo.measure(model, self.reference, state.global_step, held_out)
        self.demo.trajectories[self.name].append(point)
        self.demo.samples[self.name] = texts


def _versions() -> dict[str, str]:
    packages = {package.__name__: package.__version__ for package in (tdpo, torch, transformers, tokenizers)}
    device, threads = "cuda" if torch.cuda.is_available() else "cpu", str(torch.get_num_threads())
    return {"python": platform.python_version(), **packages, "device": device, "threads": threads}
