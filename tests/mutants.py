"""Mutation testing: `make mutants` changes one place of the library at a time; do the tests notice?

A sample of mutants per group of modules, the same for the same code (ordered by a hash of each mutant). Each is run
in a forked child of this process, which has imported torch but nothing of latentlab: the child reads the changed
source in place of the file, then runs the tests that execute the changed statement, quickest first, until one fails.
Messages (strings with a space, f-strings, print), docstrings, annotations and imports are not mutated, nor are:
the order of arguments where it does not matter (COMMUTE); -1 to -0, for it becomes 1 and -2;
the keywords `strict`, `check`, `device`, `non_blocking` (lengths agree, and the tests have one device), and those of
progress bars (KEPT, SILENT).

`reports/published/mutants.json` has the score and every mutant left alive; mutants_equivalent.json lists those that
no test can tell from the code, each with its reason. Finished mutants are kept in out/mutants: after new tests only
the survivors run again. Remove that folder to begin anew.
"""

import argparse
import ast
import copy
import gc
import hashlib
import importlib.machinery
import json
import os
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import _hypothesis_pytestplugin  # noqa: F401 - what the tests need is imported here once, for all children
import beartype
import hypothesis  # noqa: F401
import jaxtyping  # noqa: F401
import jupyter_client  # noqa: F401
import nbformat  # noqa: F401
import pydantic  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import tokenizers  # noqa: F401
import torch
import tqdm  # noqa: F401
import transformers
import tyro  # noqa: F401

ROOT = Path(__file__).parents[1]
SCRATCH, EQUIVALENT = ROOT / "out" / "mutants", ROOT / "tests" / "mutants_equivalent.json"
GROUPS = {
    "method": "problems masks attention backbone model rollouts reward advantage loss grpo".split(),
    "loops": [
        *(f"training/{name}" for name in "curriculum arms run checkpoint preflight steps".split()),
        *(f"evaluation/{name}" for name in "accuracy statistics collapse thoughts".split()),
    ],
}
TESTS = [f"tests/{name}" for name in "core data evaluation pretrained theory training".split()]
LIMIT, BUDGET = 30, 25.0  # CPU seconds of a child, and of its tests on the code as it is
WORKERS = 2  # children at a time

SWAPS = {
    **{ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt)},
    **{ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,)},
    **{ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.And: (ast.Or,), ast.Or: (ast.And,)},
    **{ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,), ast.FloorDiv: (ast.Div,)},
    **{ast.Mod: (ast.FloorDiv,), ast.Pow: (ast.Mult,), ast.BitOr: (ast.BitAnd,), ast.BitAnd: (ast.BitOr,)},
}
PAIRS = ("min max", "any all", "amin amax", "minimum maximum", "argmin argmax", "floor ceil", "zeros_like ones_like")
NAMES = {a: b for pair in PAIRS for a, b in (pair.split(), reversed(pair.split()))}
COMMUTE = {"max", "min", "maximum", "minimum", "gcd", "transpose"}
KEPT = {"strict", "check", "device", "non_blocking", "desc", "unit", "delay", "leave"}  # keywords
SILENT = {"print", "progress_bar", "show", "warn"}  # calls for the reader's eye


