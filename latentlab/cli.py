"""The command line: `latentlab VERB --preset NAME [options]`.

    curriculum train a Coconut baseline or a control        --out FOLDER
    grpo       train one GRPO arm                           --out FOLDER --init-from CHECKPOINT
    evaluate   accuracy of a checkpoint on a benchmark      CHECKPOINT --benchmark gsm8k
    ask        a question of one's own, with the thoughts   "a question of four steps"
    plot       draw a training run                          RUN
    sweep      arms x seeds, or a study of many bases       --plan noise
    reproduce  GSM8K inside a time budget                   --preset smol --budget-minutes 24
    verify     exact theory, replay, one's own checkpoint   CHECKPOINT --device cuda
    study      run the notebooks in order, write the report --only 02
    data       print or write problems                      --split test --n 5
    report     rebuild RESULTS.md from the result files     --publish
    bench      time the engine                              --shape gpt2

`latentlab VERB --help` lists the options of a verb. Every field of a preset can be set:
`latentlab grpo --preset tiny --grpo.learning-rate 1e-5`. Wrong use ends in one line on stderr and
exit code 2; `--debug` shows the traceback. SIGTERM, SIGINT and --max-minutes end a training run
after its step with exit code 75: the same command with --resume continues it.
"""

# torch, pydantic and tyro are imported once the verb is known: the overview is immediate.

import contextlib
import errno
import io
import os
import re
import sys

VERBS = "curriculum grpo evaluate ask plot sweep reproduce verify study data report bench".split()
REMEDIES = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some of your quota",
    errno.EACCES: "allow writing and reading there, or name another place",
    errno.EPERM: "allow writing and reading there, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENOTDIR: "a file stands where a folder is expected: name another place",
    errno.EEXIST: "a file stands where a folder is expected: name another place",
    errno.EISDIR: "a folder stands where a file is expected: name another place",
    errno.ENOENT: "there is no such file: correct the path",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Exit code: 0, 1 (failed), 2 (wrong use), 75 (stopped and saved), 130 (aborted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    verb, code = None, 0
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(__doc__)
        else:
            verb, _ = parse(argv)
            if getattr(verb, "threads", 0):
                import torch

                torch.set_num_threads(verb.threads)
            code = verb() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
        return 0
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError, ImportError) as error:
        code = getattr(error, "exit_code", 2 if isinstance(error, (ValueError, OSError)) else 1)
        if debug and code != 75:
            raise
        # A wrong command line, and an error raised on all processes, are reported by rank 0 alone.
        if os.environ.get("RANK", "0") == "0" or not (verb is None or _raised_everywhere(error)):
            print(f"latentlab: {_one_line(error)}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print("latentlab: aborted; --resume continues a training run from its last checkpoint", file=sys.stderr)
        return 130


def parse(argv: list[str]):
    """(verb, config): an instance of a class of verbs.py. Raises a one-line ValueError."""
    name, *words = argv
    if name not in VERBS:
        raise ValueError(f"got the verb {name!r}, expected one of {', '.join(VERBS)}")
    flags = [word.split("=")[0].replace("_", "-") for word in words if re.match("--[a-z]", word)]
    if twice := next((flag for flag in flags if flags.count(flag) > 1), None):
        raise ValueError(f"{twice}: got it twice, expected it once; drop one")
    if "" in words or any(re.fullmatch("--[^=]+=", word) for word in words):
        raise ValueError(f"{name}: got an empty value, expected none or a value; leave the option out")
    import tyro

    from latentlab.config import load_preset
    from latentlab.study import verbs

    def preset(preset: str = "tiny") -> str:
        return preset

    kind, said = getattr(verbs, name.capitalize()), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            chosen, _ = tyro.cli(preset, args=words, return_unknown_args=True, add_help=False)
            start = kind(load_preset(chosen))
            verb = tyro.cli(kind, args=words, default=start, prog=f"latentlab {name}", description=kind.__doc__)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        _, _, text = said.getvalue().partition("\n")  # below the title of tyro's box
        text = re.sub(r"\x1b\[[0-9;]*m|[─-╿]|-{9,}", " ", text)  # no colours, no lines
        raise ValueError(f"{name}: {' '.join(text.split())}") from None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not isinstance(verb, verbs.Shared):
        raise ValueError(
            f"{name}: got {os.environ['WORLD_SIZE']} processes, expected one; only curriculum, grpo and evaluate can "
            "share their work"
        )
    return verb, verb.config


def _raised_everywhere(error: Exception) -> bool:
    from latentlab.runtime import distributed

    return distributed.raised_everywhere(error)


def _one_line(error: Exception) -> str:
    """What was got, what to do: added here to errors of the system and of torch."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno:
        remedy = REMEDIES.get(error.errno, "check this path")
        return f"{error.filename or 'a file'}: {error.strerror}; {remedy}, then the same command again"
    if isinstance(error, ModuleNotFoundError):
        extra = "tensorboard" if error.name == "tensorboard" else "study"
        return f"got no package {error.name}, expected it installed; pip install 'latentlab[{extra}]'"
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return f"out of memory ({text[:200]}); lower the batch sizes or the model's shape"
    return text or f"{type(error).__name__} without a message; --debug shows where"


if __name__ == "__main__":
    sys.exit(main())
