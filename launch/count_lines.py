"""Counts lines of code, without blank lines, comments and docstrings, against the limits.

    python launch/count_lines.py            # totals, and what breaks a limit
    python launch/count_lines.py --files    # also each file, the largest first

Counts the files that git tracks. The exit code is 1 if a limit is broken.
"""

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"variator_jax": 10_500, "tests": 9_000}
MEDIAN_FILE, LARGEST_FILE, LONGEST_FUNCTION = 180, 400, 60
SHAPES_PER_1000 = 8.0  # comments such as `# [batch, length, embed]`, per 1,000 lines of code
SHAPE_FOLDERS = ("plugin", "backbones", "train")

_NOT_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)
_SHAPE = re.compile(r"# *[^#\n]*\[[^\]\n]+\]")


def tracked(folder: str) -> list[Path]:
    """The Python files of a folder that git tracks."""
    names = subprocess.run(
        ["git", "ls-files", "--", folder], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [ROOT / name for name in names if name.endswith(".py") and (ROOT / name).is_file()]


def code_lines(source: str) -> int:
    """The lines with a token of code that is not part of a docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for docstring in _docstrings(ast.parse(source)):
        lines.difference_update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return len(lines)


def _docstrings(tree: ast.Module) -> Iterator[ast.Expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                if isinstance(first.value.value, str):
                    yield first


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Name and length of each function, docstring and comments included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def main() -> int:
    """Prints the report; returns 1 if a limit is broken."""
    broken = []
    paths = [path for folder in LIMITS for path in tracked(folder)]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    code = {path: code_lines(text) for path, text in texts.items()}
    for folder, limit in LIMITS.items():
        sizes = [lines for path, lines in code.items() if (ROOT / folder) in path.parents]
        print(f"{folder:<13}{sum(sizes):>7,} lines of code in {len(sizes)} files, limit {limit:,}")
        if sum(sizes) > limit:
            broken.append(f"{folder}: {sum(sizes):,} lines of code, limit {limit:,}")
    package = {p: t for p, t in texts.items() if (ROOT / "variator_jax") in p.parents}
    lengths = {path: text.count("\n") for path, text in package.items()}
    median, longest = statistics.median(lengths.values()), max(lengths, key=lengths.__getitem__)
    print(f"median file  {median:>7,.0f} lines, limit {MEDIAN_FILE}")
    print(f"longest file {lengths[longest]:>7,} lines, {longest.relative_to(ROOT)}")
    if median > MEDIAN_FILE:
        broken.append(f"the median file has {median:.0f} lines, limit {MEDIAN_FILE}")
    for path, text in package.items():
        name = path.relative_to(ROOT)
        if lengths[path] > LARGEST_FILE:
            broken.append(f"{name}: {lengths[path]} lines, limit {LARGEST_FILE}")
        broken += [
            f"{name}: {function} has {length} lines, limit {LONGEST_FUNCTION}"
            for function, length in functions(text)
            if length > LONGEST_FUNCTION
        ]
    core = [p for p in package if p.relative_to(ROOT).parts[1] in SHAPE_FOLDERS]
    shapes = sum(bool(_SHAPE.search(line)) for p in core for line in texts[p].splitlines())
    per_1000 = 1000 * shapes / sum(texts[p].count("\n") for p in core)
    print(f"shape comments {per_1000:>5.1f} per 1,000 lines of {', '.join(SHAPE_FOLDERS)}")
    if per_1000 < SHAPES_PER_1000:
        broken.append(f"shape comments: {per_1000:.1f} per 1,000 lines, at least {SHAPES_PER_1000}")
    if "--files" in sys.argv[1:]:
        for path in sorted(code, key=lambda path: -code[path]):
            print(f"{code[path]:>6} {path.relative_to(ROOT)}")
    for line in broken:
        print(f"over the limit: {line}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
