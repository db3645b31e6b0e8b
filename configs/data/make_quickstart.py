"""Writes the quickstart data set from `quickstart_facts.tsv`; the same bytes every time.

Run it as ``python configs/data/make_quickstart.py``. Each row asks for the record behind one
sentence; the answer is copied out of that sentence in a fixed order, so that the model learns a
format and not facts. Entities and sentence patterns of the held-out rows never occur in training.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
INSTRUCTION = "Extract the record."
SENTENCES_PER_ENTITY = 2


class Kind(NamedTuple):
    """One kind of record.

    Attributes:
      fields: the columns of the facts file, first the name of the entity.
      record: the fields that the answer gives, in its order; the others only distract.
      train: sentence patterns of the training rows.
      held_out: sentence patterns of the held-out rows.
    """

    fields: tuple[str, ...]
    record: tuple[str, ...]
    train: tuple[str, ...]
    held_out: tuple[str, ...]


KINDS = {
    "person": Kind(
        fields=("name", "role", "city", "born", "died"),
        record=("name", "role", "city", "born"),
        train=(
            "{name} was {a_role} born in {city} in {born}.",
            "Born in {born} in {city}, {name} became {a_role} and died in {died}.",
            "The {role} {name} ({born}-{died}) came from {city}.",
            "{city} is the birthplace of {name}, {a_role} who lived from {born} to {died}.",
            "In {born} the {role} {name} was born in {city}.",
            "{name}, {a_role} from {city}, was born in {born} and died in {died}.",
            "It was in {city}, in {born}, that the {role} {name} was born.",
            "When the {role} {name} died in {died}, {city} mourned a child of {born}.",
            "The death of {name}, {a_role}, in {died} was mourned in {city}, the birthplace in "
            "{born}.",
            "In {died} died {name}, who was born in {city} in {born} and worked as {a_role}.",
            "One child born in {city} in {born} was {name}, who grew up to be {a_role}.",
            "A plaque in {city} honours {name}, {a_role} born there in {born}.",
            "{died} was the last year of {name}, {a_role} who was born in {born} in {city}.",
            "People in {city} remember the {role} {name}, born there in {born}.",
            "Known as {a_role}, {name} was born in {city} in {born}.",
            "{name} died in {died}; the {role} had been born in {city} in {born}.",
        ),
        held_out=(
            "The year {died} saw the death of {name}, {a_role} born in {city} in {born}.",
            "Visitors to {city} learn that {name}, the {role}, was born there in {born}.",
            "Among the people born in {city} in {born} was {name}, later {a_role}.",
        ),
    ),
    "element": Kind(
        fields=("name", "symbol", "number", "period"),
        record=("name", "symbol", "number"),
        train=(
            "The element {name}, with symbol {symbol}, has atomic number {number}.",
            "Element {number} is {name}, written {symbol}, in period {period}.",
            "In the periodic table {symbol} stands for {name}, whose atomic number is {number}.",
            "An atom of {name} ({symbol}) has {number} protons.",
            "Period {period} holds {name}, symbol {symbol}, as element number {number}.",
            "With {number} protons in its nucleus, {name} is abbreviated {symbol}.",
            "Chemists write {symbol} for {name}, element {number} of the table.",
            "The symbol of {name} is {symbol}; it lies in period {period} and has {number} "
            "protons.",
            "The abbreviation {symbol} belongs to {name}, which has {number} protons.",
            "Counting to {number} in the periodic table brings one to {name}, or {symbol}.",
            "A sample of {name} is labelled {symbol}, and its atoms have {number} protons.",
            "{symbol} is the symbol of {name}, number {number} in the table.",
            "In period {period} stands {name}, number {number}, with the symbol {symbol}.",
            "Atoms with {number} protons are atoms of {name}, written {symbol}.",
        ),
        held_out=(
            "Number {number} in the table, {name} belongs to period {period} and goes by {symbol}.",
            "The letters {symbol} are short for {name}, whose nucleus holds {number} protons.",
            "A nucleus with {number} protons makes an atom of {name}, or {symbol} for short.",
        ),
    ),
    "country": Kind(
        fields=("country", "capital", "continent", "city"),
        record=("country", "capital", "continent"),
        train=(
            "{capital} is the capital of {country}, in {continent}.",
            "The government of {country} sits in {capital}, not in {city}; the country is in "
            "{continent}.",
            "{country} lies in {continent} and is governed from {capital}.",
            "In {continent}, {country} has {capital} as its capital, while {city} is another of "
            "its cities.",
            "A traveller in {country}, a country of {continent}, may see {city} and the capital, "
            "{capital}.",
            "Ambassadors to {country} live in {capital}, a capital in {continent}.",
            "{continent} includes {country}, whose capital is {capital}.",
            "Although {city} is a city too, the capital of {country} in {continent} is {capital}.",
            "{country}, in {continent}, has its capital at {capital}.",
            "Of the cities of {country} in {continent}, {capital} is the capital and {city} is "
            "not.",
            "A trip from {city} to {capital}, the capital, stays in {country} in {continent}.",
            "{capital} and {city} belong to {country} in {continent}; the capital is {capital}.",
            "{continent} is the continent of {country}, and {capital} is its capital.",
            "{capital}, not {city}, is the capital of {country}, a country in {continent}.",
        ),
        held_out=(
            "The seat of government of {country}, a state in {continent}, is {capital} rather "
            "than {city}.",
            "{country}, found in {continent}, chose {capital} as its capital.",
            "Both {capital} and {city} are cities of {country} in {continent}, but only {capital} "
            "is the capital.",
        ),
    ),
    "river": Kind(
        fields=("river", "city", "mouth"),
        record=("river", "city", "mouth"),
        train=(
            "The {river} flows through {city} and reaches the {mouth}.",
            "Past {city} the river {river} runs on to the {mouth}.",
            "At {city} a bridge crosses the {river}, which ends in the {mouth}.",
            "The {mouth} receives the {river}, the river of {city}.",
            "{city} lies on the {river}, a river that empties into the {mouth}.",
            "Boats on the {river} pass {city} before they come to the {mouth}.",
            "On its way to the {mouth} the {river} passes {city}.",
            "In {city} one can walk along the {river}, which flows into the {mouth}.",
            "The river {river} comes to {city} and later meets the {mouth}.",
            "From {city} the {river} goes on to the {mouth}.",
            "The {river} has {city} on its banks and the {mouth} at its end.",
            "Rain that falls on {city} reaches the {mouth} by way of the {river}.",
        ),
        held_out=(
            "The water of the {river} passes {city} and ends up in the {mouth}.",
            "In {city} the river {river} is still on its way to the {mouth}.",
        ),
    ),
}


def read_facts() -> list[tuple[str, dict[str, str]]]:
    """Returns the facts as (kind, field → text), in the order of the file."""
    facts = []
    for line in (HERE / "quickstart_facts.tsv").read_text(encoding="utf-8").splitlines():
        kind, *values = line.split("\t")
        facts.append((kind, dict(zip(KINDS[kind].fields, values, strict=True))))
    return facts


def row(kind: str, fact: dict[str, str], pattern: str) -> dict[str, list[dict[str, str]]]:
    """Returns the training example of one fact told in one sentence pattern."""
    role = fact.get("role", "")
    article = "an" if role[:1] in set("aeiou") else "a"
    sentence = pattern.format(**fact, a_role=f"{article} {role}")
    answer = " | ".join([kind, *(fact[field] for field in KINDS[kind].record)])
    return {
        "messages": [
            {"role": "user", "content": f"{INSTRUCTION}\n{sentence}"},
            {"role": "assistant", "content": answer},
        ]
    }


def build() -> dict[str, list[dict]]:
    """Returns the rows of both splits, by file name."""
    random_numbers = random.Random(0)
    facts = read_facts()
    random_numbers.shuffle(facts)
    rows: dict[str, list[dict]] = {"quickstart_train.jsonl": [], "quickstart_eval.jsonl": []}
    seen = dict.fromkeys(KINDS, 0)
    for kind, fact in facts:
        seen[kind] += 1
        held_out = seen[kind] % 9 in (0, 4)
        patterns = KINDS[kind].held_out if held_out else KINDS[kind].train
        name = "quickstart_eval.jsonl" if held_out else "quickstart_train.jsonl"
        for pattern in random_numbers.sample(patterns, SENTENCES_PER_ENTITY):
            rows[name].append(row(kind, fact, pattern))
    for split in rows.values():
        random_numbers.shuffle(split)
    return rows


def main(folder: Path = HERE) -> None:
    """Writes both splits into `folder`."""
    for name, split in build().items():
        lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in split]
        (folder / name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