# ---------------------------------------------------------------- mutants
def name_of(call):
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def replacements(node, rebound):
    """What may stand in place of `node`; `rebound`: the names that its function assigns more than once."""
    match node:
        case ast.Compare() | ast.BinOp() | ast.BoolOp() | ast.AugAssign():
            operator = node.ops[0] if isinstance(node, ast.Compare) else node.op
            for swap in SWAPS.get(type(operator), ()):
                new = copy.copy(node)
                if isinstance(node, ast.Compare):
                    new.ops = [swap(), *node.ops[1:]]
                else:
                    new.op = swap()
                yield new
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int()):
            yield from (ast.Constant(node.value + 1), ast.Constant(node.value - 1))
        case ast.Constant(value=float()):
            yield from (ast.Constant(node.value * 2 or 1.0), ast.Constant(node.value + 1))
        case ast.Constant(value=str()) if node.value and " " not in node.value:
            yield ast.Constant(node.value + "x")
        case ast.Call() if name_of(node) not in SILENT:
            for i in (i for i, keyword in enumerate(node.keywords) if keyword.arg not in KEPT):
                yield ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :])
            starred = any(isinstance(a, ast.Starred) for a in node.args[:2])
            if len(node.args) > 1 and not starred and name_of(node) not in COMMUTE:
                yield ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
        case ast.Name() if node.id in NAMES:
            yield ast.Name(NAMES[node.id], node.ctx)
        case ast.Attribute() if node.attr in NAMES:
            yield ast.Attribute(node.value, NAMES[node.attr], node.ctx)
        case ast.Slice():
            if node.lower:
                yield ast.Slice(None, node.upper, node.step)
            if node.upper:
                yield ast.Slice(node.lower, None, node.step)
        case ast.Return() if node.value:
            yield ast.Return(ast.Constant(None))
    match node:
        case ast.If() | ast.IfExp():
            for value in (True, False):
                new = copy.copy(node)
                new.test = ast.Constant(value)
                yield new
        case ast.comprehension() if node.ifs:
            yield ast.comprehension(node.target, node.iter, [], node.is_async)
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break():
            yield ast.Pass()
        case ast.Return() if node.value is None:
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()
        case ast.Assign(targets=[ast.Name(id=name)]) if name in rebound:
            yield ast.Pass()
        case ast.FunctionDef() | ast.ClassDef():
            for i in range(len(node.decorator_list)):
                new = copy.copy(node)
                new.decorator_list = node.decorator_list[:i] + node.decorator_list[i + 1 :]
                yield new


def places(node, statement, function, rebound):
    """(parent, field, index, replacement, statement, function) of every mutant below `node`."""
    for field, value in ast.iter_fields(node):
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            eye = isinstance(child, ast.Expr) and isinstance(child.value, ast.Call) and name_of(child.value) in SILENT
            if field in ("annotation", "returns") or text or eye or not isinstance(child, ast.AST):
                continue
            if isinstance(child, (ast.JoinedStr, ast.Import, ast.ImportFrom)) or getattr(child, "arg", "") in KEPT:
                continue
            here, inside, again = statement, function, rebound
            if isinstance(child, ast.stmt):
                here = child
            for new in replacements(child, rebound):
                if isinstance(node, ast.UnaryOp) and isinstance(new, ast.Constant) and not new.value:
                    continue  # -0
                yield node, field, index if isinstance(value, list) else None, new, here, function
            if isinstance(child, ast.Raise) or (isinstance(child, ast.Call) and name_of(child) in SILENT):
                continue
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inside = f"{function}.{child.name}" if function else child.name
                again = repeated(child)
            yield from places(child, here, inside, again)


