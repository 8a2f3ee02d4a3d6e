"""Stand-ins on the PATH that write down how they were called."""

import os

import pytest


@pytest.fixture
def stubs(tmp_path):
    """Makes stand-ins of programs; gives their PATH, and their calls as lists of arguments."""
    folder, record = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    record.touch()

    def make(**bodies):
        for name, body in bodies.items():
            # A line in one write: the stand-ins of a pipeline run side by side.
            call = f'echo "$(printf \'%q \' {name} "$@")" >>{record}'
            text = f"#!/bin/bash\n{call}\n{body}\n"
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        return {"PATH": f"{folder}:{os.environ['PATH']}", "RETRY_SECONDS": "0", "HERE": str(folder)}

    return make, lambda: [line for line in record.read_text().splitlines() if line]
