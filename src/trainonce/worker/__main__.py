"""Runs a training script as the launcher does: `python -m trainonce.worker script.py args…`.

The script is `__main__`, with its own `sys.argv` and path, as under `python script.py`. What
is added: in a hot spare the rank is withheld from the environment, an exception is reported
to the launcher, and the end of the script waits until every rank is done.
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys
import traceback
import types

from trainonce import settings
from trainonce.worker import imports, output


def main() -> None:
    """Run the script named on the command line."""
    arguments = sys.argv[1:]
    imports.watch()
    output.outlive_full_disks(_tell)
    if os.environ.get(settings.SPARE.name) == "1":
        _withhold_rank()
    try:
        code = _run(arguments)
        if code == 0:
            _finish()
    except BaseException as error:
        traceback.print_exc()
        _report(error)
        code = 1
    _leave(code)


def _run(arguments: list[str]) -> int:
    """Run the script or module, and return its exit code."""
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            _run_script(arguments[0])
    except SystemExit as error:
        return _exit_code(error)
    return 0


def _run_script(path: str) -> None:
    sys.path[0] = os.path.dirname(os.path.abspath(path))
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec")
    # A module of its own in sys.modules, so that pickling and spawned workers find it.
    script = types.ModuleType("__main__")
    script.__file__ = path
    script.__builtins__ = __builtins__  # type: ignore[attr-defined]
    sys.modules["__main__"] = script
    exec(code, script.__dict__)


def _withhold_rank() -> None:
    """Let reads of RANK wait, also before the script has called `trainonce.init`."""
    from trainonce.worker.spare import withhold_rank

    def park(where: str) -> int:
        from trainonce.worker import session

        run = session.current()
        if run is None:
            # Too early to be promoted: nobody listens yet.
            raise KeyError("RANK: a hot spare has no rank before trainonce.init()")
        return run.rank

    withhold_rank(park)


def _finish() -> None:
    session = sys.modules.get("trainonce.worker.session")
    run = session.current() if session else None
    if run is not None:
        run.finish()


def _report(error: BaseException) -> None:
    session = sys.modules.get("trainonce.worker.session")
    run = session.current() if session else None
    if run is not None:
        run.report_failure(error)


def _tell(text: str) -> bool:
    session = sys.modules.get("trainonce.worker.session")
    run = session.current() if session else None
    link = run.link if run is not None else None
    if link is not None:
        from trainonce.wire.messages import Note

        link.send(Note(key="output", level="warning", text=text))
    return link is not None


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code
    sys.stderr.write(f"{error.code}\n")
    return 1


def _leave(code: int) -> None:
    """Run exit handlers, then leave without destructors that could wait for lost peers."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
