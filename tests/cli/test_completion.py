"""Tab completion in a shell, after ``spap --install-completion``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
_spap spap "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    words = [sys.executable, "-m", "spap_jax", "--install-completion", "--shell", "bash"]
    subprocess.run(words, check=True, capture_output=True, env=os.environ | {"HOME": str(home)})
    return home / ".local/share/bash-completion/completions/spap"


def test_data_complete_as_paths(script: Path):
    """The option takes names and addresses too, so its value is a string."""
    command = ["bash", "-c", SCRIPT, "-", script, "spap", "eval", "model", "--data", "examples/stories_e"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (run.stderr, run.stdout.strip()) == ("", "examples/stories_evaluation.txt")


def test_a_folder_that_completes_goes_on(script: Path):
    """bash appends a slash to a folder if it treats completions as file names, and a space otherwise."""
    assert "\ncomplete -o filenames -F _spap spap\n" in script.read_text("utf-8")
