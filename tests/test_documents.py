"""Lines end at 120 columns, in prose as in code, and every link of a document leads somewhere."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLUMNS = 120
CODE = {".py", ".cpp", ".h", ".sh", ".toml", ".html", ".css", ".js"}
EXEMPT = {"requirements.lock"}  # written by pip
NOT_OURS = {".venv", "data", "runs", "models"}  # at the top, and whatever hides behind a dot anywhere


def tracked(root: Path) -> list[Path]:
    """Files that git knows, relative to `root`; without git, all that is not an environment, data or a result."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        listed = ""
    files = [Path(name) for name in listed.split("\0") if name and (root / name).is_file()]
    return files or [path for path in walk(root) if path.parts[0] not in NOT_OURS]


def walk(root: Path) -> Iterator[Path]:
    """Files below `root`, relative to it, but for hidden ones, bytecode and built packages."""
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        skipped = any(part.startswith(".") or part.endswith((".egg-info", "__pycache__")) for part in relative.parts)
        if path.is_file() and not skipped:
            yield relative


def documents(files: list[Path]) -> list[Path]:
    """README.md and docs/*.md."""
    return [path for path in files if path == Path("README.md") or path.match("docs/*.md")]


def has_limit(path: Path) -> bool:
    """Whether lines of this file are to be read by people: documents, code, configurations and launch files."""
    if path.name in EXEMPT:
        return False
    return bool(documents([path])) or path.parts[0] in {"configs", "launch"} or path.suffix in CODE


def long_lines(root: Path, files: list[Path]) -> list[str]:
    """`FILE:LINE: N columns` for each line over the limit."""
    return [
        f"{path}:{number}: {len(line)} columns"
        for path in filter(has_limit, files)
        for number, line in enumerate((root / path).read_text(encoding="utf-8").split("\n"), 1)
        if len(line) > COLUMNS
    ]


def prose(text: str) -> Iterator[str]:
    """Lines of a Markdown document outside of fenced and indented code."""
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield line


def anchors(text: str) -> set[str]:
    """Fragments of a document's headings, as GitHub makes them; a repeated heading counts up."""
    found: set[str] = set()
    for line in prose(text):
        if heading := re.match(r"#{1,6}\s+(.*?)\s*#*$", line):
            slug = base = re.sub(r"[^\w\- ]", "", heading[1].lower()).replace(" ", "-")
            count = 0
            while slug in found:
                count += 1
                slug = f"{base}-{count}"
            found.add(slug)
    return found


def dead_links(root: Path, files: list[Path]) -> list[str]:
    """`FILE: TARGET` for each relative link of a document to a file or heading that is not there."""
    dead = []
    for path in documents(files):
        text = (root / path).read_text(encoding="utf-8")
        plain = re.sub(r"`[^`]*`", "", "\n".join(prose(text)))
        targets = re.findall(r"\]\(([^()\s]+)[^()]*\)|^\[[^\]]+\]:\s*(\S+)", plain, re.MULTILINE)
        for target in (inline or reference for inline, reference in targets):
            if re.match(r"[a-z][a-z0-9+.-]*:", target):
                continue
            name, _, fragment = target.partition("#")
            file = root / path.parent / name if name else root / path
            if not file.exists() or (fragment and fragment not in anchors(file.read_text(encoding="utf-8"))):
                dead.append(f"{path}: {target}")
    return dead


def test_lines_end_at_120_columns():
    files = tracked(ROOT)
    assert {"README.md", "trainer", "configs", "launch"} <= {path.parts[0] for path in filter(has_limit, files)}
    assert (found := long_lines(ROOT, files)) == [], "\n".join(["longer than 120 columns:", *found])


def test_links_of_documents_lead_somewhere():
    files = tracked(ROOT)
    assert Path("docs/design.md") in documents(files)
    assert dead_links(ROOT, files) == []


def test_a_folder_without_git_is_walked_and_what_is_wrong_in_it_is_found(tmp_path):
    pages = {
        "README.md": "[a](docs/a.md) [b](docs/b.md) `[c](c.md)` [d](https://example.org/d.md) [e](docs/a.md#two-words)",
        "docs/a.md": "# A\n## Two words!\n## Two words!\n[f](#two-words-1) [g](#a) [h](../README.md)\n"
        "[i](#two-words-2) [j][k]\n\n[k]: gone.md\n\n    [code](code.md)\n\n"
        "```\n# Fenced\n[code](code.md)\n```\n[l](#fenced)\n",
        "trainer/x.py": f"# {'é' * 118}\n# {'x' * 119}\n",
        "configs/x.yaml": f"# {'x' * 118}\n# {'x' * 120}\n",
        "launch/slurm/x.sbatch": f"{'x' * 121}\n",
        "requirements.lock": f"{'x' * 200}\n",
        ".venv/lib/x.py": f"# {'x' * 200}\n",
        "data/x.py": f"# {'x' * 200}\n",
    }
    for name, text in pages.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    files = tracked(tmp_path)
    assert long_lines(tmp_path, files) == [
        "configs/x.yaml:2: 122 columns",
        "launch/slurm/x.sbatch:1: 121 columns",
        "trainer/x.py:2: 121 columns",
    ]
    assert dead_links(tmp_path, files) == [
        "README.md: docs/b.md",
        "docs/a.md: #two-words-2",
        "docs/a.md: gone.md",
        "docs/a.md: #fenced",
    ]
