"""README and docs: links have a target, commands are ones that the command line takes, the README stays short."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from fracture.cli import build_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def text_of(page: Path) -> str:
    """Return the page without its code blocks."""
    return CODE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the anchors of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", text_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shell_lines(page: Path) -> list[str]:
    """Return the commands of the page's `sh` blocks, continued lines joined."""
    blocks = [body for language, body in CODE.findall(page.read_text(encoding="utf-8")) if language == "sh"]
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("name", NAMES)
def test_links_have_a_target(name: str):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(there), f"{name}: {target}"


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_ones_that_the_command_line_takes(name: str):
    for line in shell_lines(ROOT / name):
        words = shlex.split(line, comments=True)
        if "job/" in line and "python" in words:
            script = next(word for word in words if word.startswith("job/"))
            words = ["fracture", Path(script).stem, *words[words.index(script) + 1 :]]
        if words[:1] == ["fracture"] and "…" not in line:
            build_parser(words[1]).parse_args(words[2:])


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_exist(name: str):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    lines = [line for line in shell_lines(ROOT / name) if line.startswith("make ")]
    named = {word for line in lines for word in shlex.split(line, comments=True)[1:] if "=" not in word}
    inline = set(re.findall(r"`make ([a-z-]+)", text_of(ROOT / name)))
    assert named | inline <= targets


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 80


def test_files_that_the_pages_name_are_there():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    named = {
        path
        for page in PAGES
        for path in re.findall(r"`((?:fracture|tests|cluster|job)/[\w./-]+\.\w+)`", text_of(page))
    }
    assert named <= set(tracked)
