"""``tdpo frontier``: sweeps objectives and their parameters and plots reward against KL."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from tdpo.commands.common import console, quieten, read_dataset, user_errors, write_text
from tdpo.commands.options import parse
from tdpo.config import AdapterOptions, EvalDataConfig, ModelConfig, TDPOConfig
from tdpo.config.row_spec import RowSpec
from tdpo.data.options import check_format, make_tokeniser, open_held_out, open_training
from tdpo.data.tokenise import Tokeniser
from tdpo.errors import Stopped, UserError
from tdpo.evaluate.frontier import Row, write_rows
from tdpo.evaluate.measure import Evaluator
from tdpo.evaluate.prompts import Prompt, encode_prompts, read_prompts
from tdpo.evaluate.rewards import RewardOptions, check_reward, load_reward
from tdpo.files import check_writable
from tdpo.models.load import load_model, load_tokenizer
from tdpo.report.collect import RECORD, read_runs
from tdpo.report.frontier import report_frontier
from tdpo.report.run import run_page
from tdpo.rl.registry import RL
from tdpo.sweep import Sweep, SweepOptions, plan
from tdpo.train.stopping import handle_signals

WORKER = "TDPO_FRONTIER_WORKER"
"""Environment variable with the number of a worker process."""
CURVES = 10
"""Runs whose curves the page shows: one for each colour."""
OPTIONS = (ModelConfig, AdapterOptions, EvalDataConfig, RewardOptions, SweepOptions, TDPOConfig)


def run(argv: Sequence[str]) -> None:
    """Runs the command, or resumes it after an interruption."""
    model_config, adapter, data, reward_options, options, args = parse("frontier", OPTIONS, argv, ["output_dir"])
    quieten()
    args.seed = options.seed  # one option: seed of samples, and of runs that set none
    _check(reward_options, args, data)
    runs = plan(options, args)
    labels = list(dict.fromkeys(run.label for run in runs))
    if options.baseline not in (None, *labels):
        raise UserError(f"--baseline {options.baseline}: there are {', '.join(labels)}")
    if adapter.use_peft and any(run.settings["objective"] in RL for run in runs):
        raise UserError("ppo and rloo train all weights: leave --use_peft out, or remove these objectives")
    folder = Path(str(args.output_dir)).expanduser()
    check_writable(folder)
    options = replace(options, samples_dir=options.samples_dir or str(folder / "samples"))
    worker, workers = os.environ.get(WORKER), options.workers or max(1, torch.cuda.device_count())
    tokenizer = load_tokenizer(model_config)
    tokeniser = make_tokeniser(args, tokenizer)
    spec = args.row_spec()

    @cache
    def pairs(name: str | None) -> Any:
        named = data if name is None else replace(data, dataset_name=name, datasets=[])
        return read_dataset(open_training(named, spec), args, tokeniser)

    held_out: Any = open_held_out(data, spec)
    held_out = read_dataset(held_out, args, tokeniser)
    pairs(None)
    # Where workers train, their GPUs are left to them; --use_cpu holds for the reference too.
    load = partial(_load, model_config, "cpu" if workers > 1 and worker is None else args.device)
    reference = load()
    prompts = _prompts(data, options, args, tokeniser, reference)
    reward = load_reward(reward_options, tokenizer)
    check_reward(reward, [{"prompt": prompt.content, "response": " a"} for prompt in prompts[:2]])
    if worker is None:
        console().print(f"{len(runs)} runs, {len(prompts)} prompts; writing results to {folder}", soft_wrap=True)
    sweep = Sweep(
        folder, runs, load, tokenizer, pairs, held_out, partial(_train_prompts, data, args, tokeniser),
        Evaluator(reference, tokenizer, prompts, reward, options), partial(_print, worker), options.save_models,
        adapter.peft_config(),
    )  # fmt: skip
    if workers > 1 and worker is None:
        failures = _start_workers(argv, min(workers, len(runs)))
    else:
        with user_errors():
            failures = sweep.execute()
    if worker is None:
        rows = sweep.rows()
        write_rows(folder / "frontier.csv", rows)
        page = _write_report(rows, folder, options)
        seconds = sweep.seconds()
        share = seconds["measure"] / max(sum(seconds.values()), 1e-9)
        console().print(f"measuring took {share:.0%} of {sum(seconds.values()):.0f} s; rows in {folder}/frontier.csv")
        console().print(f"report in {page}", soft_wrap=True)
        failures = failures or [f"{name}: another process trains it" for name in sweep.unfinished()]
    if failures:
        raise UserError("not every run finished:\n  " + "\n  ".join(failures))


def _write_report(rows: Sequence[Row], folder: Path, options: SweepOptions) -> Path:
    """Prints the tables, writes the figure and the page with it and the curves of runs; returns the page's path."""
    tables, figure = report_frontier(rows, folder, console(), options.baseline, options.equal_kl or None)
    recorded = sorted(path.parent for path in folder.glob(f"runs/*/{RECORD}"))
    more = f"Curves of the first {CURVES} of {len(recorded)} runs; tdpo report shows others."
    note = more if len(recorded) > CURVES else ""
    path = Path(options.output or folder / "report.html")
    write_text(path, run_page(read_runs(recorded[:CURVES]), f"Sweep: {folder.name}", figure, tables, note))
    return path


