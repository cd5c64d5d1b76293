"""Process that runs one program with its tests, started by `code_tests.py` as a file.

It reads a JSON object from the standard input: `program`; `tests`, a list of Python code, or
`input`, the standard input of the program; `memory` and `cpu_seconds`; and `key`, a secret that
marks its own lines, so that what the program prints cannot be mistaken for a result. It
never imports the project: what it runs must not find it.
"""

import json
import os
import runpy
import sys
import types

_NAME = "__main__"


def main() -> None:
    """Confine this process, run the program, and report on the standard output."""
    payload = json.loads(sys.stdin.buffer.read())
    confine = runpy.run_path(os.path.join(os.path.dirname(__file__), "confinement.py"))["confine"]
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    tests = payload.get("tests")
    if tests is None:
        memory = os.memfd_create("input")
        with open(os.dup(memory), "wb") as file:
            file.write(payload["input"].encode(errors="replace"))
        os.lseek(memory, 0, os.SEEK_SET)
        os.dup2(memory, 0)
    else:
        os.dup2(null, 0)
        os.dup2(null, 1)
    sys.stdin = os.fdopen(0, closefd=False)
    try:
        lacking = confine(payload["memory"], payload["cpu_seconds"])
    except OSError as error:
        os.write(report, f"{payload['key']} refused {error}\n".encode())
        return
    os.write(report, f"{payload['key']} begin {lacking}\n".encode())
    module = types.ModuleType(_NAME)
    sys.modules[_NAME] = module
    sys.argv = ["program.py"]
    source, key = payload.pop("program"), payload.pop("key")
    if tests is not None:
        module.__dict__["__name__"] = "program"  # the main part of a solution is not run
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
    except SystemExit:
        if tests is None:
            raise
        _report(report, key, "error SystemExit")
        return
    except BaseException as error:
        _report(report, key, f"error {type(error).__name__}: {error}")
        raise SystemExit(1) from None
    sys.stdout.flush()
    for number, test in enumerate(tests or ()):
        try:
            exec(compile(test, f"test_{number}.py", "exec"), module.__dict__)
        except BaseException as error:  # SystemExit, too, is a test that did not reach its end
            _report(report, key, f"error {type(error).__name__}: {error}")
        else:
            _report(report, key, f"passed {number}")


def _report(report: int, key: str, text: str) -> None:
    line = " ".join(text.split())[:300]
    os.write(report, f"{key} {line}\n".encode(errors="replace"))


if __name__ == "__main__":
    main()
