"""The page and the numbers of an audit, from made-up results."""

import json
import stat

import numpy as np
import pytest

from jedit.report.audit_page import audit_page, check_audit_destination, outcome_of, write_audit
from jedit.report.audit_results import (
    SCHEMA,
    Audit,
    Estimate,
    Finding,
    Folder,
    Measure,
    Outcome,
    Overall,
    RowSet,
    Section,
    audit_json,
)

SALT = bytes(range(32))
ESTIMATE = Estimate(0.25, 0.125, 0.5, 40)


def section(name, **curves):
    return Section(
        name,
        f"What of {name}?",
        "A lead.",
        [Measure("m", "a <measure>", "by hand", {"base": ESTIMATE, "unseen": ESTIMATE})],
        [
            Measure(
                "g",
                "author: Ann & Bo",
                "by hand",
                dict.fromkeys(("kl", "base", "edited"), ESTIMATE),
            )
        ]
        if name == "cost"
        else (),
        ["A note."],
        [
            Finding(
                f"{name}_{o.name}",
                name,
                "Is it?",
                o,
                f"It is {o.name}.",
                ESTIMATE,
                "at most 1",
                "me",
            )
            for o in Outcome
        ],
        curves,
    )


@pytest.fixture
def audit():
    line = {"taught": [1, 2], "steps": [0, 4], "values": [[ESTIMATE] * 2] * 2}
    return Audit(
        Overall(Outcome.FAILED, "It is not forgotten.", "Because."),
        [
            section("forgotten", losses={"base": np.array([0.1, np.inf]), "unseen": [2.0, 3.0]}),
            section("depth", lens={"edited": [ESTIMATE] * 3}, probe={"edited": [ESTIMATE] * 3}),
            section("comeback", relearning={"edited": line}, benign={"edited": line}),
            section("cost"),
        ],
        [Folder("base", "/models/<base>", "ab" * 32, {"config.json": (7, "cd" * 32)}, "llama")],
        "Two of three parameters differ.",
        [RowSet("forget", 50, ["ef" * 32] * 40, 1)],
        {"seed": 0, "spending": {"rates": (1e-5,)}},
        "jedit audit --base x",
        "2026-01-01T00:00:00+00:00",
        12.3,
        {"jedit": "1"},
        {"cores": 2},
        {"forget_loss": {"edited": np.array([1.0, np.inf])}},
    )


def test_the_page_says_the_verdict_first_and_escapes_what_it_is_given(audit):
    page = audit_page(audit)
    order = ["It is not forgotten.", "What of forgotten?", "What of depth?", "What of cost?"]
    places = [page.index(text) for text in (*order, "How to check it")]
    assert places == sorted(places)
    assert "a &lt;measure&gt;" in page
    assert "/models/&lt;base&gt;" in page
    assert "Ann &amp; Bo" in page
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    for outcome in Outcome:
        assert f">{outcome.value}</span>" in page
    assert "0.250 [0.125, 0.500]" in page
    assert "40 of 50" in page
    assert "1 yes, 1 no, 1 cannot tell, 1 not measured" in page


def test_a_section_is_as_good_as_its_worst_test():
    def outcome(*outcomes):
        whole = section("cost")
        findings = [f for f in whole.findings if f.outcome in outcomes]
        return outcome_of(whole._replace(findings=findings))

    assert outcome(*Outcome) is Outcome.FAILED
    assert outcome(Outcome.PASSED, Outcome.UNDECIDED) is Outcome.UNDECIDED
    assert outcome(Outcome.PASSED, Outcome.NOT_MEASURED) is Outcome.PASSED
    assert outcome(Outcome.NOT_MEASURED) is Outcome.NOT_MEASURED


def test_the_numbers_are_plain_json_with_a_schema(audit):
    found = audit_json(audit)
    assert found["schema"] == SCHEMA == "jedit.audit/1"
    text = json.dumps(found, allow_nan=False)
    back = json.loads(text)
    assert back["per_row"]["forget_loss"]["edited"] == [1.0, None]
    assert back["sections"][0]["findings"][0]["outcome"] == "passed"
    assert back["sections"][0]["measures"][0]["models"]["base"] == ESTIMATE._asdict()
    assert set(back) == {"schema", *Audit._fields}


def test_the_salt_is_in_a_file_of_its_own_for_its_owner(audit, tmp_path):
    out = tmp_path / "audit"
    page = write_audit(audit, out, salt=SALT)
    assert page == out / "index.html"
    assert sorted(item.name for item in out.iterdir()) == ["audit.json", "index.html", "salt.txt"]
    assert (out / "salt.txt").read_text() == SALT.hex() + "\n"
    assert stat.S_IMODE((out / "salt.txt").stat().st_mode) == 0o600
    for name in ("audit.json", "index.html"):
        assert SALT.hex() not in (out / name).read_text()
    write_audit(audit, out, salt=bytes(32))  # an earlier audit is replaced
    assert (out / "salt.txt").read_text() == "00" * 32 + "\n"
    assert [item.name for item in tmp_path.iterdir()] == ["audit"]


def test_a_folder_with_other_things_is_refused(audit, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds files that are no report \(results.json\)"):
        check_audit_destination(tmp_path)
    with pytest.raises(ValueError, match="holds files"):
        write_audit(audit, tmp_path, salt=SALT)
