"""Export: from the cells of a manuscript to modules that read as if a person had written them."""

import ast
import builtins
import graphlib
import symtable
import sys
import textwrap
from dataclasses import dataclass, field

from book.manuscript import Book, BookError, Cell, Chapter, parse, read_cells

STANDARD = {*sys.stdlib_module_names, "tomllib"}
KNOWN = {*dir(builtins), "__file__", "__name__", "__doc__", "__package__", "__spec__", "__path__"}
# Calls that no constant needs: they read, write, print, compute or change a global state.
WORK = """
    print open input exec eval __import__ read_text read_bytes write_text write_bytes mkdir
    unlink load save train cuda run Popen manual_seed seed system urlopen basicConfig
"""
Imports = (ast.Import, ast.ImportFrom)
Functions = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Import:
    """One imported name: `import module [as name]` or `from module import member [as name]`."""

    module: str
    member: str = ""
    name: str = ""
    keep: bool = True
    where: str = ""

    @property
    def bound(self) -> str:
        return self.name or self.member or self.module.split(".")[0]


@dataclass
class Module:
    """What one module gets from its chapter, in the order of the manuscript."""

    name: str
    imports: list[Import] = field(default_factory=list)
    chunks: list[str] = field(default_factory=list)
    main: list[str] = field(default_factory=list)
    defined: dict[str, str] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)


def export(book: Book, numbers: list[str], strict: bool = False) -> None:
    """Write the package files that changed; a broken chapter stops only its own modules."""
    files, problems = package_files(book, book.select(numbers))
    write_files(book, files)
    for note in [p for p in problems if p.endswith("manuscript is missing") and not strict]:
        print(f"note: {note}")
        problems.remove(note)
    if problems:
        raise BookError("\n".join(problems))


def write_files(book: Book, files: dict[str, str]) -> None:
    """Write the files that changed, with the same line ends everywhere."""
    for name, text in files.items():
        path = book.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != text.encode("utf-8"):
            path.write_bytes(text.encode("utf-8"))
            print(f"wrote {name}")


def package_files(book: Book, chapters: list[Chapter]) -> tuple[dict[str, str], list[str]]:
    """({path below the root: text}, problems) of the package files of these chapters."""
    files, problems = {"nanochat/__init__.py": render_init(book)}, []
    for chapter in chapters:
        if not book.path(chapter).is_file():
            problems.append(f"chapters/{chapter.name}.py: the manuscript is missing")
            continue
        try:
            for module in Reader(book, chapter).read():
                files[f"nanochat/{module.name}.py"] = render(chapter, module)
        except BookError as error:
            problems += str(error).splitlines()
    return files, problems


