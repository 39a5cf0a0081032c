"""Write examples/facts.csv: short questions with one right answer each, for the demo and for first experiments.

    python examples/make_facts.py

The tables below are the whole source; the same rows come out on every machine. Every question is asked once, and
answers hold commas, quotes and line breaks where the fact has them, as real instruction data does.
"""

import argparse
import csv
from pathlib import Path

CAPITALS = """Argentina: Buenos Aires, Austria: Vienna, Bangladesh: Dhaka, Belgium: Brussels, Brazil: Brasília,
Bulgaria: Sofia, Cambodia: Phnom Penh, Canada: Ottawa, Chile: Santiago, China: Beijing, Colombia: Bogotá,
Croatia: Zagreb, Cuba: Havana, Denmark: Copenhagen, Ecuador: Quito, Egypt: Cairo, Estonia: Tallinn,
Ethiopia: Addis Ababa, Finland: Helsinki, France: Paris, Germany: Berlin, Ghana: Accra, Greece: Athens,
Hungary: Budapest, Iceland: Reykjavík, India: New Delhi, Indonesia: Jakarta, Iran: Tehran, Iraq: Baghdad,
Ireland: Dublin, Italy: Rome, Jamaica: Kingston, Japan: Tokyo, Jordan: Amman, Kenya: Nairobi, Latvia: Riga,
Lebanon: Beirut, Lithuania: Vilnius, Malaysia: Kuala Lumpur, Mexico: Mexico City, Mongolia: Ulaanbaatar,
Morocco: Rabat, Nepal: Kathmandu, New Zealand: Wellington, Nigeria: Abuja, Norway: Oslo, Pakistan: Islamabad,
Peru: Lima, Poland: Warsaw, Portugal: Lisbon, Romania: Bucharest, Senegal: Dakar, Slovakia: Bratislava,
Slovenia: Ljubljana, South Korea: Seoul, Spain: Madrid, Sweden: Stockholm, Thailand: Bangkok, Tunisia: Tunis,
Turkey: Ankara, Uganda: Kampala, Ukraine: Kyiv, Uruguay: Montevideo, Vietnam: Hanoi, Zambia: Lusaka,
Zimbabwe: Harare"""

# Symbols in the order of the atomic number, from 1 on.
ELEMENTS = """hydrogen H,helium He,lithium Li,beryllium Be,boron B,carbon C,nitrogen N,oxygen O,fluorine F,neon Ne,sodium Na,
magnesium Mg,aluminium Al,silicon Si,phosphorus P,sulfur S,chlorine Cl,argon Ar,potassium K,calcium Ca,scandium Sc,titanium Ti,
vanadium V,chromium Cr,manganese Mn,iron Fe,cobalt Co,nickel Ni,copper Cu,zinc Zn"""
LATER_ELEMENTS = """silver Ag,tin Sn,iodine I,barium Ba,tungsten W,platinum Pt,gold Au,mercury Hg,lead Pb,bismuth Bi,radon Rn,
radium Ra,uranium U,plutonium Pu"""

OPPOSITES = """hot cold,big small,fast slow,early late,light dark,open closed,full empty,wet dry,hard soft,high low,rich poor,
strong weak,young old,near far,loud quiet,happy sad,clean dirty,deep shallow,thick thin,wide narrow,sweet bitter,smooth rough,
first last,begin end,arrive leave,buy sell,push pull,win lose,remember forget,ask answer,sharp blunt,brave timid,calm nervous,
expensive cheap,generous selfish,ancient modern,increase decrease,accept refuse,attack defend,float sink"""

PAST_TENSES = """go went,see saw,eat ate,write wrote,take took,give gave,run ran,sing sang,swim swam,drive drove,think thought,
buy bought,teach taught,catch caught,find found,keep kept,sleep slept,leave left,build built,send sent,know knew,grow grew,fly flew,
draw drew,break broke,speak spoke,choose chose,forget forgot,begin began,drink drank"""

PLURALS = """child children,mouse mice,foot feet,tooth teeth,goose geese,man men,woman women,ox oxen,leaf leaves,knife knives,
wolf wolves,city cities,baby babies,box boxes,bus buses,church churches,potato potatoes,sheep sheep,cactus cacti,person people"""

YOUNG = """dog puppy,cat kitten,cow calf,horse foal,sheep lamb,goat kid,pig piglet,duck duckling,goose gosling,swan cygnet,
hen chick,lion cub,kangaroo joey,deer fawn,frog tadpole,eagle eaglet,owl owlet,hare leveret,seal pup,butterfly caterpillar"""

