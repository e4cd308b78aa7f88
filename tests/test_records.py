"""Records: what is written comes back, what is torn is counted, and nothing half written stays."""

from __future__ import annotations

import json
import os

import pytest
import torch

from weldnet import records
from weldnet.errors import RecordError
from weldnet.records import Record


def test_a_record_comes_back_equal(tmp_path):
    record = Record(
        kind="result",
        key="abc",
        cell={"dataset": "mnist", "networks": 2, "method": "gamf"},
        values={"accuracy": 0.25, "loss": None},
        extra={"history": [{"epoch": 1, "loss": 0.5}], "text": "naïve"},
        seed=3,
        where={"commit": "1234", "cores": 2},
    )
    records.append(tmp_path, [record])
    (back,) = records.read(tmp_path)
    assert back == record


def test_numbers_that_json_has_not_become_null_and_tensors_lists(tmp_path):
    extra = {"x": torch.tensor([1.0, float("inf")]), "n": float("nan")}
    records.append(tmp_path, [Record(kind="curve", values={"loss": float("nan")}, extra=extra)])
    raw = json.loads((tmp_path / records.FILE).read_text())
    assert raw["values"] == {"loss": None}
    assert raw["extra"] == {"x": [1.0, None], "n": None}


def test_a_torn_line_is_counted_and_the_next_record_starts_a_line_of_its_own(tmp_path):
    records.append(tmp_path, [Record(kind="result", key="a")])
    with (tmp_path / records.FILE).open("a") as file:
        file.write('{"kind": "result", "key": "b", "val')
    records.append(tmp_path, [Record(kind="result", key="c")])
    found = records.read(tmp_path)
    assert [record.key for record in found] == ["a", "c"]
    assert found.corrupt == 1


WRONG = [
    '"key": ["a"]',
    '"cell": []',
    '"cell": {"method": ["gamf"]}',
    '"values": null',
    '"values": {"accuracy": "high"}',
    '"extra": 3',
    '"seed": "0"',
    '"where": null',
]


@pytest.mark.parametrize(
    "line",
    ["[]", "7", '{"kind": "rumour"}', "not json", '{"cell": {}}', *(f'{{"kind": "result", {part}}}' for part in WRONG)],
)
def test_lines_that_are_no_records_are_counted(tmp_path, line):
    (tmp_path / records.FILE).write_text(line + "\n")
    found = records.read(tmp_path)
    assert (len(found), found.corrupt) == (0, 1)


@pytest.mark.parametrize("end", ["\u2028", "\x85", "\x0c", "\r"])
def test_a_text_with_another_sign_for_the_end_of_a_line_stays_whole(tmp_path, end):
    records.append(tmp_path, [Record(kind="result", key="a", extra={"error": f"one{end}two"})])
    found = records.read(tmp_path)
    assert ([record.extra["error"] for record in found], found.corrupt) == ([f"one{end}two"], 0)


def test_of_two_records_with_one_key_the_later_counts(tmp_path):
    records.append(
        tmp_path, [Record(kind="result", key="a", values={"accuracy": 0.1}), Record(kind="network", key="a")]
    )
    records.append(tmp_path, [Record(kind="result", key="a", values={"accuracy": 0.2})])
    found = records.read(tmp_path)
    assert [record.values.get("accuracy") for record in found.of("result")] == [0.2]
    assert len(found) == 2


def test_records_are_found_by_kind_and_cell():
    some = [Record(kind="result", cell={"method": m, "seed": s}) for m in ("gamf", "identity") for s in (0, 1)]
    found = records.Records(tuple(some))
    assert found.of("result", method="gamf", seed=1) == [some[1]]
    assert found.of("curve") == []


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    records.append(tmp_path, [Record(kind="result", key="a")])
    before = (tmp_path / records.FILE).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match=r"No space left on device.*free some space"):
        records.append(tmp_path, [Record(kind="result", key="b")])
    assert (tmp_path / records.FILE).read_bytes() == before


def test_missing_records_say_what_to_give(tmp_path):
    with pytest.raises(RecordError, match="give the folder of a run"):
        records.read(tmp_path)


def test_where_names_code_and_machine():
    found = records.where("numpy", "no-such-package")
    assert found["torch"] == torch.__version__
    assert found["no-such-package"] is None
    assert {"commit", "machine", "cores", "threads"} <= set(found)
