"""helpers.widgets: sliders redraw their figure and sentence, a quiz answers, and both print nothing."""

from helpers.labs.quiz import quiz
from helpers.widgets import explore

import ipywidgets
import matplotlib.pyplot as plt
import pytest

VALUES = {"height": [1, 2, 3], "width": [0.5, 1.0]}


def test_sliders_redraw_the_figure_and_the_sentence(capsys):
    calls = []

    def draw(ax, height, width):
        calls.append((height, width))
        ax.bar(["a"], [height], width=width)
        ax.set_ylim(0, 4)
        return f"{height} < {width}"

    box = explore(draw, VALUES, start={"height": 2, "width": 1.0}, labels={"height": "the height"})
    first, second, image, sentence = box.children
    assert isinstance(box, ipywidgets.VBox)
    assert [slider.description for slider in (first, second)] == ["the height", "width"]
    assert calls == [(2, 1.0)]
    assert sentence.value == "2 &lt; 1.0"
    before = bytes(image.value)
    assert before.startswith(b"\x89PNG")

    first.value = 3
    assert calls[-1] == (3, 1.0)
    assert sentence.value == "3 &lt; 1.0"
    assert bytes(image.value) != before
    second.value = 0.5
    assert calls[-1] == (3, 0.5)
    assert len(calls) == 3
    first.value, second.value = 2, 1.0
    assert bytes(image.value) == before
    assert plt.get_fignums() == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"height": 2}, "start names height, and values height, width"),
        ({"height": 2, "depth": 1}, "start names height, depth"),
        ({"height": 4, "width": 1.0}, "height=4 is not one of its values, 1, 2, 3"),
    ],
)
def test_a_wrong_start_raises(start, message):
    with pytest.raises(ValueError, match=message):
        explore(lambda ax, height, width: "", VALUES, start=start)


def test_a_quiz_says_why_and_prints_nothing(capsys):
    answers = {"too high": "Then it would jump.", "a < b": "Yes: a < b.", "frozen": "Then it would not fall."}
    box = quiz("What is <wrong>?", answers, right=1)
    question, buttons, feedback = box.children
    assert question.value == "<b>What is &lt;wrong&gt;?</b>"
    assert isinstance(buttons, ipywidgets.RadioButtons)
    assert list(buttons.options) == list(answers)
    assert buttons.value is None
    assert feedback.value == ""
    buttons.value = "frozen"
    assert feedback.value == "<b>Not this one.</b> Then it would not fall."
    buttons.index = 1  # as a click or the keyboard does
    assert feedback.value == "<b>Right.</b> Yes: a &lt; b."
    buttons.value = None
    assert feedback.value == ""
    bundle = box._repr_mimebundle_()
    assert bundle["text/plain"] == "What is <wrong>?\n( ) too high\n( ) a < b\n( ) frozen"
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == box.model_id
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("answers", "right"), [({"a": ""}, 0), ({"a": "", "b": ""}, 2), ({"a": "", "b": ""}, -1)])
def test_a_quiz_without_a_right_answer_raises(answers, right):
    with pytest.raises(ValueError, match=f"right={right} with {len(answers)} answers"):
        quiz("?", answers, right)
