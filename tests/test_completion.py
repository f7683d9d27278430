"""Completion in a real shell."""

import shutil
import subprocess
import sys

import pytest

PRINT = [sys.executable, "-m", "rfmedsam2_jax", "--print-completion"]


def completed(words: list[str], folder) -> list[str]:
  """What bash offers for the last word."""
  line = " ".join(f"'{word}'" for word in words)
  code = f"""
source <({" ".join(PRINT)} bash)
COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_LINE="${{COMP_WORDS[*]}}"
function=$(complete -p rfmedsam2 | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$function rfmedsam2 "${{COMP_WORDS[-1]}}" ""
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
  done = subprocess.run(["bash", "-c", code], cwd=folder, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout.split()


def test_bash_completes_commands_options_choices_and_files(tmp_path):
  (tmp_path / "scan.nii.gz").touch()
  assert completed(["rfmedsam2", "tra"], tmp_path) == ["train", "track"]
  assert completed(["rfmedsam2", "predict", "--save"], tmp_path) == ["--save-stages"]
  assert completed(["rfmedsam2", "predict", "--format", "n"], tmp_path) == ["nifti", "nrrd"]
  assert completed(["rfmedsam2", "track", "sc"], tmp_path) == ["scan.nii.gz"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_theirs(shell, tmp_path):
  done = subprocess.run([*PRINT, shell], capture_output=True, text=True, check=True)
  assert "save-stages" in done.stdout and "rfmedsam2" in done.stdout
  if shutil.which(shell):
    (tmp_path / "script").write_text(done.stdout)
    subprocess.run([shell, "-n", tmp_path / "script"], check=True)
