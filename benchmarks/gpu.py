"""What a GPU user wants to know, in one command, without arguments and network: is it right, how fast, how much memory.

    python benchmarks/gpu.py

Checks come first: half precision against float64, trees against padded rows, a resumed run against one that was not
interrupted, FSDP2. Then the operation over vocabularies and widths, and a training step of a model with random weights.
Each part is a process of its own; one that fails is reported, and the others run. Writes a CSV and prints a table.
Meant to take less than eight minutes on a GPU; on a CPU everything but Triton and flex attention runs at toy sizes, and
the times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import machine, peak_above, seconds_of, write_csv
from op import loss_of, problem
from rich.console import Console
from rich.table import Table
from step import SHORT, draw_pairs, models, step_of
from transformers.utils import is_flash_attn_2_available

from tdpo import TDPOConfig, TDPOTrainer, objectives, ops
from tdpo.data.pack import pack_padded, pack_trees
from tdpo.demo.world import build_tokenizer
from tdpo.models.redirect import run_in_forward
from tdpo.models.reference import FrozenCopy
from tdpo.score import batch_loss, packer
from tdpo.types import Head, Hidden

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the problems: on a GPU those of real models, on a CPU as small as they can be."""

    vocabularies: tuple[int, ...] = (50_257, 128_256, 152_064) if ON_GPU else (1_500,)
    widths: tuple[int, ...] = (2048, 4096) if ON_GPU else (64,)
    tokens: int = 8192 if ON_GPU else 64
    dtype: torch.dtype = torch.bfloat16 if ON_GPU else torch.float32
    step_vocabulary: int = 128_256 if ON_GPU else 1_500
    step_width: int = 2048 if ON_GPU else 64
    layers: int = 16 if ON_GPU else 2
    pairs: int = 8 if ON_GPU else 1
    repetitions: int = 5 if ON_GPU else 1


