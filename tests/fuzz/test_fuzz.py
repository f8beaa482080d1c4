"""A small sample of ``make fuzz``, and that the fuzz sees what it looks for."""

import pytest

from tests.fuzz import fuzz


@pytest.mark.filterwarnings("default")  # of libraries, about what nobody gives them
def test_bad_input_works_or_is_refused():
    assert fuzz.cases(seed=1, count=40) == []


@pytest.mark.parametrize("problem", [ZeroDivisionError("no"), KeyError("name")])
def test_the_fuzz_sees_what_was_not_foreseen(tmp_path, monkeypatch, problem):
    def fail():
        raise problem

    monkeypatch.setattr("vlmflow.cli.main", fail)
    assert "not foreseen" in fuzz.flaw((["cost"], "nothing"), tmp_path)


def test_the_fuzz_sees_half_a_file(tmp_path):
    (tmp_path / ".a.json.1-2.partial").touch()
    assert "a file half written" in fuzz.flaw((["pruners"], "nothing"), tmp_path)
