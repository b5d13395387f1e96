"""Progress bars: drawn for a terminal only, one a thing, gone when complete."""

from __future__ import annotations

import io

from specattn.cli.progress import Bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_for_each_thing_with_its_total() -> None:
    screen = Terminal()
    with Bars({"target": 100, "draft": 50}.get, file=screen) as bars:
        bars("target", 40)
        bars("draft", 10)
        assert {name: (bar.n, bar.total) for name, bar in bars._bars.items()} == {
            "target": (40, 100),
            "draft": (10, 50),
        }
    assert "target:" in screen.getvalue() and "/100 [" in screen.getvalue()


def test_a_complete_bar_goes_and_may_come_again() -> None:
    with Bars(lambda what: 10, file=Terminal()) as bars:
        bars("rows", 6)
        bars("rows", 4)
        assert not bars._bars
        bars("rows", 3)
        assert bars._bars["rows"].n == 3


def test_a_total_that_nobody_knows() -> None:
    screen = Terminal()
    with Bars(lambda what: None, file=screen) as bars:
        bars("mixture", 1)
        bars("mixture", 1)
        assert bars._bars["mixture"].n == 2
    assert "mixture" in screen.getvalue()


def test_nothing_is_drawn_for_a_file() -> None:
    file = io.StringIO()
    with Bars(lambda what: 10, file=file) as bars:
        bars("rows", 6)
    assert file.getvalue() == ""


def test_bars_are_closed_after_an_error() -> None:
    bars = Bars(lambda what: 10, file=Terminal())
    try:
        with bars:
            bars("rows", 6)
            (bar,) = bars._bars.values()
            raise RuntimeError
    except RuntimeError:
        pass
    assert bar.disable and not bars._bars  # a closed bar is a disabled one
