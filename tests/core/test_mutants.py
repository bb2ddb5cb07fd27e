"""tests/mutants.py: which places of a module are changed, and that every change is another program."""

import ast

from tests import mutants

SOURCE = '''
"""A docstring."""
import math

@staticmethod
def largest(x: "tensor", *, rate: float = 0.5, name="mean") -> "tensor":
    """Another one."""
    if rate > 1:
        raise ValueError(f"rate: got {rate}, expected at most {1}")
    print("a message", 3)
    return max(x[1:], key=abs) + 2
'''


def test_settings_operators_calls_and_decorators_are_changed_and_messages_are_not(tmp_path, monkeypatch):
    (tmp_path / "latentlab").mkdir()
    (tmp_path / "latentlab" / "toy.py").write_text(SOURCE)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    found = mutants.mutants_of("toy")
    sources = {ast.unparse(ast.parse(mutant["source"])) for mutant in found}
    assert len(sources) == len(found) == len({mutant["key"] for mutant in found})
    assert ast.unparse(ast.parse(SOURCE)) not in sources
    changed = [mutant["key"].partition(" -> ")[2] for mutant in found]
    for part in ("rate: float=1.0", "name='meanx'", "if rate >= 1", "if True", "if False", "if rate > 2", "min(x[1:]"):
        assert any(part in text for text in changed), part
    for part in ("max(x[1:]) + 2", "max(x[:], key=abs)", "max(x[2:]", "key=abs) - 2", "key=abs) + 3", "return None"):
        assert any(part in text for text in changed), part
    assert "pass" in changed  # instead of the error
    assert sum("@staticmethod" not in source for source in sources) == 1
    assert not any("docstring" not in s or "Another" not in s or "print('a message', 3)" not in s for s in sources)