def repeated(function):
    """Names bound more than once in a function, arguments included."""
    stored = [n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    counts = Counter(stored + [n.arg for n in ast.walk(function) if isinstance(n, ast.arg)])
    return {name for name, count in counts.items() if count > 1}


def header(statement):
    """A statement as text; of a compound one the first line, decorators in front."""
    lines = ast.unparse(statement).splitlines()
    if not hasattr(statement, "body"):
        return " ".join(map(str.strip, lines))
    return " ".join(lines[: 1 + next(i for i, line in enumerate(lines) if not line.startswith("@"))])


def mutants_of(module):
    """Every mutant of a module: its key, its source and the lines of the statement that it changes."""
    tree = ast.parse((ROOT / "latentlab" / f"{module}.py").read_text())
    seen, found = Counter(), []
    fields = {field for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for field in node.body}
    for parent, field, index, new, statement, function in list(places(tree, tree, "", set())):
        body = getattr(statement, "body", None)
        last = body[0].lineno - 1 if isinstance(body, list) else statement.end_lineno
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", ()))])
        before, container = header(statement), getattr(parent, field)
        if index is None:
            setattr(parent, field, new)
        else:
            old, container[index] = container[index], new
        source = ast.unparse(ast.fix_missing_locations(tree))
        after = header(new) if isinstance(new, ast.stmt) else header(statement)
        if index is None:
            setattr(parent, field, container)
        else:
            container[index] = old
        key = f"{module}.{function}: {before} -> {after}"
        seen[key] += 1
        key += f" ({seen[key]})" if seen[key] > 1 else ""
        lines = list(range(first, max(first, last) + 1))
        defining = not function or statement in fields or isinstance(statement, (ast.FunctionDef, ast.ClassDef))
        found.append({"key": key, "module": module, "source": source, "lines": None if defining else lines})
    return found


def digest(*texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- pytest in a forked child
class Chosen:
    """A pytest plugin: runs the given tests alone, in their order, and names those that fail."""

    def __init__(self, names, report):
        self.place, self.report = {name: i for i, name in enumerate(names)}, report

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda i: self.place[i.nodeid])

    def pytest_runtest_logreport(self, report):
        if report.failed:
            with open(self.report, "a") as lines:
                lines.write(report.nodeid + "\n")


class Covered:
    """A pytest plugin: which lines of the mutated modules does each test execute, in how much CPU time?"""

    def __init__(self, report):
        self.files = {str(ROOT / "latentlab" / f"{m}.py"): m for modules in GROUPS.values() for m in modules}
        self.report, self.sinks, self.shared = report, [set()], defaultdict(set)
        self.tests, self.seconds, self.failed = defaultdict(set), {}, set()

    def trace(self, frame, event, argument):
        if (module := self.files.get(frame.f_code.co_filename)) is None:
            return None

        def line(frame, event, argument):
            self.sinks[-1].add((module, frame.f_lineno))
            return line

        return line(frame, event, argument)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope == "function":
            return (yield)
        self.sinks.append(self.shared[fixturedef.argname])
        try:
            return (yield)
        finally:
            self.sinks.pop()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.sinks = [self.tests[item.nodeid]]
        begun = time.process_time()
        sys.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.seconds[item.nodeid] = time.process_time() - begun
            for name in item.fixturenames:
                self.tests[item.nodeid] |= self.shared[name]

    def pytest_runtest_logreport(self, report):
        if not report.passed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self):
        rows = {name: sorted(lines) for name, lines in self.tests.items() if lines and name not in self.failed}
        self.report.write_text(json.dumps({"seconds": self.seconds, "lines": rows}))


def start(words, plugin, log, change=None, limit=LIMIT):
    """The process id of a child that runs pytest on `words`, with `change`: (path, source) in place of a file."""
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        with open(log, "wb") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        sys.dont_write_bytecode = change is not None
        if change:
            replace_source(*change)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
            signal.alarm(4 * limit)  # of one that waits
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
        words = [
            *words,
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "_hypothesis_pytestplugin",
            "--hypothesis-seed=0",
            "-m",
            "not slow and not network",
        ]
        code = int(pytest.main(words, plugins=[plugin]))
    except BaseException:
        code = 3
    sys.stdout.flush()
    os._exit(code)


def replace_source(path, source):
    """Whoever loads the module at `path` reads `source`."""
    loader = importlib.machinery.SourceFileLoader
    original, compiled = loader.get_data, importlib.util.cache_from_source(path).rpartition(".cpython")[0]

    def get_data(self, asked):
        if asked == path:
            return source.encode()
        if asked.startswith(compiled + ".cpython"):
            raise OSError
        return original(self, asked)

    loader.get_data = get_data


def coverage(code):
    """{"seconds": of each test, "lines": the tests that execute each line}; a test file is run when it is new."""
    path, report, known = SCRATCH / f"coverage-{code}.json", SCRATCH / "coverage", {}
    if path.exists():
        known = json.loads(path.read_text())
    files = {str(p): digest(p.read_text()) for folder in TESTS for p in Path(folder).rglob("test_*.py")}
    new = sorted(name for name, text in files.items() if known.get(name, {}).get("text") != text)
    if new:
        print(f"which test of {len(new)} files executes which line ...", flush=True)
        os.waitpid(start(new, Covered(report), SCRATCH / "coverage.log"), 0)
        found = json.loads(report.read_text())
        known |= {name: {"text": files[name], "seconds": {}, "lines": {}} for name in new}
        for part in ("seconds", "lines"):
            for test, value in found[part].items():
                known[test.partition("::")[0]][part][test] = value
        path.write_text(json.dumps(known))
    seconds, lines = {}, defaultdict(lambda: defaultdict(list))
    for row in (known[name] for name in files):
        seconds |= row["seconds"]
        for test, places in row["lines"].items():
            for module, line in places:
                lines[module][line].append(test)
    return {"seconds": seconds, "lines": lines}


