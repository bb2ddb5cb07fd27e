"""What the tests of all exercises ask: a solution passes, a stub is not tried, every mistake is told apart."""


def expect_solved(check, answer):
    assert check(answer) is True
    assert check(lambda *_: None) is None


def expect_told_apart(check, answers, capsys):
    assert [check(answer) for answer in answers] == [False] * len(answers)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(set(said)) == len(answers)
