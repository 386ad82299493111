"""`trainonce`: finds the command's module, runs it, and turns errors into a line and a hint."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from typing import Any, NoReturn

import trainonce
from trainonce.errors import TrainOnceError

# Command -> (module, one line of help). A module offers `add_arguments(parser)` and
# `run(args) -> int`; it is imported only when its command is called.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("trainonce.cli.run", "train with hot spares; takes torchrun's options"),
    "ps": ("trainonce.cli.ps", "list the running jobs"),
    "migrate": ("trainonce.cli.migrate", "move a rank to a spare while the job trains"),
    "drain": (
        "trainonce.cli.drain",
        "empty a device while jobs train on it; a host by a checkpoint",
    ),
    "report": ("trainonce.cli.report", "incidents, guarantee, time, money and energy of jobs"),
    "fleet": ("trainonce.cli.fleet", "health, links and clocks of hosts; an agent and a collector"),
    "bench": ("trainonce.cli.bench", "what levers save at equal quality, measured here"),
    "simulate": ("trainonce.cli.simulate", "what failures cost a cluster, in simulated time"),
    "graph": ("trainonce.cli.graph", "what the store holds, why nodes hit or miss, upkeep"),
}

_CLOSE = 0.75
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class _Parser(argparse.ArgumentParser):
    """Puts a usage error the way every other error is put: one line and a hint."""

    def error(self, message: str) -> NoReturn:
        """Print `message`, point to the help, and exit."""
        self._refuse(message, f"see `{self.prog} --help`")

    def parse_known_args(  # type: ignore[override]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """Parse; what is left over is refused here, where the help is that of the command."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            hint = f"see `{self.prog} --help`"
            names = [name[2:] for name in self._option_string_actions if name.startswith("--")]
            name = unknown[0].partition("=")[0].lstrip("-")
            if near := difflib.get_close_matches(name, names, 1, _CLOSE):
                hint = f"did you mean --{near[0]}? Else {hint}"
            self._refuse(f"unrecognized arguments: {' '.join(unknown)}", hint)
        return found, []

    def _refuse(self, message: str, hint: str) -> NoReturn:
        print(f"error: {message}\n\nhint: {hint}", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="trainonce",
        description="You Only Compute Once: training that survives failures and repeats no work.",
    )
    parser.add_argument("--version", action="version", version=trainonce.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary)
        if name == command:
            importlib.import_module(module).add_arguments(sub)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        parser = _parser(next((word for word in argv if word in COMMANDS), None))
        args = parser.parse_args(argv)
        if args.command is None:
            parser.print_help(sys.stderr)
            return EXIT_USAGE
        return importlib.import_module(COMMANDS[args.command][0]).run(args)
    except TrainOnceError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"\nhint: {error.hint}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left early (`trainonce report | head`): that is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