# ---------------------------------------------------------------- runs
def choose(mutant, covered, killers):
    """The tests for a mutant: the quickest first, but before them those that killed others in its module."""
    lines = covered["lines"][mutant["module"]]
    names = sorted(set().union(*(lines.get(line, ()) for line in mutant["lines"] or lines)))
    names.sort(key=lambda name: covered["seconds"][name])
    total, chosen = 0.0, []
    for name in names:
        total += covered["seconds"][name]
        if total <= BUDGET or not chosen:
            chosen.append(name)
    return sorted(chosen, key=lambda name: -killers[name])


def run_all(mutants, covered, store):
    """Run the mutants, WORKERS at a time; `store` gets every outcome as it comes."""
    waiting, running, killers = [(mutant, None) for mutant in reversed(mutants)], {}, defaultdict(Counter)
    began, done = time.monotonic(), 0
    while waiting or running:
        while waiting and len(running) < WORKERS:
            mutant, names = waiting.pop()
            names = choose(mutant, covered, killers[mutant["module"]]) if names is None else names
            if not names:  # no test comes here
                store(mutant | {"status": "survived", "killer": ""})
                continue
            # The first two files alone: to collect them all takes longer than most mutants live.
            files = list(dict.fromkeys(name.partition("::")[0] for name in names))[:2]
            first, rest = ([n for n in names if (n.partition("::")[0] in files) is here] for here in (True, False))
            log = SCRATCH / f"failed-{len(waiting)}"
            change = str(ROOT / "latentlab" / f"{mutant['module']}.py"), mutant["source"]
            running[start([*files, "-x"], Chosen(first, log), f"{log}.log", change)] = mutant, rest, log
        if not running:
            break
        pid, status = os.wait()
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # processes that its tests left
        mutant, rest, log = running.pop(pid)
        killer = log.read_text().splitlines()[0] if log.exists() else ""
        log.unlink(missing_ok=True)
        code = os.waitstatus_to_exitcode(status)
        if code == 0 and rest:
            waiting.append((mutant, rest))
            continue
        outcome = {0: "survived", pytest.ExitCode.NO_TESTS_COLLECTED: "survived"}.get(code, "killed")
        outcome = "timeout" if code in (-signal.SIGALRM, -signal.SIGXCPU) else outcome
        killers[mutant["module"]][killer] += bool(killer)
        store(mutant | {"status": outcome, "killer": killer or f"exit code {code}"})
        done += 1
        if done % 20 == 0:
            left = len(waiting) * (time.monotonic() - began) / done
            print(f"{done} run, {len(waiting)} to go, about {left / 60:.0f} minutes", flush=True)


def unsound(killers):
    """The tests, of (module, test) that killed mutants, that fail on the code as it is."""
    wrong = set()
    for module in sorted({module for module, _ in killers}):
        names, report = sorted(name for m, name in killers if m == module), SCRATCH / "unsound"
        report.unlink(missing_ok=True)
        path = ROOT / "latentlab" / f"{module}.py"
        files = list(dict.fromkeys(name.partition("::")[0] for name in names))
        source = ast.unparse(ast.parse(path.read_text()))
        pid = start(files, Chosen(names, report), SCRATCH / "unsound.log", (str(path), source), limit=600)
        os.waitpid(pid, 0)
        wrong |= set(report.read_text().splitlines()) if report.exists() else set()
    print("fail on the code as it is:", *sorted(wrong) or ["none"], flush=True)
    return wrong


def sample(modules, size):
    """The `size` mutants of these modules that come first by their hash: edits elsewhere change few of them."""
    found = [mutant for module in modules for mutant in mutants_of(module)]
    return len(found), sorted(found, key=lambda m: digest("0", m["key"]))[:size]


