"""The demo: from a grammar to three preference-trained policies, a table and a figure, without a download.

texts -> tokenizer and model -> ``tdpo sft`` -> sampled and ranked completions -> ``tdpo frontier`` over dpo, tdpo1 and
tdpo2. Training and measuring run the ordinary commands; only the data and the model are specific to the demo.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tdpo import objectives
from tdpo.commands import frontier, sft
from tdpo.commands.common import console
from tdpo.config.checks import check_values, documented
from tdpo.demo import world
from tdpo.errors import UserError
from tdpo.evaluate.frontier import read_rows
from tdpo.evaluate.generate import Sampling
from tdpo.files import check_writable

SAMPLING_BATCH = 256
MARK = ".tdpo-demo"
"""Marker file of a folder that the demo created."""
ENTRIES = ("base", "sft", "pairs", "frontier", "sft.jsonl", "prompts.jsonl", "report.html")
"""Everything the demo writes into its folder."""
FINE_TUNING = """--model_name_or_path {folder}/base --dataset_name {folder}/sft.jsonl --output_dir {folder}/sft
    --max_steps {sft_steps} --learning_rate {sft_learning_rate} --lr_scheduler_type linear
    --warmup_steps {sft_steps_warmup} --per_device_train_batch_size {batch_2} --max_grad_norm 10 --seed {seed}
    --logging_steps 100 --save_strategy no"""
SWEEP = """--model_name_or_path {folder}/sft --dataset_name {folder}/pairs --eval_dataset_name {folder}/pairs
    --prompts_dataset_name {folder}/prompts.jsonl --output_dir {folder}/frontier --objectives dpo tdpo1 tdpo2
    --betas {beta} --alphas {alpha} --max_steps {steps} --learning_rate {learning_rate} --warmup_steps {steps_warmup}
    --lr_scheduler_type constant_with_warmup --per_device_train_batch_size {batch_size} --seed {seed}
    --per_device_eval_batch_size 64 --max_grad_norm 10 --eval_steps {eval_every} --logging_steps 10
    --reward tdpo.demo.grammar:rewards --max_new_tokens {max_new_tokens} --batch_size 256 --save_models
    --output {page}"""
NEXT = """tdpo eval --model_name_or_path {tdpo2} --ref_model_name_or_path {folder}/sft --dataset_name {folder}/pairs \
--generate --reward tdpo.demo.grammar:rewards
tdpo inspect --model_name_or_path {tdpo2} --ref_model_name_or_path {folder}/sft --dataset_name {folder}/pairs \
--output tokens.html
tdpo generate --model_name_or_path {tdpo2} --ref_model_name_or_path {folder}/sft --dataset_name {folder}/prompts.jsonl
tdpo train --model_name_or_path {folder}/sft --dataset_name {folder}/pairs --objective tdpo2 --alpha 1.0 \
--learning_rate 2e-4 --output_dir my-tdpo2"""


@documented
@dataclass
class DemoOptions:
    """Options of the demo. Every objective uses the same model, pairs, data order, steps and learning rate.

    Attributes:
        output_dir: Output folder.
        seed: Seed of texts, weights, samples and data order.
        sft_texts: Texts from the grammar to fine-tune on.
        sft_steps: Optimizer steps of fine-tuning.
        sft_learning_rate: Learning rate of fine-tuning.
        train_prompts: Prompts of the training pairs.
        held_out_prompts: Prompts to evaluate on, none of which is trained on.
        samples_per_prompt: Completions per prompt that the reward ranks.
        min_margin: Smallest reward difference of a pair.
        beta: beta of every objective: strength of the KL constraint.
        alpha: Weight of the sequential-KL difference in tdpo2.
        learning_rate: Learning rate of preference training.
        steps: Optimizer steps of each objective.
        batch_size: Pairs per optimizer step; fine-tuning uses twice as many texts.
        eval_every: Optimizer steps between measurements.
        max_new_tokens: Maximum length of a completion in tokens.
        output: Page to write at the end; default: report.html in --output_dir.
    """

    output_dir: str = "demo-output"
    seed: int = 0
    sft_texts: int = 5000
    sft_steps: int = 300
    sft_learning_rate: float = 3e-3
    train_prompts: int = 600
    held_out_prompts: int = 256
    samples_per_prompt: int = 4
    min_margin: float = 0.05
    beta: float = 0.1
    alpha: float = 0.5
    learning_rate: float = 2e-4
    steps: int = 120
    batch_size: int = 32
    eval_every: int = 40
    max_new_tokens: int = 48
    output: str | None = None

    def __post_init__(self) -> None:
        check_values(self, sft_texts=1, sft_steps=1, train_prompts=1, held_out_prompts=2, samples_per_prompt=2)
        check_values(self, steps=1, batch_size=1, eval_every=1, max_new_tokens=1)
        for name in ("min_margin", "learning_rate", "sft_learning_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} must be positive, got {getattr(self, name):g}")
        objectives.build("tdpo2", beta=self.beta, alpha=self.alpha)  # raises an error for invalid values


def run_demo(options: DemoOptions | None = None) -> list[dict[str, str]]:
    """Runs the demo and writes models, pairs, tables and the plot to ``options.output_dir``.

    Args:
        options: Sizes and seeds; the defaults take about three minutes on two CPU cores.

    Returns:
        The rows of ``frontier/frontier.csv``.
    """
    options = options or DemoOptions()
    folder, started = claim(Path(options.output_dir).expanduser()), time.perf_counter()
    threads = torch.get_num_threads()
    # A model this small gains little from a second thread, and is much slower if another process uses its core.
    torch.set_num_threads(1)
    try:
        prompts = _build(options, folder)
        _run("sft", sft.run, FINE_TUNING, options, folder)
        _make_pairs(options, folder, prompts)
        _run("frontier", frontier.run, SWEEP, options, folder)
    finally:
        torch.set_num_threads(threads)
    _show_samples(folder)
    say("\nNext steps:")
    for command in NEXT.format(folder=shlex.quote(str(folder)), tdpo2=_tdpo2(folder)).splitlines():
        say(f"  {command}")
    say(f"{time.perf_counter() - started:.0f} s in all")
    return read_rows(folder / "frontier" / "frontier.csv")


def claim(folder: Path) -> Path:
    """Marks a new or empty folder as the demo's; removes :data:`ENTRIES` from a folder that is already marked.

    Raises:
        UserError: naming the folder, if it is a file, is not writable, or holds files that the demo did not write.
    """
    check_writable(folder)
    if any(folder.iterdir()) and not (folder / MARK).is_file():
        raise UserError(
            f"--output_dir {folder}: holds files that the demo did not write and might replace; choose a new folder"
        )
    (folder / MARK).write_text(f"Written by tdpo demo, which replaces in this folder: {', '.join(ENTRIES)}\n")
    for path in (folder / name for name in ENTRIES):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    return folder


def say(text: str) -> None:
    """Prints a line of the demo."""
    console().print(text, soft_wrap=True)


def _run(name: str, command: Callable[[Sequence[str]], None], words: str, options: DemoOptions, folder: Path) -> None:
    """Prints a command line and runs it."""
    page = shlex.quote(options.output or str(folder / "report.html"))
    values = {**asdict(options), "batch_2": 2 * options.batch_size, "page": page}
    for stage in ("sft_steps", "steps"):
        values[f"{stage}_warmup"] = values[stage] // 20
    line = " ".join(words.split()).format(folder=shlex.quote(str(folder)), **values)
    say(f"\n$ tdpo {name} {line}")
    command(shlex.split(line))


def _build(options: DemoOptions, folder: Path) -> list[str]:
    """Writes texts, held-out prompts, tokenizer and a randomly initialised model; returns all prompts."""
    texts, prompts, held_out = world.make_texts(
        options.sft_texts, options.train_prompts, options.held_out_prompts, options.seed
    )
    world.write_jsonl(folder / "sft.jsonl", ({"text": text} for text in texts))
    world.write_jsonl(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in held_out))
    tokenizer = world.build_tokenizer(texts)
    model = world.build_model(tokenizer, options.seed)
    tokenizer.save_pretrained(folder / "base")
    model.save_pretrained(folder / "base")
    say(f"{len(texts)} texts, vocabulary {len(tokenizer)}, {model.num_parameters():,} parameters")
    return [*prompts, *held_out]


def _make_pairs(options: DemoOptions, folder: Path, prompts: list[str]) -> None:
    """Samples completions of every prompt, ranks them by reward and writes preference pairs."""
    say("\nsampling and ranking completions for preference pairs ...")
    model: Any
    model, tokenizer = (kind.from_pretrained(folder / "sft") for kind in (AutoModelForCausalLM, AutoTokenizer))
    sampling = Sampling(num_samples=options.samples_per_prompt, batch_size=SAMPLING_BATCH, seed=options.seed + 1)
    sampling.max_new_tokens = options.max_new_tokens
    ranked = world.rank_samples(model, tokenizer, prompts, sampling)
    pairs = {
        "train": world.every_pair(ranked[: options.train_prompts], options.min_margin),
        "test": world.extreme_pairs(ranked[options.train_prompts :], options.min_margin),
    }
    if not all(pairs.values()):
        raise UserError(
            "the samples contain no preference pair: increase --sft_steps, so that texts of the SFT model end, or "
            "--train_prompts and --held_out_prompts"
        )
    (folder / "pairs").mkdir()
    for side, found in pairs.items():
        world.write_jsonl(folder / "pairs" / f"{side}.jsonl", found)
    say(f"{len(pairs['train'])} pairs for training, {len(pairs['test'])} held out")


def _show_samples(folder: Path) -> None:
    """Prints the first held-out prompt with the completion of every model."""
    say("\nOne held-out prompt:")
    paths = [folder / "frontier" / "samples-sft.jsonl", *sorted(folder.glob("frontier/runs/*/samples.jsonl"))]
    for path in paths:
        row = json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0])
        name = "sft" if path.name == "samples-sft.jsonl" else path.parent.name.split("-")[0]
        say(f"  {name:<6} {row['reward']:+.2f}  {row['prompt']} ...{row['response']}")


def _tdpo2(folder: Path) -> str:
    return shlex.quote(str(next(iter(folder.glob("frontier/runs/tdpo2*"))) / "model"))
