"""The command ``fewstep``, also ``python -m fewstep.eval``.

The command line needs the ``[eval]`` extra, which the library itself does not. This module imports nothing of
it before ``main`` runs, so that a missing package is one line instead of a traceback.
"""

from __future__ import annotations

import sys

MISSING_EXTRA = 2
"""Exit status when a package of the extra is not installed: the one of a wrong command line."""


def main() -> int | str | None:
    """Run the command line on ``sys.argv``.

    Returns what ``sys.exit`` is to be given: the command line's own answer or, when a package of the extra is
    missing, 2 after one line on standard error that names it and says how to install the extra.
    """
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package == (__package__ or "").partition(".")[0]:
            raise  # a module of our own is missing: a broken installation, not a missing extra
        hint = 'pip install "fewstep[eval]"'
        print(
            f"fewstep: the command line needs the package {package}. Install it with: {hint}", file=sys.stderr
        )
        return MISSING_EXTRA
    return run()


if __name__ == "__main__":
    sys.exit(main())