class Reader:
    """Reads one chapter into modules and collects every reason to refuse it."""

    def __init__(self, book: Book, chapter: Chapter):
        self.book, self.chapter, self.name = book, chapter, f"{chapter.name}.py"
        self.modules = {name: Module(name) for name in chapter.modules}
        self.problems: list[str] = []
        self.hints: dict[str, int] = {}  # names that chapter-only cells import

    def read(self) -> list[Module]:
        """The modules of the chapter, or a BookError with a sentence for every refusal."""
        default = None
        for cell in read_cells(self.book.path(self.chapter)):
            if cell.kind != "code":
                continue
            tree, where = parse(cell, self.name), f"{self.name}:{cell.line}"
            if default and "default_exp" in cell.directives:
                self.problems.append(f"{where}: a second default_exp; a chapter has one")
            default = cell.directives.get("default_exp", default)
            if "exercise" in cell.directives:
                self.problems.append(f"{where}: `#| exercise` belongs in exercises/{self.name}")
            target = None
            if "export" in cell.directives or "default_exp" in cell.directives:
                target = cell.directives.get("export") or default
                if target not in self.modules:
                    names = f"book.toml gives this chapter {', '.join(self.modules) or 'no module'}"
                    self.problems.append(f"{where}: no module {target or 'by default'!r}; {names}")
                    continue
            self.check_imports(cell, tree, target if "export" in cell.directives else None)
            if "export" in cell.directives:
                self.read_cell(self.modules[target], cell, tree)
            else:
                imported = [i for node in tree.body for i in imports_of(node)]
                self.hints.update({i.bound: cell.line for i in imported})
        self.resolve()
        if self.problems:
            raise BookError("\n".join(self.problems))
        return list(self.modules.values())

    def check_imports(self, cell: Cell, tree: ast.Module, target: str | None) -> None:
        """Refuse imports from a later chapter. `target` is the module that the cell goes to."""
        order = self.book.chapters.index
        for node in (n for n in ast.walk(tree) if isinstance(n, Imports)):
            where = f"{self.name}:{cell.line + node.lineno - 1}"
            names = [i.module for i in imports_of(node)]
            if getattr(node, "module", "") == "nanochat":
                names = [f"nanochat.{a.name}" for a in node.names if a.name != "__version__"]
            for name in {n.split(".")[1] for n in names if n.startswith("nanochat.")}:
                owner = self.book.chapter_of(name)
                if owner is None:
                    self.problems.append(f"{where}: no chapter exports nanochat.{name}")
                elif name == target:
                    self.problems.append(f"{where}: nanochat.{name} would import itself")
                elif order(owner) > order(self.chapter) and (target or not self.chapter.preview):
                    reason = f"nanochat.{name} belongs to the later chapter {owner.number}"
                    self.problems.append(f"{where}: {reason}; import only what comes before")

    def read_cell(self, module: Module, cell: Cell, tree: ast.Module) -> None:
        """Sort the statements of an exported cell into imports, definitions and the main block."""
        lines, start = cell.source.split("\n"), len(cell.directives)
        for node in tree.body:
            first = min(d.lineno for d in [node, *getattr(node, "decorator_list", [])]) - 1
            where = f"{self.name}:{cell.line + first}"
            reason = work_in(node, module)
            if reason:
                self.problems.append(f"{where}: {reason}; an exported cell only defines things")
            for name in bound_names(node):
                if name in module.defined:
                    old = module.defined[name]
                    self.problems.append(f"{where}: {name!r} is exported twice ({old})")
                module.defined.setdefault(name, where)
            if isinstance(node, (*Imports, ast.If)):
                add_chunk(module.chunks, lines[start:first])
                start = node.end_lineno
            if isinstance(node, ast.If):
                body = lines[node.body[0].lineno - 1 : node.end_lineno]
                add_chunk(module.main, ['if __name__ == "__main__":', *body])
            keep = "noqa" in lines[node.end_lineno - 1]
            module.imports += imports_of(node, keep, where)
        add_chunk(module.chunks, lines[start:])
        for name, row in global_names(cell.source, tree).items():
            module.used.setdefault(name, f"{self.name}:{cell.line + row - 1}")

    def resolve(self) -> None:
        """Give each module the imports that it uses; refuse names that come from nowhere."""
        homes: dict[str, str] = {}
        for module in self.modules.values():
            if not module.chunks and not module.main and not self.problems:
                reason = f"nothing is exported to nanochat.{module.name}"
                self.problems.append(f"{self.name}:1: {reason}")
            for name, where in module.defined.items():
                if homes.setdefault(name, module.name) != module.name:
                    reason = f"{name!r} is exported twice (also to {homes[name]})"
                    self.problems.append(f"{where}: {reason}")
        for module in self.modules.values():
            self.resolve_names(module, homes)
        needs = {
            name: {i.module[9:] for i in module.imports if i.module[9:] in self.modules}
            for name, module in self.modules.items()
        }
        try:
            graphlib.TopologicalSorter(needs).prepare()
        except graphlib.CycleError as error:
            circle = " and ".join(f"nanochat.{name}" for name in sorted(set(error.args[1])))
            self.problems.append(f"{self.name}:1: {circle} import each other")

    def resolve_names(self, module: Module, homes: dict[str, str]) -> None:
        sources: dict[str, tuple] = {}
        for item in module.imports:
            plain = not item.member and not item.name
            source = (item.bound if plain else item.module, item.member)
            if sources.setdefault(item.bound, source) != source or item.bound in module.defined:
                self.problems.append(f"{item.where}: {item.bound!r} already means something else")
        for name in [n for n in module.used if n not in {*module.defined, *sources, *KNOWN}]:
            if name in homes:
                module.imports.append(Import(f"nanochat.{homes[name]}", name))
            else:
                hint = f"; line {self.hints.get(name)} imports it without `#| export`"
                reason = f"the name {name!r} is neither defined, imported nor exported"
                self.problems.append(
                    f"{module.used[name]}: {reason}{hint if name in self.hints else ''}"
                )
        module.imports = [i for i in module.imports if i.keep or i.bound in module.used]


