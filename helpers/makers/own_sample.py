"""The sample of notebook 12: support mails, each with the ticket that somebody wrote for it, and blemishes.

`python -m helpers.makers.own_sample` writes `helpers/assets/own_data/tickets.jsonl` again. The mails are made from
templates with a seed. On top come the blemishes of files that people have put together by hand, which the notebook
finds: repeated rows, rows that were copied and retyped, a mail that two people labelled differently, a stray space, and
two mails that drag a whole correspondence along.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

TICKETS = Path(__file__).parents[1] / "assets" / "own_data" / "tickets.jsonl"
SEED = 20260112
MAILS = 200
PRODUCTS = (
    "kettle", "toaster", "blender", "vacuum", "coffee grinder", "desk lamp", "rice cooker", "hair dryer", "headphones",
    "bread maker", "air fryer", "keyboard",
)  # fmt: skip
# {p} product, {o} the mention of an order number, or nothing.
COMPLAINTS = {
    "refund": (
        "I sent the {p} back two weeks ago{o} and have not got my money yet.",
        "When will I be paid back for the {p}{o}?",
        "I returned the {p}{o}. Please refund me.",
        "Still waiting for my money for the {p} I gave back{o}.",
        "The {p} went back to you{o}, so where is my refund?",
    ),
    "delivery": (
        "My {p} has not arrived{o}.",
        "Where is the {p} I bought{o}?",
        "I have been waiting ten days for the {p}{o}.",
        "The tracking page has not changed since Monday, and there is no {p}{o}.",
        "Has my {p} been shipped{o}?",
    ),
    "damage": (
        "The {p} came with a crack in it{o}.",
        "I unpacked the {p}{o} and it does not turn on.",
        "My new {p} is broken{o}.",
        "The {p} stopped working after one day{o}.",
        "One part of the {p} was smashed when the parcel came{o}.",
    ),
    "exchange": (
        "You sent me a {p}, but in the wrong colour{o}. Can I swap it?",
        "I would like to exchange the {p} for a bigger one{o}.",
        "The {p} is the wrong model{o}, please send me the right one.",
        "Can I trade the {p} for another colour{o}?",
        "This is not the {p} I asked for{o}. I want a different one.",
    ),
    "invoice": (
        "I need an invoice for the {p}{o}.",
        "The bill for the {p} has the wrong address{o}.",
        "Could you send the receipt for the {p} again{o}?",
        "There is no VAT number on my invoice for the {p}{o}.",
        "Please correct the bill for my {p}{o}.",
    ),
    "cancel": (
        "I do not want the {p} any more{o}.",
        "Please cancel the {p}{o}.",
        "Stop the shipment of the {p}{o}, I changed my mind.",
        "I ordered a {p} by mistake{o}, please call it off.",
        "Can you still take the {p} out of my order{o}?",
    ),
}
MENTIONS = (" (order {n})", ", order number {n}", ", order {n}", " (#{n})", ", no. {n}", "", "")
GREETINGS = ("Hello,", "Hi,", "Hi there,", "Dear team,", "Good morning,", "Hey,", "", "")
URGENT = (
    "It is urgent.", "I need an answer today.", "Please be quick, it is a gift for tomorrow.", "As soon as possible!",
)  # fmt: skip
CALM = ("Thank you.", "No hurry.", "Take your time.", "Thanks in advance.", "", "", "", "")
NAMES = ("Ana", "Ben", "Chloe", "Dev", "Emre", "Fatima", "Grace", "Hugo", "Ines", "Jon", "K. Lee", "M. Novak", "", "")


def sample_rows() -> list[dict[str, str]]:
    """Return the rows of the sample, with the string keys `prompt` and `completion`: the same on every machine.

    A completion is a space and "topic | product | order number or none | urgent or normal".
    """
    rng = random.Random(SEED)
    rows: list[dict[str, str]] = []
    seen = set()
    while len(rows) < MAILS:
        row = _mail(rng)
        if row["prompt"].casefold() not in seen:
            seen.add(row["prompt"].casefold())
            rows.append(row)
    picked = rng.sample(range(MAILS), 19)
    repeated, retyped, twice, stray, long = picked[:6], picked[6:14], picked[14:16], picked[16:17], picked[17:]
    added = [dict(rows[i]) for i in repeated]
    added += [{**rows[i], "prompt": _retyped(rows[i]["prompt"], n)} for n, i in enumerate(retyped)]
    added += [{**rows[i], "completion": _other_priority(rows[i]["completion"])} for i in twice]
    for i in stray:
        rows[i]["prompt"] += " "
    for i in long:
        rows[i]["prompt"] = _with_correspondence(rng, rows[i]["prompt"])
    for row in added:  # anywhere in the file, as if typed in at another time
        rows.insert(rng.randrange(len(rows)), row)
    return rows


def _mail(rng: random.Random) -> dict[str, str]:
    topic, product = rng.choice(list(COMPLAINTS)), rng.choice(PRODUCTS)
    number = str(rng.randrange(10_000, 100_000))
    mention = rng.choice(MENTIONS)
    complaint = rng.choice(COMPLAINTS[topic]).format(p=product, o=mention.format(n=number))
    urgent = rng.random() < 0.4
    words = [rng.choice(GREETINGS), complaint, rng.choice(URGENT if urgent else CALM), rng.choice(NAMES)]
    text = " ".join(word for word in words if word)
    if rng.random() < 0.2:
        text = text.lower()
    ticket = " | ".join([topic, product, number if mention else "none", "urgent" if urgent else "normal"])
    return {"prompt": f"{text}\nTicket:", "completion": f" {ticket}"}


def _retyped(prompt: str, number: int) -> str:
    """The same mail with other capitals, punctuation or white space."""
    text, cue = prompt.rsplit("\n", 1)
    changes = (
        text.upper(),
        text.replace(" ", "  ", 2),
        text.rstrip(".!?") + "!!",
        text.replace(",", "").lower() + " :)",
    )
    return f"{changes[number % len(changes)]}\n{cue}"


def _other_priority(completion: str) -> str:
    head, priority = completion.rsplit(" ", 1)
    return f"{head} {'normal' if priority == 'urgent' else 'urgent'}"


def _with_correspondence(rng: random.Random, prompt: str) -> str:
    """The mail, and below it the ones that it answers."""
    text, cue = prompt.rsplit("\n", 1)
    quoted = [f"> {_mail(rng)['prompt'].rsplit(chr(10), 1)[0]}" for _ in range(16)]
    return "\n".join([text, *quoted, cue])


def write_sample(path: Path = TICKETS) -> None:
    """Write the sample as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sample_rows())
    path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write_sample()
