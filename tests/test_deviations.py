"""The faults of Quantus that the documents describe are there: an example that fails means that one is mended."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs/quantus-deviations.md").read_text()
TITLED = re.findall(r"^### (.*?)\n(?:(?!^#).)*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
COMMON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("title", "example"), TITLED, ids=[title for title, _ in TITLED])
def test_the_fault_is_still_there(title: str, example: str) -> None:
    assert "assert" in example, f"{title} pins nothing"
    names: dict = {}
    exec(COMMON, names)
    exec(example, names)


def test_every_section_has_an_example_and_says_what_we_do() -> None:
    sections = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]
    assert len(sections) == len(TITLED) == PAGE.count("```python") - 1
    assert [section.partition("\n")[0] for section in sections if "**Here**" not in section] == []