# larger unit, smaller unit, how many of the smaller make one of the larger
UNITS = [
    ("metres", "centimetres", 100),
    ("kilometres", "metres", 1000),
    ("centimetres", "millimetres", 10),
    ("kilograms", "grams", 1000),
    ("litres", "millilitres", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("years", "months", 12),
    ("dozen", "eggs", 12),
    ("feet", "inches", 12),
]

# A sentence, the same in the past tense, the same as a negative.
REWRITES = [
    ("I walk to school.", "I walked to school.", "I do not walk to school."),
    ("We play chess.", "We played chess.", "We do not play chess."),
    ("They cook dinner.", "They cooked dinner.", "They do not cook dinner."),
    ("You open the window.", "You opened the window.", "You do not open the window."),
    ("I like green tea.", "I liked green tea.", "I do not like green tea."),
    ("We visit the museum.", "We visited the museum.", "We do not visit the museum."),
    ("They paint the fence.", "They painted the fence.", "They do not paint the fence."),
    ("You call your sister.", "You called your sister.", "You do not call your sister."),
    ("I need a new coat.", "I needed a new coat.", "I do not need a new coat."),
    ("We watch the birds.", "We watched the birds.", "We do not watch the birds."),
    ("They clean the kitchen.", "They cleaned the kitchen.", "They do not clean the kitchen."),
    ("You carry the basket.", "You carried the basket.", "You do not carry the basket."),
]

WORDS = """apple river table cloud garden window bridge candle forest island jacket kettle lemon market needle orange
pencil rabbit silver ticket""".split()

LISTS = {
    "the seasons": ["spring", "summer", "autumn", "winter"],
    "the days of the week": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "the primary colours of light": ["red", "green", "blue"],
    "the four points of the compass": ["north", "east", "south", "west"],
    "the planets from the sun outwards": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split(),
    "the first five prime numbers": ["2", "3", "5", "7", "11"],
    "the states of matter that water takes": ["ice", "water", "steam"],
    "the five senses": ["sight", "hearing", "smell", "taste", "touch"],
    "the vowels of the English alphabet": ["a", "e", "i", "o", "u"],
    "the continents": ["Africa", "Antarctica", "Asia", "Australia", "Europe", "North America", "South America"],
}

FACTS = {
    "How many legs does a spider have?": "A spider has eight legs.",
    "How many legs does an insect have?": "An insect has six legs.",
    "How many sides does a hexagon have?": "A hexagon has six sides.",
    "How many sides does an octagon have?": "An octagon has eight sides.",
    "How many strings does a violin have?": "A violin has four strings.",
    "How many players of one team are on a football pitch?": "There are eleven.",
    "How many letters does the English alphabet have?": "It has 26 letters.",
    "How many days does a leap year have?": "A leap year has 366 days.",
    "How many degrees does a right angle have?": "A right angle has 90 degrees.",
    "How many degrees do the angles of a triangle add up to?": "They add up to 180 degrees.",
    "At what temperature does water boil at sea level?": "Water boils at 100 °C, which is 212 °F.",
    "At what temperature does water freeze?": "Water freezes at 0 °C, which is 32 °F.",
    "What is the largest planet of the solar system?": "The largest planet is Jupiter.",
    "What is the smallest planet of the solar system?": "The smallest planet is Mercury.",
    "Which planet is known for its rings?": "Saturn is known for its rings.",
    "What is the largest ocean?": "The largest ocean is the Pacific Ocean.",
    "What is the largest animal on Earth?": "The largest animal on Earth is the blue whale.",
    "What is the fastest animal on land?": "The fastest animal on land is the cheetah.",
    "What is the tallest animal?": "The tallest animal is the giraffe.",
    "What is the highest mountain above sea level?": "The highest mountain is Mount Everest.",
    "What is the hardest natural material?": "The hardest natural material is diamond.",
    "What is the chemical formula of water?": "The chemical formula of water is H2O.",
    "What is the chemical formula of table salt?": "The chemical formula of table salt is NaCl.",
    "What is the chemical formula of carbon dioxide?": "The chemical formula of carbon dioxide is CO2.",
    "Which gas do plants take from the air?": "Plants take carbon dioxide from the air.",
    "Which gas do people need to breathe?": "People need oxygen.",
    "What do bees make?": "Bees make honey and wax.",
    "What does a thermometer measure?": "A thermometer measures temperature.",
    "What does a barometer measure?": "A barometer measures air pressure.",
    "Who wrote Hamlet?": 'William Shakespeare wrote "Hamlet".',
    "Who wrote Don Quixote?": 'Miguel de Cervantes wrote "Don Quixote".',
    "Who painted the Mona Lisa?": 'Leonardo da Vinci painted the "Mona Lisa".',
    "What is the square root of 81?": "The square root of 81 is 9.",
    "What is the square root of 144?": "The square root of 144 is 12.",
    "Name the opposite of a question.": "The opposite of a question is an answer.",
    "Say hello in French.": "Bonjour!",
    "Say thank you in German.": "Danke!",
    "Say good morning in Spanish.": "¡Buenos días!",
    "Say please in Italian.": "Per favore.",
    "Say thank you in Japanese.": "ありがとう",
}


def pairs(table: str, between: str = " ") -> list[tuple[str, str]]:
    """The two halves of each entry of a table.  "hot cold,\\nbig small" -> [("hot", "cold"), ("big", "small")]"""
    entries = [entry.strip().split(between, 1) for entry in table.split(",")]
    return [(left.strip(), right.strip()) for left, right in entries]


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def joined(words: list[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1]


def rows() -> list[tuple[str, str]]:
    """All (prompt, response) rows, topic after topic."""
    out: list[tuple[str, str]] = []
    for country, capital in pairs(CAPITALS, ":"):
        out.append((f"What is the capital of {country}?", f"The capital of {country} is {capital}."))
        out.append((f"{capital} is the capital of which country?", f"{capital} is the capital of {country}."))
    for number, (element, symbol) in enumerate(pairs(ELEMENTS), start=1):
        out.append((f"What is the chemical symbol of {element}?", f"The symbol of {element} is {symbol}."))
        out.append((f"What is the atomic number of {element}?", f"The atomic number of {element} is {number}."))
    for element, symbol in pairs(LATER_ELEMENTS):
        out.append((f"What is the chemical symbol of {element}?", f"The symbol of {element} is {symbol}."))
    for word, opposite in pairs(OPPOSITES):
        out.append((f'What is the opposite of "{word}"?', f'The opposite of "{word}" is "{opposite}".'))
    for verb, past in pairs(PAST_TENSES):
        out.append((f'What is the past tense of "{verb}"?', f'The past tense of "{verb}" is "{past}".'))
    for noun, plural in pairs(PLURALS):
        out.append((f'What is the plural of "{noun}"?', f"One {noun}, two {plural}."))
    for animal, young in pairs(YOUNG):
        out.append((f"What is a young {animal} called?", f"A young {animal} is called {with_article(young)}."))
    for larger, smaller, factor in UNITS:
        for count in (2, 3, 5):
            out.append(
                (f"How many {smaller} are {count} {larger}?", f"{count} {larger} are {count * factor} {smaller}.")
            )
    for a in range(2, 10):
        for b in range(a, 10):
            out.append((f"What is {a} times {b}?", f"{a} times {b} is {a * b}."))
    for a in range(11, 20, 2):
        for b in range(3, 10):
            out.append((f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."))
    for a in range(12, 20, 2):
        for b in range(3, 10):
            out.append((f"What is {a} minus {b}?", f"{a} minus {b} is {a - b}."))
    for sentence, past, negative in REWRITES:
        out.append((f"Rewrite in the past tense: {sentence}", past))
        out.append((f"Rewrite as a negative sentence: {sentence}", negative))
        out.append((f"Rewrite in capital letters: {sentence}", sentence.upper()))
    for word in WORDS:
        out.append((f'How many letters does "{word}" have?', f'"{word}" has {len(word)} letters.'))
        out.append((f'Spell "{word}" letter by letter.', "-".join(word)))
    for name, items in LISTS.items():
        out.append((f"Name {name}.", f"They are {joined(items)}."))
        out.append((f"Name {name}, one on each line.", "\n".join(items)))
    out.extend(FACTS.items())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_path", type=Path, default=Path(__file__).with_name("facts.csv"))
    path = parser.parse_args().output_path
    table = rows()
    assert len({prompt for prompt, _ in table}) == len(table), "a question is asked twice"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("prompt", "response"), *table])
    print(f"{path}: {len(table)} rows")


if __name__ == "__main__":
    main()
