"""Measure, then show what was written; or only show it again."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from command import InputError, require_folder
from unfinished import forget


def measure_and_show(
    args: argparse.Namespace, command: str, measure: Callable[[], None], show: Callable[[], None]
) -> None:
    """Run `measure`, which writes files to args.out, unless args.redraw; then `show`, which draws from them alone.

    Args:
        args: the options of `matrices.add_options`.
        command: whose results are kept in `unfinished` until all has been shown.
        measure: its ValueErrors are of the input.
        show: what it raises for files of an earlier run says that they are damaged.

    Raises:
        InputError: if the folder cannot be written to, what is measured cannot be, or what is shown is damaged.
    """
    require_folder(args.out)
    if args.redraw:
        try:
            return show()
        except InputError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise InputError(f"what {command} left in {args.out} is damaged ({what}); measure again") from error
    try:
        measure()
    except ValueError as error:  # ours, and those of gradcond.curvature
        raise InputError(_told(error)) from error
    show()
    forget(args.out, command)


def _told(error: Exception) -> str:
    """Return what gradcond.curvature says, and what to do about it in the words of the command line."""
    return re.sub(r"(call )?model\.eval\(\)( first)?", "leave out --mode train", str(error))
