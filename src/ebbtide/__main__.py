"""The command `ebbtide`, also as `python -m ebbtide`.

Works in an installation without the `lab` extra as far as saying what there is and how to get it.
"""

from __future__ import annotations

import sys

__all__ = ["main"]

VERBS = ("compare", "doctor")

_HELP = f"""\
Usage: ebbtide VERB ...

Verbs: {", ".join(VERBS)}

The verbs need the laboratory's packages: pip install 'ebbtide[lab]'"""


def main() -> None:
    """Run the command line, or say what it needs.

    Raises:
        SystemExit: Status 2 if a verb is asked for without the `lab` extra.
    """
    try:
        from ebbtide.cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("rich", "typer"):
            raise
        _explain(sys.argv[1:], error.name)
    else:
        run()


def _explain(arguments: list[str], missing: str) -> None:
    if not arguments or arguments[0] in ("--help", "-h"):
        print(_HELP)
        return
    print(f"ebbtide: {missing} is not installed: pip install 'ebbtide[lab]'", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