def summary(total, mutants, outcomes, equivalent):
    rows = [outcomes[mutant["key"]] for mutant in mutants]
    status = {row["key"]: row["status"] for row in rows}
    killed = sum(s == "killed" for s in status.values())
    left = sorted(key for key, s in status.items() if s == "survived")
    return {
        "possible": total,
        "sampled": len(rows),
        "killed": killed,
        "timeouts": sum(s == "timeout" for s in status.values()),
        "equivalent": sum(key in equivalent for key in left),
        "score": killed / len(rows),
        "survivors": {key: equivalent.get(key, "") for key in left},
    }


def publish(sections, path, started):
    from latentlab.runtime import environment, files

    scores = [f"{name} {row['killed']} of {row['sampled']}" for name, row in sections.items()]
    iso = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(started))
    result = {
        "schema_version": 1,
        "name": "mutants",
        "preset": "",
        "question": "Would the tests notice a mistake?",
        "headline": f"mutants killed: {', '.join(scores)}",
        "parameters": {"seed": 0, "limit_seconds": LIMIT, "test_seconds": BUDGET, "groups": GROUPS},
        "metrics": sections,
        "arms": [],
        "environment": environment.environment(),
        "commit": environment.commit(),
        "started": iso,
        "seconds": round(time.time() - started, 1),
    }
    files.write_atomically(path, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=300, help="mutants of each group")
    parser.add_argument("--modules", nargs="*", default=[], help="such as advantage training/arms; nothing is written")
    parser.add_argument("--json", type=Path, default=ROOT / "reports" / "published" / "mutants.json")
    options, started = parser.parse_args(), time.time()
    torch.set_num_threads(1)  # no thread must be left out of a fork
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # nbval alone takes half a second
    os.chdir(ROOT)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    for name in ("GPT2LMHeadModel", "LlamaForCausalLM", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
    beartype.beartype(lambda x: x)
    gc.freeze()  # pytest's collections then skip what the children share
    sources = {f: [p.read_text() for p in sorted((ROOT / f).rglob("*.py"))] for f in ("latentlab", *TESTS)}
    code = digest(*sources["latentlab"], (ROOT / "tests" / "conftest.py").read_text())
    state, outcomes = digest(code, *(text for folder in TESTS for text in sources[folder])), {}
    kept = SCRATCH / "outcomes.jsonl"
    for line in kept.read_text().splitlines() if kept.exists() else ():
        row = json.loads(line)
        outcomes[row["mutant"]] = row
    covered = coverage(code)
    groups = {"chosen": options.modules} if options.modules else GROUPS
    sampled = {name: sample(modules, options.sample) for name, modules in groups.items()}
    results, todo = {}, []

    def store(row):
        row = {**row, "mutant": digest(row["module"], row["source"]), "state": state}
        del row["source"], row["lines"]
        results[row["key"]] = row
        with open(kept, "a") as lines:
            lines.write(json.dumps(row) + "\n")

    for _, mutants in sampled.values():
        for mutant in mutants:
            row = outcomes.get(digest(mutant["module"], mutant["source"]))
            if row and (row["status"] == "killed" or row["state"] == state):
                results[mutant["key"]] = row
            else:
                todo.append(mutant)
    while todo:
        run_all(todo, covered, store)
        wrong = unsound({(row["module"], row["killer"]) for row in results.values() if "::" in row["killer"]})
        for lines in covered["lines"].values():
            for names in lines.values():
                names[:] = [name for name in names if name not in wrong]
        again = {key for key, row in results.items() if row["killer"] in wrong}
        todo = [mutant for _, rows in sampled.values() for mutant in rows if mutant["key"] in again]
    equivalent = json.loads(EQUIVALENT.read_text())
    sections = {name: summary(total, rows, results, equivalent) for name, (total, rows) in sampled.items()}
    print(json.dumps(sections, indent=1, ensure_ascii=False))
    if not options.modules:
        publish(sections, options.json, started)


if __name__ == "__main__":
    main()
