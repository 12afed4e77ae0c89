"""`adakd compare`: what differs between evaluations of several models on the same prompts."""

from __future__ import annotations

from pathlib import Path

from . import CommandError, CommandParser

try:
    from ..evaluation.compare import Difference, compare
    from ..evaluation.evaluate import EvaluationError, read_results
    from ..evaluation.intervals import BOOTSTRAP
    from ..evaluation.tables import SHOWN, fixed, markdown
except ImportError as error:
    raise CommandError(
        f"a comparison needs the packages of an evaluation: pip install 'adakd-kernels[eval]' ({error})"
    ) from error

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Print a table of the differences of each further folder from the first one.

    Raises:
        CommandError: folders that hold no whole evaluation, or have no set or prompt in common.
    """
    parser = CommandParser(
        prog="adakd compare",
        allow_abbrev=False,
        description="Paired differences of each further evaluation from the first one, on the prompts that both have.",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="an --output_dir of 'adakd eval'")
    folders = parser.parse_args(argv).folders
    if len(folders) < 2:
        raise CommandError("a comparison needs two folders of 'adakd eval' at least, got one")
    try:
        results = [read_results(folder) for folder in folders]
        found = [compare(results[0], other) for other in results[1:]]
    except EvaluationError as error:
        raise CommandError(str(error)) from error
    names = _names(folders)
    rows = [
        _row(difference, names[number] if len(found) > 1 else "")
        for number, (differences, _) in enumerate(found, 1)
        for difference in differences
    ]
    if not rows:
        raise CommandError("the evaluations have no measure in common: evaluate both with the same teacher, or prompts")
    other = names[1] if len(found) == 1 else "the other"
    print(markdown(["set, measure", names[0], other, f"{other} − {names[0]}", "prompts"], rows))
    for number, (_, notes) in enumerate(found, 1):
        for note in notes:
            print(f"note: {names[0]} and {names[number]}: {note}" if len(found) > 1 else f"note: {note}")
    print(
        f"[{BOOTSTRAP['level']:.0%} interval of a bootstrap over the prompts that both have, {BOOTSTRAP['draws']} "
        "draws]; * where 0 is outside"
    )
    return 0


def _names(folders: list[str]) -> list[str]:
    """The last parts of the folders, as many as tell them apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts))):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return folders


def _row(found: Difference, other: str) -> list[str]:
    shown, difference = SHOWN[found.measure], found.difference
    digits = shown.digits
    change = fixed(difference.mean, digits, "+")
    if difference.low is not None and difference.high is not None:
        outside = difference.low > 0 or difference.high < 0
        change += f" [{fixed(difference.low, digits, '+')}, {fixed(difference.high, digits, '+')}]" + " *" * outside
    where = ", ".join(filter(None, (other, found.set, str(shown))))
    return [where, fixed(found.first, digits), fixed(found.second, digits), change, str(found.prompts)]
