"""The text that the `tiny` base model is pretrained on: a small generated world, without the sample task in it.

A document is one of four kinds: sentences about homes, shops, trains, weather and libraries; the same kind of
sentences, each followed by a JSON record of its facts, in a schema that is drawn anew for every document; lists of
words that are repeated; dialogues with requests. Records and lists teach the model to copy from its context, which a
model of this size does not pick up from prose alone. What the text does not hold is the sample task: no request is
followed by a command, and no record about a home uses the task's keys (a test checks both).
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from helpers.data import DEVICES, ROOMS
from helpers.makers.sample_task import DIALS

HELD_OUT_SEED = 1_000_000
HELD_OUT = Path(__file__).parents[1] / "assets" / "learning_rate" / "held_out.jsonl"

NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Hugo",
    "Ida",
    "Jonas",
    "Kira",
    "Leo",
    "Mara",
    "Nina",
    "Oscar",
    "Paula",
]
GOODS = [
    "apples",
    "pears",
    "plums",
    "onions",
    "carrots",
    "eggs",
    "candles",
    "books",
    "pencils",
    "shirts",
    "ropes",
    "bottles",
    "lamps",
    "radios",
]
SHOPS = ["market", "bakery", "corner", "shop", "harbour", "store", "school", "office", "garage"]
CITIES = ["Lima", "Oslo", "Cairo", "Delhi", "Quito", "Turin", "Porto", "Accra", "Osaka", "Sofia", "Dublin", "Havana"]
WEATHER = ["sunny", "cloudy", "windy", "rainy", "foggy", "snowy"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
TOPICS = ["stars", "rivers", "birds", "bridges", "bread", "engines", "music", "maps", "gardens", "trains"]
FURNITURE = ["table", "chair", "sofa", "shelf", "carpet", "mirror", "bed", "desk"]
TASK_KEYS = ("device", "room", "action", "value")  # the sample task's keys: in records, but never about a home
KEYS = [
    "who",
    "what",
    "where",
    "when",
    "how",
    "item",
    "place",
    "time",
    "count",
    "kind",
    "name",
    "state",
    "part",
    "from",
    "to",
    "unit",
    "entry",
    "set",
    "on",
    "off",
]

Facts = list[str | int]


def documents(seed: int) -> Iterator[str]:
    """Yield the endless, reproducible stream of documents of one seed."""
    rng = random.Random(f"small world {seed}")
    kinds = (_records, _records, _records, _records, _prose, _lists, _lists, _dialogue)
    while True:
        yield rng.choice(kinds)(rng)


def _home(rng: random.Random) -> tuple[str, Facts]:
    device, room, day, name = rng.choice(DEVICES), rng.choice(ROOMS), rng.choice(DAYS), rng.choice(NAMES)
    if rng.random() < 0.15:
        device = rng.choice(FURNITURE)
    if device in DIALS and rng.random() < 0.5:
        unit, low, high, step = DIALS[device]
        value = rng.randrange(low, high + 1, step)
        sentence = rng.choice(
            (
                f"The {device} in the {room} is at {value} {unit}.",
                f"On {day} the {room} {device} was set to {value} {unit}.",
                f"There is a {device} in the {room}, at {value} {unit}.",
                f"{name} put the {room} {device} at {value} {unit}.",
                f"{room}: the {device} went to {value} {unit}.",
                f"It is {value} {unit} on the {device} of the {room}.",
                f"Over in the {room} {name} changed the {device} to {value} {unit}.",
            )
        )
        return _capital(sentence), [device, room, value]
    state = rng.choice(("on", "off"))
    sentence = rng.choice(
        (
            f"The {device} in the {room} is {state}.",
            f"On {day} the {room} {device} was {state}.",
            f"There is a {device} in the {room}, and it is {state}.",
            f"{name} turned {state} the {room} {device}.",
            f"{name} switched the {device} {state} in the {room}.",
            f"{room}: the {device} went {state}.",
            f"Over in the {room} the {device} is {state} now.",
        )
    )
    return _capital(sentence), [device, room, state]


def _shop(rng: random.Random) -> tuple[str, Facts]:
    name, count, item, shop = rng.choice(NAMES), rng.randrange(2, 60), rng.choice(GOODS), rng.choice(SHOPS)
    sentence = rng.choice(
        (
            f"{name} bought {count} {item} at the {shop}.",
            f"At the {shop} {name} sold {count} {item}.",
            f"{name} needs {count} {item} from the {shop}, please.",
            f"{count} {item} are waiting for {name} in the {shop}.",
        )
    )
    return sentence, [name, count, item, shop]


def _train(rng: random.Random) -> tuple[str, Facts]:
    start, end, hour, day = rng.choice(CITIES), rng.choice(CITIES), rng.randrange(1, 24), rng.choice(DAYS)
    sentence = rng.choice(
        (
            f"The train from {start} to {end} leaves at {hour} on {day}.",
            f"On {day} a train goes from {start} to {end} at {hour}.",
            f"{day}: {start} to {end}, at {hour}.",
            f"Could you take me from {start} to {end} on {day} at {hour}?",
        )
    )
    return sentence, [start, end, hour, day]


def _weather(rng: random.Random) -> tuple[str, Facts]:
    city, sky, degrees = rng.choice(CITIES), rng.choice(WEATHER), rng.randrange(1, 40)
    sentence = rng.choice(
        (
            f"It is {sky} in {city}, at {degrees} degrees.",
            f"{city}: {sky}, {degrees} degrees.",
            f"In {city} they have {degrees} degrees, and it should be {sky}.",
        )
    )
    return sentence, [city, sky, degrees]


def _library(rng: random.Random) -> tuple[str, Facts]:
    name, topic, pages = rng.choice(NAMES), rng.choice(TOPICS), rng.randrange(40, 400)
    sentence = rng.choice(
        (
            f"{name} would read a book on {topic} with {pages} pages.",
            f"The book about {topic} that {name} got has {pages} pages.",
            f"{name}: {pages} pages on {topic}, over and done.",
        )
    )
    return sentence, [name, topic, pages]


DOMAINS: tuple[Callable[[random.Random], tuple[str, Facts]], ...] = (_home, _home, _shop, _train, _weather, _library)


def _records(rng: random.Random) -> str:
    """Sentences of one domain, each with its record, in one schema drawn for this document."""
    domain = rng.choice(DOMAINS)
    # Facts of one domain come in a fixed order; the schema permutes them and names them.
    keys_of: dict[int, tuple[list[str], list[int]]] = {}
    pool = [*KEYS, *(TASK_KEYS if domain is not _home else ()), *rng.sample(TOPICS + FURNITURE, 4)]
    rng.shuffle(pool)
    marker = rng.choice(("", "", "Record:", "Note:", "Entry:", *(("JSON:",) if domain is not _home else ())))
    lines = []
    for _ in range(rng.randrange(1, 5)):
        sentence, facts = domain(rng)
        if len(facts) not in keys_of:
            order = list(range(len(facts)))
            rng.shuffle(order)
            keys_of[len(facts)] = (pool[: len(facts)], order)
        keys, order = keys_of[len(facts)]
        record = json.dumps({keys[i]: facts[i] for i in order}, separators=(",", ":"))
        lines.append(f"{sentence}\n{marker}{' ' if marker else ''}{record}")
    return "\n".join(lines)


def _prose(rng: random.Random) -> str:
    return " ".join(rng.choice(DOMAINS)(rng)[0] for _ in range(rng.randrange(2, 7)))


def _lists(rng: random.Random) -> str:
    """Random words, said twice or three times: what comes next can only be read off the context."""
    words = rng.choices((*DEVICES, *ROOMS, *NAMES, *GOODS, *CITIES, *TOPICS, *FURNITURE, *KEYS, *TASK_KEYS), k=8)
    words = [_capital(word) if rng.random() < 0.1 else word for word in words[: rng.randrange(2, 9)]]
    words = [str(rng.randrange(1, 300)) if rng.random() < 0.15 else word for word in words]
    as_text, as_json = " ".join(words), json.dumps(words, separators=(",", ":"))
    if rng.random() < 0.3:
        as_json = json.dumps([word.lower() for word in words], separators=(",", ":"))
    return "\n".join(rng.choice((as_text, as_json)) for _ in range(rng.randrange(2, 4)))


def _dialogue(rng: random.Random) -> str:
    """A request, and a sentence that says what came of it; never a command."""
    device, room, state = rng.choice(DEVICES), rng.choice(ROOMS), rng.choice(("on", "off"))
    one, two = rng.sample(NAMES, 2)
    request = rng.choice(
        (
            f"please turn {state} the {device}",
            f"could you switch {state} the {device} over there for me",
            f"can you get the {device} switched {state}",
            f"would you turn the {device} {state}",
            f"I want the {device} {state}",
            f"the {device} should be {state}",
            f"turn the {device} {state}, please",
            f"switch it {state} for me",
            f"get me the {device}, please",
            f"change the {device} to {rng.randrange(10, 90)} percent, please",
            f"set the {device} at {rng.randrange(10, 90)} percent",
            f"put the {device} to {rng.randrange(10, 90)} percent",
            f"make sure that the {device} is {state}",
            f"I would like to have the {device} {state}",
            f"can we have the {device} {state}",
            f"we should change the {device}, please",
        )
    )
    reply = rng.choice(
        (
            f"Now the {device} in the {room} is {state}.",
            f"Then {two} turned {state} the {room} {device}.",
            f"{two} went to the {room} and switched the {device} {state}.",
        )
    )
    return f'"{_capital(request)}," said {one} in the {room}. {reply}'


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def main() -> None:
    """Write the 100 held-out documents that `helpers.labs.learning_rate` scores."""
    lines = [json.dumps(text) + "\n" for text in itertools.islice(documents(HELD_OUT_SEED), 100)]
    HELD_OUT.write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
