"""A question with answers to choose from, as notebook 10 asks them."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import ipywidgets


class _Quiz(ipywidgets.VBox):
    """A box that has a text for where no widget can be shown, as in a notebook read on GitHub."""

    text = ""

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        # As ipywidgets 8 makes it. ipywidgets 7 has no such method, and shows the box in another way, without the text.
        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        return {"text/plain": self.text, "application/vnd.jupyter.widget-view+json": view}


def quiz(question: str, answers: Mapping[str, str], right: int) -> ipywidgets.VBox:
    """Return a question with radio buttons, and below them what the answers say about the one that is chosen.

    Nothing is chosen at first. On the keyboard, Tab moves between the buttons and Space chooses. Where widgets
    are not shown, as on GitHub, the question and its answers are there as text.

    Args:
        question: shown above the buttons.
        answers: each answer with its feedback: what speaks for it or against it.
        right: the position of the right one.
    """
    if len(answers) < 2 or not 0 <= right < len(answers):
        raise ValueError(f"right={right} with {len(answers)} answers: give two or more, and the right one's position")
    correct = list(answers)[right]
    layout = ipywidgets.Layout(width="auto")
    buttons = ipywidgets.RadioButtons(options=list(answers), value=None, layout=layout)
    feedback = ipywidgets.HTML()

    def judge(change: Mapping[str, Any]) -> None:
        chosen = change["new"]
        if chosen is None:
            feedback.value = ""
            return
        verdict = "Right." if chosen == correct else "Not this one."
        feedback.value = f"<b>{verdict}</b> {html.escape(answers[chosen])}"

    buttons.observe(judge, names="value")
    box = _Quiz([ipywidgets.HTML(f"<b>{html.escape(question)}</b>"), buttons, feedback])
    box.text = "\n".join([question, *(f"( ) {answer}" for answer in answers)])
    return box
