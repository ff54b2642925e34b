"""The command `ebbtide`, also as `python -m ebbtide`.

Where packages of the laboratory are missing, it says what there is and how to get it; `doctor`
needs none of them.
"""

from __future__ import annotations

import sys

__all__ = ["EXTRAS", "VERBS", "main"]

VERBS = (
    "compare",
    "claims",
    "sweep",
    "worker",
    "report",
    "explain",
    "convert",
    "inspect",
    "bench",
    "doctor",
)

# Which extra of the distribution brings a package that a verb may miss.
EXTRAS = {
    "jinja2": "lab",
    "matplotlib": "lab",
    "optuna": "lab",
    "psycopg": "postgres",
    "rich": "lab",
    "sklearn": "lab",
    "typer": "lab",
    "torch": "torch",
}


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: Always, with the status of the verb; 2 if it lacks a package.
    """
    try:
        from ebbtide.cli import main as run

        run()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        _explain(package, sys.argv[1:])


def _explain(package: str, arguments: list[str]) -> None:
    remedy = f"pip install 'ebbtide[{EXTRAS[package]}]'"
    if arguments == ["doctor"]:  # what a bare installation runs is asked there most
        _print_facts()
        return
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"Usage: ebbtide VERB ...\n\nVerbs: {', '.join(VERBS)}\n\nThey need more: {remedy}")
        return
    print(f"ebbtide: {package} is not installed: {remedy}", file=sys.stderr)
    raise SystemExit(2)


def _print_facts() -> None:
    from ebbtide.lab.doctor import facts

    for name, value in facts().items():
        print(f"{name:<23}{value}")


if __name__ == "__main__":
    main()
