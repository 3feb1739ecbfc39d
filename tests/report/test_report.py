"""The report: what is chosen, drawn, written, and that it is all or nothing."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from jedit.report import (
    Answer,
    Comparison,
    Curve,
    Guess,
    Method,
    NumJudged,
    Picture,
    Point,
    Run,
    best_point,
    check_destination,
    comparison_table,
    page,
    save_png,
    to_json,
    tradeoff_figure,
    verdict,
    write_report,
)
from jedit.report import writer as writer_module
from jedit.report.figure import caption
from jedit.report.table import number


def point(strength, heldout_kl, forget_kl, **more):
    numbers = {
        "edit_seconds": 0.5,
        "forget_nll": 2.0 + strength,
        "forget_accuracy": 0.25,
        "retain_nll": 0.1,
        "retain_accuracy": 0.99,
        "heldout_nll": 0.2,
        "heldout_accuracy": 0.98,
    }
    return Point(
        strength=strength, heldout_kl=heldout_kl, forget_kl=forget_kl, **{**numbers, **more}
    )


@pytest.fixture
def comparison():
    curves = (
        Curve("K-FADE", {"temperature": 4.0}, (point(0.01, 0.01, 3.0), point(0.1, 0.09, 1.5))),
        Curve("K-FADE", {"temperature": 1.0}, (point(0.01, 0.02, 2.0), point(0.1, 0.30, 0.5))),
        Curve("ascent", {"learning rate": 1e-3}, (point(8.0, 4.0, math.inf),)),
        Curve("NPO", {"learning rate": 1e-3}, (point(8.0, 0.05, 2.5, truth_ratio=0.4),)),
    )
    methods = tuple(
        Method(name, "What it does.", "budget (nats)", {"temperature": (1.0, 4.0)}, 2.0)
        for name in ("K-FADE", "ascent", "NPO")
    )
    return Comparison(
        name="toy",
        title="Toy <scene>",
        notes=("What was run & why.",),
        num_rows={"forget": 4},
        num_judged=NumJudged(4, 10),
        settings={"model": "two neurons"},
        seconds={"train": 1.0, "retrain": 0.9},
        kl_budget=0.1,
        original=point(0.0, 0.0, 5.0, truth_ratio=0.2),
        retrained=point(0.0, 0.03, 0.0),
        methods=methods,
        curves=curves,
        pictures=(
            Picture("forget", ((0.0, 1.0), (0.5, 0.25)), "7", *map(Guess, "741", (1, 0.5, 0.25))),
        ),
        answers=(Answer("forget", "Who?", "Ana.", "Ana.", "<b>Bea</b>.", "Cleo."),),
    )


@pytest.fixture
def run(comparison):
    return Run(
        "jedit demo",
        "2026-01-01T00:00:00+00:00",
        3,
        12.0,
        0.5,
        {"jedit": "0"},
        {"cores": 2},
        (comparison,),
    )


def test_the_best_point_is_the_nearest_within_budget(comparison):
    curve, best = comparison.best("K-FADE")
    # 0.5 is nearer and over the budget; 2.0 lies on the other curve and is farther.
    assert (curve.setting["temperature"], best.forget_kl) == (4.0, 1.5)
    assert best_point(comparison.curves, "K-FADE", 0.5)[1].forget_kl == 0.5
    assert comparison.best("ascent") is None


def test_by_the_other_rule_the_loss_decides(comparison):
    curve = comparison.curves[0]
    near, far = (
        p._replace(forget_nll=loss) for p, loss in zip(curve.points, (2.2, 7.0), strict=True)
    )
    comparison = comparison._replace(curves=(curve._replace(points=(near, far)),))
    assert comparison.retrained.forget_nll == 2.0
    assert comparison.nearest_in_loss("K-FADE")[1] == near
    assert comparison.best("K-FADE")[1] == far


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (3e-14, "0"),
        (2.5e-5, "2.5e-05"),
        (0.0204, "0.020"),
        (1.3, "1.30"),
        (11.04, "11.0"),
        (817.4, "817"),
        (math.inf, "∞"),
        (math.nan, "NaN"),
    ],
)
def test_a_number_has_about_three_digits(value, text):
    assert number(value) == text


def test_json_is_strict_and_holds_every_point(run, comparison):
    out = json.loads(json.dumps(to_json(run), allow_nan=False))
    assert out["schema"] == "jedit.results/1"
    assert out["seed"] == 3
    (scene,) = out["comparisons"]
    points = [p for curve in scene["curves"] for p in curve["points"]]
    assert len(points) == sum(len(c.points) for c in comparison.curves) == 6
    assert set(points[0]) == set(Point._fields)
    assert points[4]["forget_kl"] is None
    assert scene["best"]["ascent"] is None
    assert scene["best"]["K-FADE"]["forget_kl"] == 1.5
    assert "0.1 nats" in scene["rule"]


def test_the_table_shows_prediction_beside_truth_and_says_when_nothing_fits(comparison):
    best = comparison.curves[0].points[1]._replace(predicted_kl=0.0201, true_kl=0.0999)
    curve = comparison.curves[0]._replace(points=(best,))
    comparison = comparison._replace(curves=(curve, *comparison.curves[1:]))
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(comparison_table(comparison))
    text = console.export_text()
    assert "0.020/0.100" in text
    assert "no point within 0.1 nats" in text
    assert "test" not in text  # no model has a test set, so there is no column
    assert "truth" in text


class Resources(HTMLParser):
    """Collects what a page would load, and its visible text."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                self.loaded.append((tag, value))

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone(run):
    text = page(run)
    assert not re.search(r"https?://|//\w+\.|@import|url\(|<script|<link", text)
    found = Resources(text)
    images = [value for tag, value in found.loaded if tag in ("img", "source")]
    assert len(images) == len(set(images)) == 3  # the figure, its narrow layout, a picture
    assert all(value.startswith("data:image/png;base64,") for value in images)
    assert all(value.startswith(("data:", "#")) for _, value in found.loaded)
    assert "<b>Bea</b>." in found.text  # shown as it is, not as markup
    assert "Toy <scene>" in found.text
    assert "What was run & why." in found.text


