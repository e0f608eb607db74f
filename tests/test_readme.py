"""Every command and every line of Python in README and docs runs, in their order, on the small world."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import NOUNS, REPOSITORY, preference_rows, write_jsonl

from tdpo.cli import main

PAGES = ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "docs").glob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A user's folder: their model, their pairs, and the project's examples."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(model_folder, folder / "my-model")
    write_jsonl(folder / "my-pairs.jsonl", preference_rows())
    odd = [{"question": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in preference_rows()]
    write_jsonl(folder / "my-odd.jsonl", odd)
    (folder / "my_formats.py").write_text(
        "def convert(row):\n    return {'prompt': row['question'], 'chosen': row['good'], 'rejected': row['bad']}\n"
    )
    scored = [
        {"prompt": f"The {NOUNS[i % 10]} {i // 10}", "completion": f" {NOUNS[(i + j) % 10]}", "reward": j}
        for i in range(20)
        for j in range(3)
    ]
    write_jsonl(folder / "my-scored.jsonl", scored)
    shutil.copytree(REPOSITORY / "examples", folder / "examples")
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_python_of_a_page_run(page: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    commands = [line for block in blocks(page, "bash") for line in block.splitlines() if line.startswith("tdpo ")]
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    names: dict[str, object] = {}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), names)
    if page == "README.md":
        assert len(commands) == 10
        assert (desk / "my-tdpo-2" / "model.safetensors").is_file()
        assert names["out"].loss.shape == (1,)
        assert names["out"].tokens.kl.shape == (3,)


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for block in blocks("README.md", "bash"):
        for target in re.findall(r"^make (\w+)", block, re.M):
            assert re.search(rf"^{target}:", makefile, re.M), target


def test_local_links_lead_somewhere() -> None:
    for page in PAGES:
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (REPOSITORY / page).parent.joinpath(target).exists(), f"{page}: {target}"
