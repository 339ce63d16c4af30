"""book.toml and the manuscripts: chapters, cells and directives (needs no jupytext)."""

import ast
import difflib
import io
import json
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

DIRECTIVES = {"default_exp": r"\w+", "export": r"\w*", "test": ""}
# In sheets of exercises: the task, what it may use, and what stands behind it.
DIRECTIVES |= {"exercise": r"\S.*", "given": "", "checks": r"\S+", "hints": r"\S+"}
DIRECTIVES |= {"wrong": r"\S+: \S.*", "right": r"\S+"}
TAGS = ("parameters", "hide-input", "gpu", "slow")
MARKER = re.compile(r"# %%(?: \[(markdown|raw)\])?((?: .*)?)")
MAGIC = "a magic or shell line is not plain Python; use a function of the standard library"


class BookError(Exception):
    """One or more sentences, a line each, that say what is wrong and where."""


@dataclass(frozen=True)
class Chapter:
    """One `[[chapter]]` table of book.toml."""

    name: str
    title: str
    builds: str
    modules: dict[str, str]
    seconds: float
    memory_mb: float
    parameters: dict = field(default_factory=dict)
    preview: bool = False

    @property
    def number(self) -> str:
        return self.name.split("_")[0]


@dataclass(frozen=True)
class Book:
    """The whole of book.toml and where it lies."""

    root: Path
    title: str
    version: str
    chapters: list[Chapter]

    def path(self, chapter: Chapter, suffix: str = ".py") -> Path:
        return self.root / "chapters" / (chapter.name + suffix)

    def chapter_of(self, module: str) -> Chapter | None:
        return next((c for c in self.chapters if module in c.modules), None)

    def select(self, names: list[str]) -> list[Chapter]:
        """Chapters by number ("01", "1"), name or module; all of them for an empty list."""
        chosen = []
        for name in names:
            keys = {name, name.zfill(2)}
            found = [c for c in self.chapters if keys & {c.number, c.name, *c.modules}]
            if not found:
                known = ", ".join(c.number for c in self.chapters)
                raise BookError(f"there is no chapter {name!r}; there are {known}")
            chosen += found
        return chosen or list(self.chapters)


@dataclass(frozen=True)
class Cell:
    """One cell; `line` is where `source` starts in the file, `directives` maps name to argument."""

    kind: str
    source: str
    line: int
    tags: tuple[str, ...] = ()
    directives: dict[str, str] = field(default_factory=dict)


def load_book(start: Path) -> Book:
    """Read the book.toml in `start` or in the nearest folder above it."""
    root = next((p for p in (start, *start.parents) if (p / "book.toml").is_file()), None)
    if root is None:
        raise BookError(f"no book.toml in {start} or above it; run this inside the book's folder")
    try:
        table = tomllib.loads((root / "book.toml").read_text(encoding="utf-8"))
        defaults = {"seconds": table["seconds"], "memory_mb": table["memory_mb"]}
        chapters = [Chapter(**{**defaults, **entry}) for entry in table["chapter"]]
        book = Book(root, table["title"], table["version"], chapters)
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise BookError(f"book.toml: cannot be read: {error}") from None
    modules = [module for c in chapters for module in c.modules]
    for module in {m for m in modules if modules.count(m) > 1}:
        raise BookError(f"book.toml: module {module!r} is declared by two chapters")
    return book