def add_chunk(chunks: list[str], lines: list[str]) -> None:
    if any(line.strip() and not line.startswith("#") for line in lines):
        chunks.append("\n".join(lines).strip("\n"))


def imports_of(node: ast.AST, keep: bool = True, where: str = "") -> list[Import]:
    if isinstance(node, ast.Import):
        return [Import(a.name, "", a.asname or "", keep, where) for a in node.names]
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        keep = keep or module == "__future__"
        return [Import(module, a.name, a.asname or "", keep, where) for a in node.names]
    return []


def work_in(node: ast.AST, module: Module) -> str | None:
    """Why a top-level statement counts as work at import time, or None."""
    if isinstance(node, Imports):
        if getattr(node, "level", 0):
            return "a relative import does not work in a notebook"
        return "`import *` hides names" if node.names[0].name == "*" else None
    if isinstance(node, (*Functions, ast.Pass)):
        return None
    if isinstance(node, ast.ClassDef):
        body = [n for n in node.body if not isinstance(getattr(n, "value", 0), ast.Constant)]
        return next(filter(None, (work_in(n, module) for n in body)), None)
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            for part in getattr(target, "elts", [target]):
                owner = getattr(getattr(part, "value", None), "id", None)
                patch = isinstance(part, ast.Attribute) and owner in module.defined
                if not isinstance(part, ast.Name) and not patch:
                    return f"`{ast.unparse(target)} = ...` is not the definition of a constant"
        call = working_call(node.value)
        return f"`{call}(...)` is work at import time" if call else None
    if isinstance(node, ast.If):
        tests = getattr(node.test, "values", [node.test])
        main = any(ast.unparse(test) == "__name__ == '__main__'" for test in tests)
        return None if main and not node.orelse else "an `if` that runs at import time"
    if isinstance(node, ast.Try) and all(isinstance(n, Imports) for n in node.body):
        handlers = [n for h in node.handlers for n in h.body]
        return next(filter(None, (work_in(n, module) for n in handlers)), None)
    if isinstance(getattr(node, "value", None), ast.Call):
        return f"the call `{ast.unparse(node.value.func)}(...)` is work at import time"
    return f"a `{type(node).__name__.lower()}` statement is work at import time"


def working_call(node: ast.AST | None) -> str | None:
    if node is None or isinstance(node, ast.Lambda):
        return None
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
        if name in WORK.split():
            return ast.unparse(node.func)
    return next(filter(None, map(working_call, ast.iter_child_nodes(node))), None)


def bound_names(node: ast.AST) -> list[str]:
    """Names that a top-level statement binds, except by a plain import."""
    if isinstance(node, (*Functions, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [n for target in targets for n in ast.walk(target)]
        return [
            n.id for n in names if isinstance(getattr(n, "ctx", 0), ast.Store) and hasattr(n, "id")
        ]
    if isinstance(node, ast.Try):
        inner = [*node.body, *(n for h in node.handlers for n in h.body)]
        names = [i.bound for n in inner for i in imports_of(n)]
        return list(dict.fromkeys(names + [name for n in inner for name in bound_names(n)]))
    return []


def global_names(source: str, tree: ast.Module) -> dict[str, int]:
    """Names that a cell looks up at module level, with the row of their first use."""
    # With the future import, symtable would leave annotations out.
    source = source.replace("from __future__ import annotations", "")
    module = symtable.symtable(source, "cell", "exec")
    looked_up = {symbol.get_name() for symbol in module.get_symbols() if symbol.is_referenced()}
    names, tables = looked_up - comprehension_names(tree), module.get_children()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        names.update(symbol.get_name() for symbol in table.get_symbols() if symbol.is_global())
    rows: dict[str, int] = {}
    for node in ast.walk(tree):
        quoted = [
            q for p in ("annotation", "returns") for q in quoted_names(getattr(node, p, None))
        ]
        names.update(quoted)
        for name in [*quoted, *([node.id] if isinstance(node, ast.Name) else [])]:
            rows[name] = min(node.lineno, rows.get(name, node.lineno))
    return {name: rows.get(name, 1) for name in sorted(names)}


def comprehension_names(tree: ast.Module) -> set[str]:
    """Names that only comprehensions use and bind; from Python 3.12 on symtable gives them to the
    scope around."""
    bound, outside, nodes = set(), set(), [tree]
    for node in ast.walk(tree):
        if isinstance(node, ast.comprehension):
            bound.update(n.id for n in ast.walk(node.target) if isinstance(n, ast.Name))
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Name):
            outside.add(node.id)
        inside = isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp))
        nodes += [node.generators[0].iter] if inside else ast.iter_child_nodes(node)
    return bound - outside


