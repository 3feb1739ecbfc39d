"""Tables, figures and one page a person can read, from the numbers of a comparison."""

from jedit.report.domains import Domain, domain_figure
from jedit.report.edit_page import edit_page
from jedit.report.evaluation_log import Evaluation, read_evaluation_log, write_evaluation_log
from jedit.report.figure import save_png, tradeoff_figure
from jedit.report.leaderboard import leaderboard_table
from jedit.report.page import page
from jedit.report.results import (
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
    best_quality,
    to_json,
)
from jedit.report.streams import (
    FIELDS,
    Stream,
    StreamLearner,
    StreamReport,
    StreamRun,
    stream_figure,
    stream_page,
    stream_sentence,
    stream_sheet,
    write_stream_report,
)
from jedit.report.table import comparison_table
from jedit.report.verdict import Outcome, Verdict, verdict
from jedit.report.writer import check_destination, write_report

__all__ = [
    "Answer",
    "Comparison",
    "Curve",
    "Domain",
    "Evaluation",
    "FIELDS",
    "Guess",
    "Method",
    "NumJudged",
    "Outcome",
    "Picture",
    "Point",
    "Run",
    "Stream",
    "StreamLearner",
    "StreamReport",
    "StreamRun",
    "Verdict",
    "best_point",
    "best_quality",
    "check_destination",
    "comparison_table",
    "domain_figure",
    "edit_page",
    "leaderboard_table",
    "page",
    "read_evaluation_log",
    "save_png",
    "stream_figure",
    "stream_page",
    "stream_sentence",
    "stream_sheet",
    "to_json",
    "tradeoff_figure",
    "verdict",
    "write_evaluation_log",
    "write_report",
    "write_stream_report",
]
