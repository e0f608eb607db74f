"""The embedded default: from a grammar to three aligned policies, a table and a figure, without a download.

texts -> tokenizer and model -> SFT -> sampled and ranked completions -> dpo, tdpo1, tdpo2 from the same SFT model,
measured every few steps. Training and evaluation are the trainers everybody uses; only the world is the demo's own.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

import tdpo
from tdpo import SFTConfig, SFTTrainer, TDPOConfig, TDPOTrainer, objectives
from tdpo.data.dataset import prepare_pairs
from tdpo.data.tokenise import Tokeniser
from tdpo.demo import show, world
from tdpo.demo.folder import claim
from tdpo.demo.grammar import reward
from tdpo.demo.results import OBJECTIVES, DemoOptions, DemoResult, Point
from tdpo.errors import UserError
from tdpo.evaluate.diversity import Estimate, measure_samples
from tdpo.evaluate.generate import Sampling
from tdpo.evaluate.preference import evaluate_pairs
from tdpo.models.reference import Reference

WARMUP = 0.05
CLIP = 10.0
SAMPLING_BATCH = 256
EVALUATION_BATCH = 64


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
        return _run(options, folder, show.Stages(console or Console(highlight=False)))
    finally:
        torch.set_num_threads(threads)


def _run(options: DemoOptions, folder: Path, stages: show.Stages) -> DemoResult:
    started = time.perf_counter()
    the_world = _build_world(options, folder, stages)
    _fine_tune(the_world, stages)
    train_rows = _make_pairs(the_world, stages)
    with stages.stage("measuring the SFT model") as stage:
        sft, texts = _measure_reference(the_world)
        stage.outcome = f"reward {show.plus_minus(sft.reward, 3)}"
    trajectories: dict[str, list[Point]] = {}
    samples = {"sft": texts}
    for name in OBJECTIVES:
        points, samples[name] = _align(name, the_world, train_rows, stages)
        trajectories[name] = [sft, *points]
    seconds = {**stages.seconds, "total": time.perf_counter() - started}
    result = DemoResult(options, sft, trajectories, the_world.counts, seconds, _versions())
    _report(result, the_world, samples, stages.console)
    return result


@dataclass
class World:
    """What every stage works on. Paths: ``sft`` is the SFT model's folder, the reference of all that follows."""

    options: DemoOptions
    folder: Path
    texts: world.Texts
    tokenizer: Any
    model: nn.Module
    held_out_rows: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def sft_folder(self) -> Path:
        """Where the SFT model is."""
        return self.folder / "sft"

    def sampling(self, num_samples: int, seed: int) -> Sampling:
        """Returns plain sampling from the model's distribution; ``seed`` is added to the demo's."""
        return Sampling(
            max_new_tokens=self.options.max_new_tokens,
            num_samples=num_samples,
            batch_size=SAMPLING_BATCH,
            seed=self.options.seed + seed,
        )

    def measure(
        self, policy: nn.Module, reference: nn.Module | Reference, step: int, held_out: Mapping[str, float]
    ) -> tuple[Point, list[str]]:
        """Draws one sample per held-out prompt, with the same seed for every policy, and measures the samples."""
        prompts = self.texts.held_out_prompts
        prompt_ids = self.tokenizer(prompts, add_special_tokens=False)["input_ids"]
        responses = [samples[0] for samples in world.complete(policy, self.tokenizer, prompts, self.sampling(1, 2))]
        completions = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
        rewards = torch.tensor([reward(p + text) for p, text in zip(prompts, completions, strict=True)])
        diversity = measure_samples(policy, reference, prompt_ids, responses, SAMPLING_BATCH)
        return Point(step, Estimate.of(rewards), diversity, dict(held_out)), completions


class PointCallback(TrainerCallback):
    """Measures the policy whenever the trainer evaluates it."""

    def __init__(self, the_world: World) -> None:
        self.world = the_world
        self.reference: Reference | None = None
        self.points: list[Point] = []
        self.completions: list[str] = []

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Adds a point: the trainer's metrics on held-out pairs, and samples of the policy as it stands."""
        if self.reference is None:
            raise ValueError("the callback has no reference")
        named = {key.removeprefix("eval_"): value for key, value in metrics.items()}
        held_out = {key: value for key, value in named.items() if "/" in key or key == "loss"}
        point, self.completions = self.world.measure(model, self.reference, state.global_step, held_out)
        self.points.append(point)


def _build_world(options: DemoOptions, folder: Path, stages: show.Stages) -> World:
    with stages.stage("texts, tokenizer, model") as stage:
        texts = world.make_texts(options.sft_texts, options.train_prompts, options.held_out_prompts, options.seed)
        world.write_jsonl(folder / "sft.jsonl", ({"text": text} for text in texts.sft))
        world.write_jsonl(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in texts.held_out_prompts))
        tokenizer = world.build_tokenizer(texts.sft)
        model = world.build_model(tokenizer, options.seed)
        for part in (tokenizer, model):
            part.save_pretrained(folder / "base")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        counts = {"sft_texts": len(texts.sft), "vocabulary": len(tokenizer), "parameters": parameters}
        stage.outcome = f"{len(texts.sft)} texts, vocabulary {len(tokenizer)}, {parameters:,} parameters"
    return World(options, folder, texts, tokenizer, model, counts=counts)


