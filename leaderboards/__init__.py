"""Scores to boards: aggregation with paired uncertainty, CSV files, and one self-contained web page."""

from leaderboards import board, page
from leaderboards.board import Boards, build, summary, write

__all__ = ["Boards", "board", "build", "page", "summary", "write"]