def test_the_page_answers_first_what_happened(run, comparison):
    text = Resources(page(run)).text
    found = verdict(comparison)
    order = [
        found.outcome.value,
        found.sentence,
        "Before and after",
        "The trade-off",
        "Each method at its best point",
        "How it was made",
        "jedit demo",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    before, after, retrained = (f"{x:.0f}%" for x in (100, 50, 25))
    assert re.search(rf"before\s*7 {before}\s*after\s*4 {after}\s*retrained\s*1 {retrained}", text)


def test_the_page_shows_what_stopped_by_itself(run, comparison):
    assert "jedit.forget" not in Resources(page(run)).text
    answer = comparison.answers[0]._replace(by_itself="Dora.")
    alone = comparison._replace(answers=(answer,), by_itself=point(9.0, 0.04, 1.0))
    text = Resources(page(run._replace(comparisons=(alone,)))).text
    assert re.search(r"before\s*after\s*after jedit.forget\s*retrained", text)
    assert re.search(r"loss on the forget rows, nats\s*2.00\s*2.10\s*11.0\s*2.00", text)
    assert re.search(r"Ana.\s*<b>Bea</b>.\s*Dora.\s*Cleo.", text)


def test_a_narrow_screen_keeps_the_columns_that_matter(run):
    found = re.search(r'<table class="sheet">.*?</table>', page(run), re.DOTALL)
    rows = re.findall(r"<tr.*?</tr>", found[0], re.DOTALL)
    cells = [re.findall(r"<t[hd]([^>]*)>", row) for row in rows]
    shown = [[i for i, kind in enumerate(row) if "more" not in kind] for row in cells]
    assert len({tuple(row) for row in shown}) == 1  # the same in every row
    headings = re.findall(r"<th[^>]*>(.*?)</th>", rows[0], re.DOTALL)
    kept = [headings[i].replace("\n", " ") for i in shown[0]]
    assert kept == ["model", "forget NLL", "forget acc %", "KL to original", "KL to retrained"]
    assert len(headings) > 2 * len(kept)


def test_the_narrow_figure_stands_upright(comparison):
    wide, narrow = (tradeoff_figure(comparison, is_narrow=x) for x in (False, True))
    left, right = wide.axes
    upper, lower = narrow.axes
    for figure in (wide, narrow):
        figure.draw_without_rendering()
    assert left.get_position().x1 < right.get_position().x0
    assert upper.get_position().y0 > lower.get_position().y1
    assert narrow.get_size_inches()[0] <= 4  # at 96 dots an inch within 400 pixels


def test_the_figure_is_drawn_with_its_axes_named(comparison, tmp_path):
    figure = tradeoff_figure(comparison)
    for axes in figure.axes:
        assert "nats per output" in axes.get_xlabel()
        assert "nats per output" in axes.get_ylabel()
        labels = axes.get_legend_handles_labels()[1]
        assert set(labels) == {"K-FADE", "ascent", "NPO", "retrained", "untouched (KL 0)"}
    looks = {(line.get_marker(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) > 3  # told apart without colour
    save_png(figure, tmp_path / "a.png")
    save_png(tradeoff_figure(comparison), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_many_methods_are_numbered_and_none_hides_another(comparison):
    names = [f"method {i}" for i in range(9)]
    methods = tuple(Method(name, "", "steps", {}) for name in names)
    curves = tuple(Curve(name, {}, (point(1.0, 0.05, 1.5),)) for name in names[:8])
    curves += (Curve(names[8], {}, (point(1.0, 0.5, 1.5),)),)
    many = comparison._replace(methods=methods, curves=curves)
    figure = tradeoff_figure(many)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[2:10] == [f"{i}  {name}" for i, name in enumerate(names[:8], 1)]
    assert legend[10] == "9  method 8 (none)"
    for axes in figure.axes:
        places = {note.get_text(): note.xy for note in axes.texts if note.get_text().isdigit()}
        assert list(places) == [str(i) for i in range(1, 9)]
        assert len(set(places.values())) == 8
    assert "A number stands at" in caption(many)
    assert "ringed" in caption(comparison)


def test_a_report_is_written_whole_and_replaces_an_older_one(run, tmp_path):
    out = tmp_path / "deep" / "demo"
    for _ in range(2):
        assert write_report(run, out) == out / "index.html"
        names = sorted(item.name for item in out.iterdir())
        assert names == ["index.html", "results.json", "tradeoff-toy.png"]
    assert [item.name for item in out.parent.iterdir()] == ["demo"]


def test_an_error_leaves_the_older_report_and_nothing_else(run, tmp_path, monkeypatch):
    out = tmp_path / "demo"
    write_report(run, out)
    before = {item.name: item.read_bytes() for item in out.iterdir()}

    def fails(_):
        raise RuntimeError("no page")

    monkeypatch.setattr(writer_module, "page", fails)
    with pytest.raises(RuntimeError, match="no page"):
        write_report(run._replace(seed=4), out)
    with pytest.raises(RuntimeError, match="no page"):
        write_report(run, tmp_path / "new")
    assert {item.name: item.read_bytes() for item in out.iterdir()} == before
    assert [item.name for item in tmp_path.iterdir()] == ["demo"]


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    check_destination(tmp_path / "not" / "there")
    check_destination(tmp_path)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds files that are no report \(thesis.tex\)"):
        check_destination(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        check_destination(tmp_path / "thesis.tex")
    with pytest.raises(ValueError, match="no writable folder"):
        check_destination(tmp_path / "thesis.tex" / "below")