DECIDED = {
    "reference_cache": "a sweep keeps its own in --output_dir",
    "save_steps": "the runs of a sweep are saved at every measurement (--eval_steps)",
    "save_total_limit": "of each run of a sweep the newest checkpoint stays until it is finished",
    "report_to": "the runs of a sweep are in its own report",
}
"""Options that a sweep decides for its runs."""


def _check(reward: RewardOptions, args: TDPOConfig, data: EvalDataConfig) -> None:
    """Checks the options that a sweep requires, before anything is loaded."""
    check_format(args)
    spec = args.row_spec()
    open_training(data, spec)
    if open_held_out(data, spec) is None:
        raise UserError("a frontier is measured on held-out pairs: set --eval_dataset_name or --test_fraction")
    if not reward.reward:
        raise UserError("--reward is missing: a frontier plots reward against KL")
    reward.check_for_samples()
    standard = TDPOConfig(output_dir=args.output_dir)
    for name, reason in DECIDED.items():
        if getattr(args, name) != getattr(standard, name):
            raise UserError(f"--{name}: {reason}; leave it out")
    if not args.eval_steps or args.eval_steps < 1:
        raise UserError("--eval_steps is missing: the number of optimizer steps between measurements of a run")


def _load(model_config: ModelConfig, device: torch.device | str) -> Any:
    return load_model(model_config, trainable=True).to(device)


def _prompts(
    data: EvalDataConfig, options: SweepOptions, args: TDPOConfig, tokeniser: Tokeniser, model: Any
) -> list[Prompt]:
    """Reads the prompts to sample from: those of ``prompts_dataset_name``, or of the held-out pairs."""
    spec = RowSpec() if options.prompts_dataset_name else args.row_spec()
    name, split = options.prompts_dataset_name or data.eval_dataset_name, data.dataset_test_split
    if name is None and data.datasets:
        raise UserError("of a mixture no prompts can be held out: give --prompts_dataset_name or --eval_dataset_name")
    if name is None:
        spec, name, split = replace(spec, side=data.side(test=True)), str(data.dataset_name), data.dataset_train_split
    asked = read_prompts(name, split, data.dataset_config, spec, tokeniser, options.num_prompts)
    return encode_prompts(tokeniser, asked, [model], options.max_new_tokens, args.lengths().max_prompt_length, name)


def _train_prompts(data: EvalDataConfig, args: TDPOConfig, tokeniser: Tokeniser) -> list[Prompt]:
    """Reads the prompts of the training data, for PPO and RLOO."""
    if data.datasets:
        raise UserError("ppo and rloo read their prompts from one dataset: set --dataset_name, not --datasets")
    spec = replace(args.row_spec(), side=data.side(test=False))
    asked = read_prompts(str(data.dataset_name), data.dataset_train_split, data.dataset_config, spec, tokeniser)
    return [Prompt(turns.prompt, ids) for turns, ids in zip(asked, tokeniser.prompts(asked), strict=True)]


def _print(worker: str | None, line: str) -> None:
    console().print(line if worker is None else f"worker {worker}: {line}", soft_wrap=True)


def _start_workers(argv: Sequence[str], count: int) -> list[str]:
    """Runs the same command in several processes, which train runs until none is left; forwards signals to all of them.

    Returns:
        An error message for each worker that failed.

    Raises:
        Stopped: after SIGINT or SIGTERM, when every worker has saved its state.
    """
    devices, received = torch.cuda.device_count(), []
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(number)

    with handle_signals(forward):
        for number in range(count):
            if received:
                break
            environment = {**os.environ, WORKER: str(number)}
            if devices:
                named = os.environ.get("CUDA_VISIBLE_DEVICES")  # those of the machine that this process may use
                visible = named.split(",") if named else [str(device) for device in range(devices)]
                environment["CUDA_VISIBLE_DEVICES"] = visible[number % devices].strip()
            command = [sys.executable, "-m", "tdpo", "frontier", *argv]
            processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
        codes = [process.wait() for process in processes]
    if received:
        raise Stopped("interrupted: run the same command to resume", 128 + received[0])
    return [f"worker {number} ended with code {code}" for number, code in enumerate(codes) if code]
