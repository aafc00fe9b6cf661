"""The command line: a name leads to one function; its signature and docstring are the flags and the help."""

import getpass
import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mim3d import __version__
from mim3d.cli.streams import lasting_streams
from mim3d.core.errors import BROKEN_PIPE, INTERRUPTED, REFUSED, ConfigError, Mim3dError, take_exit_code
from mim3d.core.left_out import take_noted
from mim3d.core.names import printable
from mim3d.core.own_code import found_in_working_folder, own_code_in, working_folder_left_out
from mim3d.core.progress import fitted, say
from mim3d.core.signals import STOP_SIGNALS, StoppedBySignal, ending_in_order, exit_code_of, ignore_signals
from mim3d.core.warned import WarningRow, recording

if TYPE_CHECKING:
    from mim3d.cli.arguments import Signature

#: Commands that print much after a warning, so that it is said again at the end: so many of them, as files have all.
SAYING_AGAIN = ("pretrain", "finetune", "predict", "embed", "evaluate", "probe")
MOST_SAID_AGAIN = 10

#: Commands that keep what they have done when they are stopped, and go on from there.
GOING_ON = ("phantom", "cache", "pretrain", "finetune", "predict", "embed", "compare")


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        target: Module and name of its function.
        summary: What it does, in one line.
        positional: Parameters that need no flag.
    """

    target: str
    summary: str
    positional: tuple[str, ...] = ()

    def load(self) -> Callable[..., Any]:
        """Import the function; nothing else of the package's commands is imported."""
        module, _, attribute = self.target.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        return function

    def signature(self, name: str) -> "Signature":
        """Import the function and read what the command line has to know of it."""
        from mim3d.cli.arguments import Signature

        return Signature.of(self.load(), name, self.positional)


