"""Stop strings are found wherever the text is cut, against a search over the whole text."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from semipd.tokenizer import StopMatcher

STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)
CHUNKS = st.lists(st.tuples(st.text("abc", max_size=5), st.booleans()), max_size=12)


def search(text: str, armed_from: list[bool], stop: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """The specification: go through the text character by character and stop at the first stop string."""
    for end in range(1, len(text) + 1):
        for string in stop:
            if armed_from[end - 1] and text[:end].endswith(string):
                return text[: end if include else end - len(string)], string
    return text, None


@given(stop=STOPS, chunks=CHUNKS, include=st.booleans())
@example(stop=("abab",), chunks=[("abab", False), ("ab", True)], include=False)
@example(stop=("abb", "b"), chunks=[("ab", False), ("b", True)], include=False)
def test_the_result_is_that_of_a_search_over_the_whole_text(
    stop: tuple[str, ...], chunks: list[tuple[str, bool]], include: bool
) -> None:
    text = "".join(chunk for chunk, _ in chunks)
    armed = [is_armed for chunk, is_armed in chunks for _ in chunk]
    matcher = StopMatcher(stop, include)
    shown, found = "", None
    for chunk, is_armed in chunks:
        part, found = matcher.push(chunk, armed=is_armed)
        shown += part
        assert text.startswith(shown)
        if found is not None:
            break
    else:
        shown += matcher.flush()
    assert (shown, found) == search(text, armed, stop, include)


@given(stop=STOPS, text=st.text("abc", max_size=12))
def test_only_the_beginning_of_a_stop_string_is_held_back(stop: tuple[str, ...], text: str) -> None:
    matcher = StopMatcher(stop)
    shown = ""
    for end in range(1, len(text) + 1):
        part, found = matcher.push(text[end - 1])
        if found is not None:
            return
        shown += part
        held = text[len(shown) : end]
        longest = max((n for s in stop for n in range(len(s)) if text[:end].endswith(s[:n])), default=0)
        assert len(held) == longest


def test_text_is_held_until_it_cannot_be_a_stop_string() -> None:
    matcher = StopMatcher(("</s>",))
    assert [matcher.push(part) for part in ("a<", "/", "b", "<", "/s>x")] == [
        ("a", None),
        ("", None),
        ("</b", None),
        ("", None),
        ("", "</s>"),
    ]


def test_nothing_is_held_when_the_stop_string_stays_in_the_text() -> None:
    matcher = StopMatcher(("</s>",), include_in_output=True)
    assert [matcher.push(part) for part in ("a<", "/s", ">x")] == [("a<", None), ("/s", None), (">", "</s>")]


def test_the_first_stop_string_to_be_complete_wins_and_then_the_first_listed() -> None:
    assert StopMatcher(("abcd", "bc")).push("abcd") == ("a", "bc")
    assert StopMatcher(("bc", "abc")).push("abc") == ("a", "bc")
    assert StopMatcher(("abc", "bc")).push("abc") == ("", "abc")


def test_a_stop_string_that_ends_before_it_is_armed_is_text() -> None:
    matcher = StopMatcher(("end",))
    assert matcher.push("the end", armed=False) == ("the end", None)
    assert matcher.push(" of the en", armed=False) == (" of the ", None)
    assert matcher.push("d.") == ("", "end")


def test_without_stop_strings_text_passes() -> None:
    matcher = StopMatcher(())
    assert matcher.push("text") == ("text", None)
    assert matcher.flush() == ""