SIZES = Sizes()
ONE_GPU = {"CUDA_VISIBLE_DEVICES": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
LIMIT_S = 300
"""Seconds a part may take."""
OPERATIONS = {
    "autograd": ("autograd", "auto"),
    "chunked": ("fused", "chunked"),
    "triton": ("fused", "triton"),
    "chunked, two passes": ("two-pass", "chunked"),
    "TRL's parts": ("trl-parts", "auto"),
    "Liger's DPO, no KL": ("liger-dpo", "auto"),
}
"""Implementations of the operation in the words of op.py, with the backend."""
STEPS = {
    "tdpo2, trees, flex attention": ("tdpo2", "flex_attention"),
    "tdpo2, trees, sdpa": ("tdpo2", "sdpa"),
    "tdpo2, padded rows": ("tdpo2-padded", "sdpa"),
    "TRL's DPO": ("trl-dpo", "sdpa"),
    "TDPO2 of TRL's parts": ("trl-tdpo2", "sdpa"),
}
"""Implementations of the step in the words of step.py, with the attention."""
GPU_ONLY = {"triton", "tdpo2, trees, flex attention"}
"""What has no backward pass on a CPU, or no compiler."""


def row(name: str, value: float, unit: str, passed: bool | None = None, **more: Any) -> Row:
    """Returns a row of the result; ``passed`` is None for a measurement."""
    return {"name": name, "value": value, "unit": unit, "passed": "" if passed is None else passed, **more}


def possible(names: Iterable[str]) -> list[str]:
    """Returns those of some implementations that run on this device."""
    return [name for name in names if ON_GPU or name not in GPU_ONLY]


def attempt(name: str, measure: Callable[[], list[Row]]) -> list[Row]:
    """Returns the rows of a measurement, or one that says why there are none; out of memory is no failure."""
    try:
        return measure()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        passed = None if isinstance(error, torch.OutOfMemoryError) else False
        return [row(name, float("nan"), "", passed, error=f"{type(error).__name__}: {reason}")]
    finally:
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()


def measurement(name: str, step: Callable[[], None], **sizes: int) -> list[Row]:
    """Measures time and memory of a step after one to warm up: a row each."""
    step()
    mebibytes = peak_above(step)
    milliseconds = 1000 * statistics.median(seconds_of(step, SIZES.repetitions))
    return [row(name, milliseconds, "ms", **sizes), row(name, mebibytes, "MiB", **sizes)]


def half_precision() -> list[Row]:
    """Compares the loss and its gradients in half precision with the same numbers in float64."""
    tokens, width, vocab = (1024, 1024, 32_000) if ON_GPU else (32, 16, 500)
    lengths = [tokens // 4] * 4
    objective = objectives.tdpo2(0.1, 0.5)
    rows = []
    for dtype, backend in itertools.product(("bfloat16", "float16"), ("chunked", "triton") if ON_GPU else ("chunked",)):
        policy, reference, labels = problem(tokens, width, vocab, getattr(torch, dtype), str(DEVICE))
        wide = [Hidden(s.states.detach().double(), Head(s.head.weight.detach().double())) for s in (policy, reference)]
        for leaf in (wide[0].states, wide[0].head.weight):
            leaf.requires_grad_()

        def gradients(side: Hidden, ref: Hidden, backend: Any, labels: Any = labels) -> list[torch.Tensor]:
            loss = ops.pair_loss(side, ref, labels, lengths, objective, backend=backend)[0]
            return [loss, *torch.autograd.grad(loss, (side.states, side.head.weight))]

        found, truth = gradients(policy, reference, backend), gradients(*wide, "chunked")
        for what, ours, exact, bound in zip(("loss", "states", "head"), found, truth, (1e-4, 2e-2, 2e-2), strict=True):
            error = float((ours.double() - exact).norm() / exact.norm())
            rows.append(row(f"{dtype}, {backend}: error of {what}", error, "relative", error < bound))
    return rows


def layouts() -> list[Row]:
    """Compares trees with padded rows, under every attention that takes trees here, and trains under each."""
    pairs, tokenizer = draw_pairs(SHORT, tokenizer_folder(), 0, 2, 0)
    pairs = [replace(pair, chosen_ids=pair.chosen_ids[:40], rejected_ids=pair.rejected_ids[:60]) for pair in pairs]

    def compared(attention: str) -> list[Row]:
        policy, reference = models(1_500, 512, 128, 2)
        losses, norms = [], []
        for pack in (pack_padded, pack_trees):
            for model in (policy, reference.model):
                model.to(DEVICE)
                model.set_attn_implementation(attention if pack is pack_trees else "sdpa")  # type: ignore[operator]
            packer("tree" if pack is pack_trees else "padded", [policy, reference.model])
            policy.zero_grad()
            loss = batch_loss(policy, reference, pack(pairs).to(DEVICE), objectives.tdpo2(0.1, 0.5))[0]
            loss.backward()
            losses.append(loss.item())
            norms.append(torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm().item())
        errors = {
            what: abs(trees / padded - 1) for what, (padded, trees) in (("loss", losses), ("gradient norm", norms))
        }
        name = f"trees against padded rows, {attention}"
        return [row(f"{name}: {what}", error, "relative", error < 1e-4) for what, error in errors.items()]

    def trained(attention: str) -> list[Row]:
        """Trains a step of models that are on the CPU when the trainer gets them, as from the command line."""
        takes_trees = attention != "flash_attention_2"
        policy, reference = models(1_500, 512, 128, 2)
        for model in (policy, reference.model):
            model.to(torch.float32 if takes_trees else torch.bfloat16)
            model.set_attn_implementation(attention)  # type: ignore[operator]
        with tempfile.TemporaryDirectory() as folder:
            args = TDPOConfig(
                output_dir=folder, max_steps=1, per_device_train_batch_size=2, save_strategy="no", report_to="none",
                disable_tqdm=True, use_cpu=not ON_GPU,
            )  # fmt: skip
            trainer = TDPOTrainer(policy, reference.model, args, train_dataset=pairs, processing_class=tokenizer)
            loss = trainer.train().training_loss
        passed = math.isfinite(loss) and trainer.layout.startswith("layout: trees") == takes_trees
        return [row(f"trainer, {attention}, {trainer.layout}: loss", loss, "nats", passed)]

    attentions = ("sdpa", "flex_attention") if ON_GPU else ("sdpa",)
    found = [one for name in attentions for one in attempt(name, partial(compared, name))]
    trained_with = (*attentions, *(["flash_attention_2"] if ON_GPU and is_flash_attn_2_available() else []))
    return found + [one for name in trained_with for one in attempt(f"trainer, {name}", partial(trained, name))]


def resumption() -> list[Row]:
    """Trains four steps, and the last two again from the checkpoint; the weights must be equal bit for bit.

    On a GPU this takes torch's deterministic algorithms: attention and sparse gradients differ from run to run without.
    """
    torch.use_deterministic_algorithms(ON_GPU)
    weights = []
    with tempfile.TemporaryDirectory() as folder:
        pairs, tokenizer = draw_pairs(SHORT, tokenizer_folder(), 0, 8, 0)
        for checkpoint in (None, f"{folder}/checkpoint-2"):
            policy, reference = models(1_500, 512, 64, 2)
            args = TDPOConfig(
                output_dir=folder, max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-3,
                report_to="none", disable_tqdm=True, bf16=ON_GPU, use_cpu=not ON_GPU,
            )  # fmt: skip
            trainer = TDPOTrainer(policy, reference.model, args, train_dataset=pairs, processing_class=tokenizer)
            trainer.train(resume_from_checkpoint=checkpoint)
            weights.append(torch.cat([p.detach().flatten().float().cpu() for p in trainer.model.parameters()]))
    difference = float((weights[0] - weights[1]).abs().max())
    return [row("resumed run against a whole one: largest difference of weights", difference, "", difference == 0)]


def fsdp2() -> list[Row]:
    """Compares loss and gradients of a model sharded by FSDP2, on one process, with those of the whole model."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    pairs = draw_pairs(SHORT, tokenizer_folder(), 0, 2, 0)[0]
    objective = objectives.tdpo2(0.1, 0.5)
    policy, reference = models(1_500, 512, 64, 2)
    policy.to(DEVICE)
    reference.to(DEVICE)
    batch = pack_trees(pairs).to(DEVICE)

    def gradients() -> tuple[float, list[torch.Tensor]]:
        score = partial(batch_loss, reference=reference, batch=batch, objective=objective)
        loss = run_in_forward(policy, policy, score)[0]
        loss.backward()
        found = [p.grad for p in policy.parameters()]
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]  # type: ignore[union-attr]
        policy.zero_grad()
        return loss.item(), [g.clone() for g in whole]  # type: ignore[union-attr]

    loss, expected = gradients()
    with tempfile.TemporaryDirectory() as folder:
        store = {"init_method": f"file://{folder}/init", "rank": 0, "world_size": 1}
        init_process_group("nccl" if ON_GPU else "gloo", **store)
        mesh = init_device_mesh(DEVICE.type, (1,))
        for layer in policy.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        fully_shard(policy, mesh=mesh)
        sharded_loss, found = gradients()
        destroy_process_group()
    errors = {
        "loss": abs(sharded_loss / loss - 1),
        "gradients": max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)),
    }
    return [row(f"FSDP2 on one process: {what}", error, "relative", error < 1e-5) for what, error in errors.items()]


def operation(vocab: int, width: int) -> list[Row]:
    """Measures forward and backward of the loss from hidden states, with the head's gradient."""
    policy, reference, labels = problem(SIZES.tokens, width, vocab, SIZES.dtype, str(DEVICE))
    leaves = [policy.states, policy.head.weight]

    def measured(name: str) -> list[Row]:
        implementation, backend = OPERATIONS[name]
        loss = loss_of(implementation, policy, reference, labels, backend)

        def step() -> None:
            loss().backward()
            for leaf in leaves:
                leaf.grad = None

        return measurement(name, step, vocabulary=vocab, width=width)

    return [found for name in possible(OPERATIONS) for found in attempt(name, partial(measured, name))]


def steps(names: Iterable[str]) -> list[Row]:
    """Measures forward and backward of a step on pairs with short prompts, for some of :data:`STEPS`."""
    pairs, tokenizer = draw_pairs(SHORT, tokenizer_folder(), 0, SIZES.pairs, 0)

    def measured(name: str) -> list[Row]:
        implementation, attention = STEPS[name]
        with DEVICE:
            policy, reference = models(SIZES.step_vocabulary, 512, SIZES.step_width, SIZES.layers)
        reference = FrozenCopy(reference.model.to(DEVICE, SIZES.dtype))
        policy = policy.to(DEVICE, SIZES.dtype)
        for model in (policy, reference.model):
            model.set_attn_implementation(attention)  # type: ignore[operator]
        loss = step_of(implementation, policy, reference, pairs, tokenizer)

        def step() -> None:
            loss().backward()
            policy.zero_grad()

        return measurement(name, step, parameters=sum(p.numel() for p in policy.parameters()), pairs=len(pairs))

    return [found for name in names for found in attempt(name, partial(measured, name))]


def tokenizer_folder() -> str:
    """Makes a small tokenizer and returns its folder."""
    folder = Path(tempfile.gettempdir()) / "tdpo-gpu-benchmark"
    if not (folder / "tokenizer.json").is_file():
        build_tokenizer(["one small text is enough for a tokenizer"]).save_pretrained(folder)
    return str(folder)


CHECKS = {"half precision": half_precision, "layouts": layouts, "resumption": resumption, "fsdp2": fsdp2}


def parts() -> dict[str, Callable[[], list[Row]]]:
    """Returns the parts by name, in the order in which they run."""
    found: dict[str, Callable[[], list[Row]]] = dict(CHECKS)
    for vocab, width in itertools.product(SIZES.vocabularies, SIZES.widths):
        found[f"operation {vocab} {width}"] = partial(operation, vocab, width)
    for names in [[name] for name in possible(STEPS)] if ON_GPU else [possible(STEPS)]:  # at toy sizes in one process
        found[f"step {', '.join(names)}"] = partial(steps, names)
    return found


def run_part(name: str) -> list[Row]:
    """Runs a part in a process of its own."""
    words = [sys.executable, __file__, "--part", name]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, env={**ONE_GPU, **os.environ})
    except subprocess.TimeoutExpired:
        return [row(name, float("nan"), "", False, error=f"stopped after {LIMIT_S} s")]
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]
        return [row(name, float("nan"), "", False, error=reason[:200])]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[{")]  # libraries print, too
    return json.loads(lines[-1]) if lines else [row(name, float("nan"), "", False, error="it printed no result")]


def show(results: list[Row]) -> None:
    """Prints checks and measurements as a table."""
    table = Table("part", "what", "value", "passed", title=f"tdpo on {machine_name()}")
    for result in results:
        shape = " ".join(f"{key} {result[key]:,}" for key in ("vocabulary", "width") if result.get(key))
        value = result.get("error") or f"{result['value']:.4g} {result['unit']}"
        table.add_row(result["part"].split(" TDPO")[0][:24], f"{result['name']} {shape}", value, str(result["passed"]))
    Console(width=150).print(table)


def machine_name() -> str:
    """Returns the name of the GPU, or says that there is none."""
    return torch.cuda.get_device_name() if ON_GPU else "a CPU, at toy sizes"


def main() -> None:
    """Runs one part and prints JSON, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", help="run this one here and print JSON")
    parser.add_argument("--csv", default="gpu.csv", help="file to write")
    options = parser.parse_args()
    if options.part:
        torch.set_num_threads(1 if not ON_GPU else torch.get_num_threads())
        print(json.dumps(parts()[options.part]()))
        return
    named = machine(argparse.Namespace(threads=torch.get_num_threads()))
    results: list[Row] = []
    for name in parts():
        found = run_part(name)
        failed = sum(result["passed"] is False for result in found)
        print(f"{name}: {f'{failed} failed' if failed else 'done'}", file=sys.stderr, flush=True)
        results += [{"part": name, **result} for result in found]
    columns = ("part", "name", "value", "unit", "passed", "vocabulary", "width", "parameters", "pairs", "error")
    write_csv(options.csv, [{column: result.get(column, "") for column in columns} | named for result in results])
    show(results)
    failures = sum(result["passed"] is False for result in results)
    print(f"{failures} of {len(results)} failed" if failures else f"{len(results)} results, none failed")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
