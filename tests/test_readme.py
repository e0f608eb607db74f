"""Every command and every line of Python in README and docs runs, in its order, in a small world."""

from __future__ import annotations

import os
import pkgutil
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import NOUNS, REPOSITORY, preference_rows, write_jsonl

from tdpo.cli import main

PAGES = ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "docs").glob("*.md"))]
SMALL_DEMO = {
    "sft_texts": 400, "sft_steps": 60, "train_prompts": 24, "held_out_prompts": 8, "steps": 4, "eval_every": 2,
    "batch_size": 8, "max_new_tokens": 40,
}  # fmt: skip
LAUNCHERS = ("tdpo", "torchrun", "srun", "scontrol")
CODE_BLOCKS = {
    "README.md": (6, 1), "docs/python.md": (0, 4), "docs/training.md": (6, 0), "docs/distributed.md": (1, 0),
    "docs/objectives.md": (1, 1), "docs/evaluation.md": (1, 1), "docs/frontier.md": (1, 0), "docs/rewards.md": (0, 1),
    "docs/rlhf-baselines.md": (0, 1), "docs/agents.md": (0, 1), "docs/token-view.md": (3, 1), "docs/start.md": (4, 0),
    "docs/report.md": (2, 0), "docs/choosing.md": (1, 0),
}  # fmt: skip
"""Commands and blocks of Python that a page has at least, so that a change of its fences is noticed."""


def blocks(page: str, language: str) -> list[str]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.fixture
def desk(tmp_path: Path, model_folder: Path) -> Path:
    """A user's folder: a model, data in a few formats, and the project's examples."""
    folder = tmp_path / "desk"
    folder.mkdir()
    shutil.copytree(model_folder, folder / "my-model")
    shutil.copytree(model_folder, folder / "my-sft")
    write_jsonl(folder / "my-pairs.jsonl", preference_rows())
    odd = [{"question": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in preference_rows()]
    write_jsonl(folder / "my-odd.jsonl", odd)
    (folder / "my_formats.py").write_text(
        "def convert(row):\n    return {'prompt': row['question'], 'chosen': row['good'], 'rejected': row['bad']}\n"
        "def reward(texts):\n    return [text.count('e') / len(text) for text in texts]\n"
    )
    scored = [
        {"prompt": f"The {NOUNS[i % 10]} {i // 10}", "completion": f" {NOUNS[(i + j) % 10]}", "reward": j}
        for i in range(20)
        for j in range(3)
    ]
    write_jsonl(folder / "my-scored.jsonl", scored)
    shutil.copytree(REPOSITORY / "examples", folder / "examples")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash") or blocks(page, "python")])
def test_commands_and_python_of_a_page_run(
    page: str, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path if page == "README.md" else desk  # the README starts from nothing
    monkeypatch.chdir(folder)
    for text in blocks(page, "yaml"):
        if name := re.match(r"# (\S+\.yaml)\n", text):
            (folder / name[1]).write_text(text)
    if page == "docs/training.md":
        shutil.rmtree(folder / "my-sft")  # its own command makes it
    if page == "docs/objectives.md":
        (folder / "my_objectives.py").write_text(blocks(page, "python")[0])
        monkeypatch.syspath_prepend(folder)
    commands = [line for block in blocks(page, "bash") for line in block.splitlines() if line.startswith("tdpo ")]
    for command in commands:
        words = shlex.split(command)[1:]
        if words[0] == "demo":
            words += [word for name, value in SMALL_DEMO.items() for word in (f"--{name}", str(value))]
        assert main(words) == 0, command
    names: dict[str, object] = {}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), names)
    expected_commands, expected_blocks = CODE_BLOCKS.get(page, (1, 0))
    assert len(commands) >= expected_commands
    assert len(blocks(page, "python")) >= expected_blocks
    if page == "README.md":
        assert (folder / "my-tdpo" / "model.safetensors").is_file()
        assert (folder / "my-tdpo-2" / "model.safetensors").is_file()
    if page == "docs/python.md":
        assert names["out"].loss.shape == (1,)
        assert names["out"].tokens.kl.shape == names["stats"].kl.shape == (3,)


def recorded_commands(script: str, folder: Path) -> list[list[str]]:
    """Runs a shell script with launchers that only write their words to a file, and returns these."""
    programs = folder / "bin"
    programs.mkdir()
    for name in LAUNCHERS:
        (programs / name).write_text(
            f'#!/bin/bash\nprintf "%s\\0" {name} "$@" >> "$RECORD"; printf "\\n" >> "$RECORD"\n'
        )
        (programs / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}", "RECORD": str(folder / "record"),
        "SLURM_JOB_NODELIST": "first", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7",
    }  # fmt: skip
    subprocess.run(["bash", "-eu", "-c", script], cwd=folder, env=environment, check=True)
    lines = (folder / "record").read_text().split("\0\n")
    return [line.split("\0") for line in lines if line]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")])
def test_launched_commands_of_a_page_train(
    page: str, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    for number, script in enumerate(blocks(page, "sh")):
        folder = tmp_path / str(number)
        folder.mkdir()
        commands = [c for c in recorded_commands(script.replace("/shared/", "shared/"), folder) if "train" in c]
        assert commands, script
        for index, words in enumerate(commands):
            assert words[0] == "tdpo" or words[words.index("train") - 2 :][:2] == ["-m", "tdpo"]
            options = words[words.index("train") + 1 :]
            preset = options.index("--accelerate_config")
            assert (REPOSITORY / "src" / "tdpo" / "distributed" / "presets" / f"{options[preset + 1]}.yaml").is_file()
            del options[preset : preset + 2]
            output = str(folder / f"run-{index}")
            assert main(["train", *options, "--output_dir", output, "--max_steps", "1", "--use_cpu"]) == 0, words


def test_make_targets_named_in_a_page_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for page in PAGES:
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        for target in re.findall(r"`make (\w+)", text):
            assert re.search(rf"^{target}:", makefile, re.M), f"{page}: make {target}"


def test_local_links_lead_to_files() -> None:
    for page in PAGES:
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (REPOSITORY / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_functions_and_tests_of_the_equations_exist() -> None:
    text = (REPOSITORY / "docs" / "equations.md").read_text(encoding="utf-8")
    functions = re.findall(r"`(tdpo[\w.]+)`", text)
    tests = re.findall(r"`(tests/\w+\.py)::(\w+)`", text)
    assert len(functions) >= 8 and len(tests) >= 8
    for name in functions:
        assert callable(pkgutil.resolve_name(":".join(name.rsplit(".", 1)))), name
    for file, name in tests:
        assert f"def {name}(" in (REPOSITORY / file).read_text(encoding="utf-8"), f"{file}::{name}"
