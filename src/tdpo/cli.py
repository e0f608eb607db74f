"""The command line. Thin: it finds the command, and turns what goes wrong into one readable message.

Nothing heavy is imported here, so that ``tdpo --help`` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from tdpo import __version__
from tdpo.errors import Stopped, UserError, nearest

COMMANDS = {
    "demo": "the whole path on an embedded small world, no download, about three minutes",
    "check-data": "what training would make of a dataset: counts, lengths, duplicates, leaks, rendered pairs",
    "sft": "fine-tune a model on responses, the starting point of preference training",
    "train": "align a model with preference pairs: TDPO, DPO and related objectives",
    "eval": "score held-out pairs with a policy and its reference, and measure their samples",
    "frontier": "train under many objectives and settings, and draw reward against KL(policy || reference)",
    "generate": "sample from a policy and its reference side by side",
    "judge": "win rate of two sets of responses, judged by a language model or a reward model",
    "inspect": "show pairs token by token: log-ratio, KL, advantage and alternatives, as a page for the browser",
    "report": "write a page on one or more training runs: results, curves, samples, data, settings",
    "weights": "compute token weights from two models (TIS-DPO) or a guide (TGDPO), for weighted training",
    "cache-reference": "compute the reference's hidden states once, for runs that then do without its body",
    "merge": "add an adapter to its base's weights and save a plain model",
}
USER_ERROR = 2
INTERRUPTED = 130


def usage() -> str:
    """Returns what ``tdpo --help`` prints."""
    commands = "\n".join(f"  {name:<15} {summary}" for name, summary in COMMANDS.items())
    return (
        f"tdpo {__version__}: token-level direct preference optimization of language models\n\n"
        "usage: tdpo <command> [--config file.yaml] [--option value ...]\n\n"
        f"{commands}\n\n"
        "  tdpo <command> --help lists every option of a command.\n"
        "  --config takes any of them from a YAML file; what is on the command line wins."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, or 2 for a user's mistake.

    A run that was stopped and saved returns 130 (SIGINT), 143 (SIGTERM) or 124 (``--max_time``); Ctrl-C anywhere else
    returns 130 too. A bug is left to raise, with its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name = arguments[0]
    try:
        if name not in COMMANDS:
            advice = " Use 'train --objective dpo'." if name == "dpo" else nearest(name, COMMANDS)  # as in `trl dpo`
            raise UserError(f"no command {name!r}; there are: {', '.join(COMMANDS)}.{advice}")
        command = importlib.import_module(f"tdpo.commands.{name.replace('-', '_')}")
        command.run(arguments[1:])
    except UserError as error:
        print(f"tdpo {name}: {error}", file=sys.stderr)
        return USER_ERROR
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":  # all processes stopped together
            print(f"tdpo {name}: {stopped}", file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        print(f"\ntdpo {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def program() -> int:
    """Runs :func:`main`, then ends the process group that this process may be in.

    A thread of gloo's may still hold the tensors of the last collective, and needs Python's lock to let go of them. If
    the interpreter is ending by then it aborts, and a finished run looks like a failed one; so it gets the lock here.
    """
    code = main()
    group: Any = sys.modules.get("torch.distributed")
    # The other processes do not know of an error of this process alone, and would wait forever.
    if group is not None and group.is_available() and group.is_initialized() and code != USER_ERROR:
        group.destroy_process_group()
        time.sleep(0.1)
    return code


if __name__ == "__main__":
    sys.exit(program())