def _fine_tune(the_world: World, stages: show.Stages) -> None:
    options = the_world.options
    with stages.stage("supervised fine-tuning") as stage:
        args = SFTConfig(
            **_shared(options, the_world.sft_folder),
            learning_rate=options.sft_learning_rate,
            lr_scheduler_type="linear",
            max_steps=options.sft_steps,
            warmup_steps=int(WARMUP * options.sft_steps),
            per_device_train_batch_size=2 * options.batch_size,
        )
        rows = [{"text": text} for text in the_world.texts.sft]
        callbacks: list[TrainerCallback] = [show.StageCallback(stage)]
        trainer = SFTTrainer(the_world.model, args, rows, processing_class=the_world.tokenizer, callbacks=callbacks)
        trainer.train()
        trainer.save_model()
        loss = next(log["loss"] for log in reversed(trainer.state.log_history) if "loss" in log)
        the_world.counts["sft_loss"] = loss
        stage.outcome = f"{options.sft_steps} steps, loss {loss:.3f} nats per token"


def _make_pairs(the_world: World, stages: show.Stages) -> list[dict[str, Any]]:
    """Makes training rows; the held-out rows stay with the world."""
    options, texts = the_world.options, the_world.texts
    with stages.stage("preference pairs") as stage:
        sampling = the_world.sampling(options.samples_per_prompt, seed=1)
        ranked = world.rank_samples(
            the_world.model, the_world.tokenizer, [*texts.train_prompts, *texts.held_out_prompts], sampling
        )
        train = world.every_pair(ranked[: len(texts.train_prompts)], options.min_margin)
        held_out = world.extreme_pairs(ranked[len(texts.train_prompts) :], options.min_margin)
        if not train or not held_out:
            raise UserError(
                "the samples gave no preference pair: the SFT model is too little trained for its texts to end, or "
                "there are too few prompts (--sft_steps, --train_prompts, --held_out_prompts)"
            )
        (the_world.folder / "pairs").mkdir()
        rows = world.write_jsonl(the_world.folder / "pairs" / "train.jsonl", train)
        the_world.held_out_rows = world.write_jsonl(the_world.folder / "pairs" / "test.jsonl", held_out)
        sampled = len(ranked) * options.samples_per_prompt
        the_world.counts |= {
            "samples_ranked": sampled,
            "samples_left_out": sampled - sum(len(entry.completions) for entry in ranked),
            "train_prompts": len(texts.train_prompts),
            "held_out_prompts": len(texts.held_out_prompts),
            "train_pairs": len(train),
            "held_out_pairs": len(held_out),
        }
        stage.outcome = f"{len(train)} for training, {len(held_out)} held out, from {sampled} samples"
    return rows


def _measure_reference(the_world: World) -> tuple[Point, list[str]]:
    """Measures the SFT model: its reward and entropy, and the zeros every trajectory starts from."""
    sft = the_world.model
    pairs = prepare_pairs(the_world.held_out_rows, Tokeniser(the_world.tokenizer))
    held_out = evaluate_pairs(sft, sft, pairs, objectives.dpo(the_world.options.beta), EVALUATION_BATCH)
    return the_world.measure(sft, sft, 0, held_out)


def _align(
    name: str, the_world: World, train_rows: list[dict[str, Any]], stages: show.Stages
) -> tuple[list[Point], list[str]]:
    """Trains one objective from the SFT model's folder; its points, and the final policy's completions."""
    options = the_world.options
    with stages.stage(show.NAMES[name]) as stage:
        args = TDPOConfig(
            **_shared(options, the_world.folder / name),
            objective=name,
            beta=options.beta,
            alpha=options.alpha if name == "tdpo2" else None,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            max_steps=options.steps,
            warmup_steps=int(WARMUP * options.steps),
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=EVALUATION_BATCH,
            eval_strategy="steps",
            eval_steps=options.eval_every,
        )
        points = PointCallback(the_world)
        trainer = TDPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(the_world.sft_folder),
            args=args,
            train_dataset=train_rows,
            eval_dataset=the_world.held_out_rows,
            processing_class=the_world.tokenizer,
            callbacks=[show.StageCallback(stage), points],
        )
        points.reference = trainer.reference
        trainer.train()
        trainer.save_model()
        last = points.points[-1]
        stage.outcome = (
            f"reward {show.plus_minus(last.reward, 3)}, "
            f"KL(policy || reference) {show.plus_minus(last.samples.kl, 2)} nats"
        )
    return points.points, points.completions


def _shared(options: DemoOptions, output_dir: Path) -> dict[str, Any]:
    """Returns the training arguments that fine-tuning and every objective have in common."""
    return {
        "output_dir": str(output_dir),
        "seed": options.seed,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,  # the demo has a bar of its own
        "max_grad_norm": CLIP,
    }


def _report(result: DemoResult, the_world: World, samples: Mapping[str, Sequence[str]], console: Console) -> None:
    """Writes samples, numbers and figure, then prints the table and what to try next."""
    folder, prompts = the_world.folder, the_world.texts.held_out_prompts
    world.write_jsonl(
        folder / "samples.jsonl",
        (
            {"model": name, "prompt": prompt, "completion": text, "reward": reward(prompt + text)}
            for name, completions in samples.items()
            for prompt, text in zip(prompts, completions, strict=True)
        ),
    )
    (folder / "results.json").write_text(json.dumps(result.as_dict(), indent=2) + "\n", encoding="utf-8")
    show.draw(result, folder / "frontier.png")
    shown = {name: (completions[0], reward(prompts[0] + completions[0])) for name, completions in samples.items()}
    console.print()
    console.print(show.result_table(result.rows))
    console.print(show.legend(result), markup=False)
    console.print()
    console.print(show.side_by_side(prompts[0], shown))
    console.print(f"\nAll numbers: {folder}/results.json   figure: {folder}/frontier.png", soft_wrap=True, markup=False)
    console.print("Next steps:", markup=False)
    for command in show.next_commands(folder):
        console.print(f"  {command}", soft_wrap=True, markup=False)
    console.print(f"{result.seconds['total']:.0f} s in all", markup=False)


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "tdpo": tdpo.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": str(torch.get_num_threads()),
    }
