"""Answers to a query, and how they are shown: data frames, JSON, CSV, a web page, a terminal table."""

from carv_attrib.report.html import render_html, write_html
from carv_attrib.report.result import GroupScore, Match, QueryResult
from carv_attrib.report.terminal import result_table

__all__ = ["GroupScore", "Match", "QueryResult", "render_html", "result_table", "write_html"]