def read_cells(path: Path) -> list[Cell]:
    """Split a py:percent file into cells and read their directives; refuse what is misspelt."""
    lines, problems, cells = path.read_text(encoding="utf-8").splitlines(), [], []
    starts = [i for i, line in enumerate(lines) if MARKER.fullmatch(line)]
    for i, line in enumerate(lines, 1):
        if re.match(r"\s*#\s*%%+(\s|$)", line) and i - 1 not in starts:
            problems.append(f"{path.name}:{i}: write a cell marker as `# %%`, not `{line}`")
    head = "\n".join(lines[: starts[0] if starts else None])
    if re.sub(r"\A# ---\n.*?\n# ---$", "", head, flags=re.DOTALL | re.MULTILINE).strip():
        problems.append(f"{path.name}:1: there is text outside of any cell; start with `# %%`")
    for start, end in zip(starts, [*starts[1:], len(lines)]):
        kind, options = MARKER.fullmatch(lines[start]).groups()
        filled = [i for i in range(start + 1, end) if lines[i].strip()] or [start + 1]
        text = "\n".join(lines[filled[0] : filled[-1] + 1])
        place = (path.name, filled[0] + 1)
        tags = _tags(options, f"{path.name}:{start + 1}", problems)
        if kind:
            quoted = re.fullmatch(r'r?"""\n?(.*?)\n?"""', text, flags=re.DOTALL)
            text = quoted[1] if quoted else re.sub(r"(?m)^# ?", "", text)
            cells.append(Cell(kind, text, place[1], tags))
        else:
            cells.append(Cell("code", text, place[1], tags, _directives(text, *place, problems)))
    if problems:
        raise BookError("\n".join(problems))
    return cells


def _tags(options: str, where: str, problems: list[str]) -> tuple[str, ...]:
    match = re.fullmatch(r'(?: tags=(\[(?:"[^"]*"(?:, *)?)*\]))?\s*', options)
    if not match:
        problems.append(f'{where}: only tags=["..."] may follow a marker, not `{options.strip()}`')
    tags = json.loads((match and match[1]) or "[]")
    for tag in set(tags) - set(TAGS):
        problems.append(f"{where}: unknown tag {tag!r}; there are {', '.join(TAGS)}")
    return tuple(tags)


def comments(source: str) -> list[tuple[int, str]]:
    """(row, text) of the comments that start a line."""
    lines = source.split("\n")
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
        rows = [t.start[0] - 1 for t in tokens if t.type == tokenize.COMMENT]
    except (tokenize.TokenError, SyntaxError):
        rows = range(len(lines))
    return [(row, lines[row]) for row in rows if lines[row].startswith("#")]


def _directives(source: str, name: str, line: int, problems: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for row, text in comments(source):
        where, leading = f"{name}:{line + row}", row == len(found)
        strict = re.fullmatch(r"#\| (\w+) ?(.*)", text)
        loose = re.match(r"#\s*\|\s*([\w-]*)", text)
        bare = re.fullmatch(rf"#\s*({'|'.join(DIRECTIVES)})(\s+\w+)?", text)
        if strict and strict[1] in DIRECTIVES and leading:
            if strict[1] in found or not re.fullmatch(DIRECTIVES[strict[1]], strict[2]):
                problems.append(f"{where}: `{text}` has wrong arguments or comes twice")
            found[strict[1]] = strict[2]
        elif strict and strict[1] in DIRECTIVES:
            problems.append(f"{where}: `{text}` must stand on the first lines of its cell")
        elif (loose and (leading or loose[1] in DIRECTIVES)) or (bare and leading):
            near = difflib.get_close_matches((loose or bare)[1], DIRECTIVES, n=1) or ["export"]
            problems.append(f"{where}: misspelt directive `{text}`; did you mean `#| {near[0]}`?")
    if "export" in found and "test" in found:
        problems.append(f"{name}:{line}: a cell is either exported or a test, not both")
    return found


def parse(cell: Cell, name: str) -> ast.Module:
    """The cell's syntax tree; a magic or a syntax error is one sentence with its line."""
    for row, text in comments(cell.source) if cell.directives else []:
        if re.match(r"# ?[%!]\w", text):
            raise BookError(f"{name}:{cell.line + row}: `{text}`: {MAGIC}")
    try:
        return ast.parse(cell.source)
    except SyntaxError as error:
        row = (error.lineno or 1) - 1
        text = cell.source.split("\n")[min(row, cell.source.count("\n"))].strip()
        reason = MAGIC if text[:1] in ("%", "!") else f"this is not Python ({error.msg})"
        raise BookError(f"{name}:{cell.line + row}: `{text}`: {reason}") from None