def quoted_names(annotation: ast.AST | None) -> list[str]:
    """Names in the quoted parts of an annotation; Literal["..."] quotes no names."""
    if annotation is None or "Literal" in ast.unparse(annotation):
        return []
    texts = [n.value for n in ast.walk(annotation) if isinstance(getattr(n, "value", 0), str)]
    trees = [ast.parse(text.strip(), mode="eval") for text in texts]
    return [n.id for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Name)]


def render(chapter: Chapter, module: Module) -> str:
    """The text of a module."""
    origin = f"Exported from chapters/{chapter.name}.py (chapter {chapter.number}, {chapter.title})"
    note = textwrap.fill(f"{origin}; edit there, not here.", 99, break_on_hyphens=False)
    public = sorted(n for n in module.defined if not n.startswith("_"))
    head = [f'"""{chapter.modules[module.name].rstrip(".")}.\n\n{note}\n"""']
    head += render_imports(module.imports)
    head.append(wrapped("__all__ = ", [f'"{name}"' for name in public], "[]"))
    return "\n\n\n".join(["\n\n".join(head), *module.chunks, *module.main]) + "\n"


def wrapped(start: str, items: list[str], brackets: str) -> str:
    """One line, or one item a line when that line would be longer than 100 characters."""
    line = start + (brackets[:1] + ", ".join(items) + brackets[1:]).strip("()")
    rows = "".join(f"    {item},\n" for item in items)
    return line if len(line) <= 100 else f"{start}{brackets[0]}\n{rows}{brackets[1]}"


def render_imports(imports: list[Import]) -> list[str]:
    """Merged and sorted blocks: future, standard library, third party, nanochat."""
    blocks: list[list[str]] = [[], [], [], []]

    def add(module: str, line: str) -> None:
        top = module.split(".")[0]
        section = {"__future__": 0, "nanochat": 3}.get(top, 1 if top in STANDARD else 2)
        blocks[section].append(line)

    def order(pair: tuple[str, str]) -> tuple:
        constant, capital = pair[0].isupper() and len(pair[0]) > 1, pair[0][:1].isupper()
        return 0 if constant else 1 if capital else 2, pair[0].lower(), pair[1]

    for module, name in sorted({(i.module, i.name) for i in imports if not i.member}):
        add(module, f"import {module}" + (f" as {name}" if name else ""))
    for module in sorted({i.module for i in imports if i.member}):
        members = {(i.member, i.name) for i in imports if i.member and i.module == module}
        names = [m + (f" as {n}" if n else "") for m, n in sorted(members, key=order)]
        add(module, wrapped(f"from {module} import ", names, "()"))
    return ["\n".join(block) for block in blocks if block]


def render_init(book: Book) -> str:
    """nanochat/__init__.py: the map from modules to chapters; it imports nothing."""
    rows = [(m, c) for c in book.chapters for m in c.modules]
    width = max(len(m) for m, _ in rows)
    table = "\n".join(f"{m:<{width}}  chapters/{c.name}.py  {c.title}" for m, c in rows)
    first = f"A small ChatGPT, built in the open: the package of {book.title}."
    note = "Every module is exported from a chapter and is edited there, not here:"
    return f'"""{first}\n\n{note}\n\n{table}\n"""\n\n__version__ = "{book.version}"\n'
