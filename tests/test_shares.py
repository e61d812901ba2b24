"""Methods side by side by text alone."""
import json

import pytest

from experiments import shares


def test_the_groups_are_the_books_and_the_canary_is_the_nearest():
    near = {"dog": 0.8, "lion": 0.7}
    reported, choosing = (shares.groups_of("cat", words, near) for words in ("reported", "choosing"))
    assert reported["canary"] == ["dog"] and reported["near"] == ["dog", "lion"]
    assert "kitty" in reported["synonyms"] and not {*reported["synonyms"]} & {*choosing["synonyms"]}
    assert not {*reported["phrases"]} & {*choosing["phrases"]} and "cat" not in reported["other classes"]


def test_the_table_has_a_row_a_method_and_one_for_each_set(here, refused, tmp_path, capsys):
    here("experiments/shares.py", "--classes", "cat", "--set", "mining=expected M=0 N=0 lambda1=0.1",
         cwd=tmp_path)
    rows = json.loads((tmp_path / "out/shares/shares-reported.json").read_text())
    rows = {row["method"]: row for row in rows}
    assert [*rows] == [*shares.METHODS, "mining=expected M=0 N=0 lambda1=0.1"]
    assert rows["closed form"]["concept"] == pytest.approx(1, abs=0.05)
    assert rows["closed form, reach 2"]["concept"] == pytest.approx(2, abs=0.1)
    same = dict(rows["closed form"], method=None)
    assert same == dict(rows["mining=expected M=0 N=0 lambda1=0.1"], method=None)
    assert "| closed form |" in capsys.readouterr().out
    refused("experiments/shares.py", "--classes", "cat,unicorn", cwd=tmp_path, match="--classes unicorn")
