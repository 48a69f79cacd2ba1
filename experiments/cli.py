"""What the commands share: parsing with help for a wrong name, and errors as one line with an exit code."""

import logging
import sys
from collections.abc import Callable
from typing import Any

import tyro

from attention.method import METHODS, UnsupportedError
from attention.registry import unknown
from experiments.log import NonFiniteError
from experiments.runtime import Interrupted

METHOD_PREFIX = "attention:"


def parse(function: Callable[..., Any], arguments: list[str] | None, prog: str, **options: Any) -> Any:
    """Calls `function` with its parameters from the command line; options may stand before or after a method.

    Raises:
        ValueError: the method is unknown; the message gives the nearest one.
        SystemExit: with code 2 for any other wrong option, after printing the nearest ones.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for argument in arguments:
        name = argument.removeprefix(METHOD_PREFIX)
        if argument.startswith(METHOD_PREFIX) and name not in METHODS:
            raise ValueError(unknown("method", name, METHODS))
    return tyro.cli(function, args=arguments, prog=prog, config=(tyro.conf.CascadeSubcommandArgs,), **options)


def exit_code(command: Callable[[], None]) -> int:
    """Runs a command and says on standard error what went wrong.

    Returns:
        0 if it finished; 1 if a number stopped being finite or the system refused (a full disk); 2 for a wrong
        option or input; 128 + the signal's number if it was asked to stop: 130 for SIGINT, 143 for SIGTERM.
    """
    # Orbax logs the tracebacks of its threads; what they raise arrives here, too, and is said in one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        command()
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except NonFiniteError as error:
        print(f"stopped: {error}; the last checkpoint is from before it", file=sys.stderr)
        return 1
    except (ValueError, FileNotFoundError, UnsupportedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0