COMMANDS = {
    "phantom": Command("mim3d.commands.phantom:phantom", "Make a labelled synthetic CT data set.", ("out",)),
    "cache": Command("mim3d.commands.cache:cache", "Preprocess scans once, for fast random crops.", ("data",)),
    "pretrain": Command("mim3d.commands.pretrain:pretrain", "Learn an encoder from unlabelled scans."),
    "finetune": Command("mim3d.commands.finetune:finetune", "Learn a task from labels, with or without an encoder."),
    "predict": Command("mim3d.commands.predict:predict", "Segment or classify scans, each on its own grid."),
    "embed": Command("mim3d.commands.embed:embed", "Turn scans into a table of features.", ("scans",)),
    "evaluate": Command("mim3d.commands.evaluate:evaluate", "Score label maps or classes against references."),
    "probe": Command("mim3d.commands.probe:probe", "Score frozen features by simple classifiers."),
    "compare": Command("mim3d.commands.compare:compare", "Compare methods, weights and networks on your data."),
    "export": Command("mim3d.commands.export:export", "Bring a network into the formats of other programs."),
    "report": Command("mim3d.commands.report:report", "Write one HTML page on one or more runs.", ("runs",)),
    "weights": Command("mim3d.commands.weights:weights", "Say what a file of weights is.", ("file",)),
    "models": Command("mim3d.commands.models:models", "List backbones with their size, methods and tasks."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    A refusal (Mim3dError) is one line on stderr and exit code 2; ``--debug true`` shows its traceback. Where the
    command did its work but left out cases, the last line says how many and where they are listed, and the exit code
    is 2 too. A command that was stopped before its end has the codes of :mod:`mim3d.core.errors`. Any other error
    stays a traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # Read when torch is imported: its compiled part warns its developers, such as every process of DDP that all
    # parameters were used. What it warns of in Python is not touched.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    _name_the_user()
    with lasting_streams():
        code = _exit_code_of(words)
    if argv is None:
        # How it ended is known; while the process comes to its end nothing is left to be stopped.
        ignore_signals(STOP_SIGNALS)
    return code


def _name_the_user() -> None:
    """Give a user without a name, as by `docker run --user 1234`, one in this process: MONAI asks for it on import."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = "user"


def _exit_code_of(words: list[str]) -> int:
    _show_warnings_in_one_line()
    debug = re.search(r" --debug(?![ =]false\b)", " ".join(["", *words])) is not None
    try:
        with ending_in_order(), working_folder_left_out():
            code = _run(words)
        sys.stdout.flush()
        return code
    except Mim3dError as error:
        if debug:
            raise
        _say_on_stderr(f"mim3d: {error}")
        return REFUSED
    except KeyboardInterrupt:
        _say_on_stderr(f"mim3d: interrupted{_how_to_go_on(words)}")
        return INTERRUPTED
    except StoppedBySignal as stop:
        _say_on_stderr(f"mim3d: {stop}{_how_to_go_on(words)}")
        return exit_code_of(stop.number)
    except BrokenPipeError:
        # The reader of our output has gone; Python's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _how_to_go_on(words: list[str]) -> str:
    """The end of a sentence about a command that was stopped: what is kept, and what to do."""
    name = words[0] if words else ""
    resuming = " with --resume true" if name in ("pretrain", "finetune") and "--resume" not in " ".join(words) else ""
    kept = "what is finished is kept; to go on" if name in GOING_ON else "to do it"
    return f"; {kept}, run the same command again{resuming}" if name in COMMANDS else ""


def _run(words: list[str]) -> int:
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(overview(), file=sys.stdout if words else sys.stderr)
        return 0 if words else REFUSED
    if name == "--version":
        print(f"mim3d {__version__}")
        return 0
    # Only now: the overview of commands needs nothing of what reads settings.
    from mim3d.cli.arguments import command_arguments, refused_with_how_to_resume, split_line
    from mim3d.core.settings import nearest

    if name not in COMMANDS:
        raise ConfigError(f"There is no command '{name}'.{nearest(name, COMMANDS)}")
    signature = COMMANDS[name].signature(name)
    if "--help" in words or "-h" in words:
        from mim3d.cli.help import help_text

        print(help_text(signature, words[1:]))
    else:
        take_noted()
        take_exit_code()
        flags = split_line(words[1:], signature)
        with refused_with_how_to_resume(flags, signature):
            arguments = command_arguments(flags, signature)
            with recording() as warned, found_in_working_folder(own_code_in(arguments).values()):
                signature.function(**arguments)
        sentences = take_noted()
        if name in SAYING_AGAIN:
            _say_again([row for row in warned.rows if row["text"] not in sentences])
        for sentence in sentences:
            say(sentence)
        return take_exit_code() or (REFUSED if sentences else 0)
    return 0


def _say_again(rows: Sequence[WarningRow]) -> None:
    """Let what was warned of stand among the last lines, below the bars and tables of the work."""
    for row in rows[:MOST_SAID_AGAIN]:
        _say_on_stderr(f"mim3d: warning ({row['kind']}): {printable(row['text'])}")
    if len(rows) > MOST_SAID_AGAIN:
        print(f"mim3d: and {len(rows) - MOST_SAID_AGAIN} more warnings, above", file=sys.stderr, flush=True)


def _say_on_stderr(text: str) -> None:
    print(fitted(text, sys.stderr), file=sys.stderr, flush=True)


def overview() -> str:
    """The text of ``mim3d --help``."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: mim3d COMMAND [--config FILE.yaml] [flags]\n\n"
        "Masked pre-training and fine-tuning for 3-D medical images.\n\n"
        f"{listed}\n\n"
        "mim3d COMMAND --help lists the flags of a command, mim3d --version the version."
    )


def _show_warnings_in_one_line() -> None:
    """Print warnings of mim3d as one line; those of other packages keep their place and source."""
    package, others = str(Path(__file__).parents[1]), warnings.showwarning

    def show(message: Any, category: Any, filename: str, *rest: Any, **named: Any) -> None:
        if filename.startswith(package):
            _say_on_stderr(f"mim3d: warning: {printable(str(message))}")
        else:
            others(message, category, filename, *rest, **named)

    warnings.showwarning = show
