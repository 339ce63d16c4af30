"""The command line of the book: `python -m book VERB [NN ...]`."""

import argparse
import sys
from pathlib import Path

from book.manuscript import Book, BookError, load_book

VERBS = {
    "export": "manuscripts to the modules of the package",
    "print": "manuscripts to notebooks with outputs, sheets and tables",
    "check": "fail when a derived file is not what its source says",
    "run": "run chapters in fresh kernels; time, memory and failures",
    "work": "copy notebooks and sheets into work/ for a learner",
    "lab": "JupyterLab: manuscripts as notebooks (authors)",
    "grade": "grade a folder of submitted notebooks and archives of work/",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m book", description=__doc__)
    subparsers = parser.add_subparsers(dest="verb", required=True)
    verbs = {name: subparsers.add_parser(name, help=text) for name, text in VERBS.items()}
    for name in list(VERBS)[:-2]:
        verbs[name].add_argument("chapters", nargs="*", metavar="NN", help="numbers; default: all")
    verbs["export"].add_argument("--strict", action="store_true", help="no manuscript may miss")
    for verb in ("print", "run"):
        verbs[verb].add_argument("--record", action="store_true", help="write chapters/TIMES.json")
    verbs["print"].add_argument("--no-execute", action="store_true", help="only text and code")
    verbs["run"].add_argument("--strict", action="store_true", help="over budget is a failure")
    verbs["lab"].add_argument("--work", action="store_true", help="for learners, in work/")
    verbs["grade"].add_argument("folder", type=Path, help="NAME.ipynb, NAME.zip, NAME/ a student")
    verbs["grade"].add_argument("--out", type=Path, default=Path("grades"), help="default: grades")
    verbs["grade"].add_argument("--hidden", type=Path, help="a py:percent file of further checks")
    verbs["grade"].add_argument("--workers", type=int, default=2, help="default: 2 at a time")
    chosen, rest = parser.parse_known_args(arguments)
    if rest and chosen.verb != "lab":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        return act(load_book(Path.cwd()), chosen, rest)
    except Exception as error:
        common = sys.modules.get("nanochat.common")  # if loaded: `export` must do without it
        if not isinstance(error, (BookError, getattr(common, "UserError", BookError))):
            raise
        print(error, file=sys.stderr)
        return 1


def act(book: Book, chosen: argparse.Namespace, rest: list[str]) -> int:
    """Carry out one verb; only what it needs is imported."""
    if chosen.verb == "export":
        from book.contents import content_files
        from book.export import export, write_files

        write_files(book, content_files(book))
        export(book, chosen.chapters, chosen.strict)
    elif chosen.verb == "print":
        from book.printing import print_book

        print_book(book, chosen.chapters, not chosen.no_execute, chosen.record)
    elif chosen.verb == "check":
        from book.check import check

        problems = check(book, chosen.chapters)
        if problems:
            raise BookError("\n".join([*problems, f"{len(problems)} problems"]))
        print("every derived file is fresh")
    elif chosen.verb == "run":
        from book.running import run

        run(book, chosen.chapters, chosen.strict, chosen.record)
    elif chosen.verb == "grade":
        from book.grading import grade

        grades = grade(book, chosen.folder, chosen.out, chosen.hidden, chosen.workers)
        for name, one in grades.items():
            print(f"{one['score']:7.2f} of {one['points']}  {name}")
        print(f"wrote {chosen.out / 'grades.csv'}, grades.json and feedback/")
    else:
        from book.learning import lab, work

        if chosen.verb == "lab":
            return lab(book, chosen.work, rest)
        work(book, chosen.chapters)
    return 0


if __name__ == "__main__":
    sys.exit(main())
