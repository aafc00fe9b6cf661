"""What commands print, as wide as a terminal is: nothing is cut, and what can be copied stays in one piece."""

import re

import pytest

from mim3d import cli


@pytest.mark.parametrize("columns", [80, 120, 200])
@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_no_flag_is_broken_in_its_help(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns and "``" not in text
    flags = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    for name in cli.COMMANDS[command].signature(command).hints:
        assert f"--{name}" in flags or any(flag.startswith(f"--{name}.") for flag in flags)
    if command == "finetune":
        assert {"--task.augmentation.low_resolution_prob", "--task.augmentation.rotation_degrees"} <= set(flags)
        assert re.search(r"\n {4,}Probability of a loss of resolution", text) or columns > 120
