# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
r"""
# A1. The tiny world

By the end of this appendix we have shown that a few tables and a random number generator can
write tens of millions of tokens of plain English that never contradict themselves, and exams
about them whose questions occur nowhere in the text.

Everything that this book trains offline is trained on this world. Here it speaks:
"""

# %%
from nanochat.tinyworld import World as FinishedWorld, conversation as finished_conversation
from nanochat.tinyworld import document as finished_document, exam as finished_exam

vale = FinishedWorld(seed=0)
print(finished_document(vale, 100), end="\n\n")
for message in finished_conversation(vale, 3)["messages"]:
    print(f"{message['role']}: {message['content']}")
print(finished_exam(vale, "cloze", n=1)[0])

# %% [markdown]
r"""
A story, a question with its answer, and an exam item. All three agree on who lives where.

**You will be able to**

- say what makes text useful for training a very small model, and measure it;
- build sentences from facts and templates so that no two documents contradict each other;
- read any document by its number, without writing the ones before it;
- split wordings, sums and words by hash, and prove that no exam question leaked into training.

**Prerequisites:** Python. **Reading:** 25 minutes. **Running:** about ten seconds on one CPU core,
no GPU, no network.
"""

# %% tags=["parameters"]
profile = "quick"
n_documents = 6000  # documents read in the measurements
seed = 0

# %%
import textwrap
from collections import Counter

import matplotlib.pyplot as plt

from nanochat.common import COLORS, figure

# %% [markdown]
r"""
## Why not simply random sentences?

A model of a few million weights cannot learn the world from three million tokens of the web. It
can learn a small world. Let us first write text in the most naive way: a grammar with blanks, and
a random word in each blank.
"""

# %%
import random

rng = random.Random(seed)
for _ in range(4):
    village = rng.choice(["Alderby", "Brookham", "Dunmere", "Foxley"])
    job = rng.choice(["baker", "tailor", "doctor", "fisher"])
    print(f"Mira lives in {village}. She is a {job}.")

# %% [markdown]
r"""
The English is fine, and yet nothing can be learned here except the grammar: Mira lives
everywhere. Such text has no *facts*. We cannot ask a question about it that has an answer. So we
go the other way round and begin with the facts. A **world** is a set of atomic facts, each a
subject, a relation and an object: (Mira, home, Dunmere). A document may word the facts as it
likes, but it never invents one.

Five properties make such a world useful, and each is checked below:

1. **Closed vocabulary.** About a thousand words, so that a vocabulary of 2,048 tokens holds
   nearly every word whole.
2. **Consistency.** A fact is true in every document.
3. **Many wordings.** The model must learn the fact, not the sentence.
4. **Variety.** Text that repeats is memorised and teaches little.
5. **Held-out questions.** The exam asks about facts that were taught, in words that were not.

We start with tables of names. Every name is one word and means one thing.
"""

# %%
#| default_exp tinyworld

# %%
#| export
import hashlib
import random
import re
import zlib
from dataclasses import dataclass, field
from functools import lru_cache

# %%
#| export
WOMEN = (
    "Mira Anna Elsa Greta Hilda Ida Jana Karin Lena Nora "
    "Olga Petra Rosa Sonja Tilda Ulla Vera Wanda Yara Zoe"
)
MEN = (
    "Adam Boris Carl David Emil Felix Gustav Hugo Ivan Jonas "
    "Kurt Leo Martin Nils Oscar Paul Ruben Simon Tom Victor"
)
PET_NAMES = (
    "Button Pepper Biscuit Ginger Patch Whiskers Snowball Muffin Pebble Socks "
    "Bramble Pip Tuffy Bubbles Cocoa Daisy Fluffy Giggles Hopper Inky "
    "Jasper Kiwi Lucky Mango Nibbles Otto Pickle Quill Rusty Shadow "
    "Tango Velvet Wiggles Ziggy Acorn Bandit Comet Dusty Echo Flash"
)
PETS = "cat dog goat hen duck rabbit parrot turtle mouse pony"
FOODS = (
    "soup cheese honey pancakes cherries noodles rice plums porridge beans "
    "pears carrots mushrooms dumplings"
)
COLOURS = "red blue green yellow purple orange white black pink silver"
MONTHS = "January February March April May June July August September October November December"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
)

# %% [markdown]
r"""
Eight villages, five wild places, and what a village is proud of:
"""

# %%
#| export
VILLAGES = "Alderby Brookham Cloverton Dunmere Elmstead Foxley Greenford Hartwick"
WILDS = {  # name: (kind, preposition)
    "Oldwood": ("forest", "in"),
    "Ravenhill": ("hill", "on"),
    "Glasswater": ("lake", "at"),
    "Windmoor": ("moor", "on"),
    "Shellbay": ("bay", "at"),
}
RIVER = "Silla"
LANDMARKS = "bridge windmill fountain maze tower statue castle gate"
FESTIVALS = "kite lantern apple boat flower song bell snow"
COMPASS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}

# %% [markdown]
r"""
Some knowledge holds in any world: bakers bake, otters eat fish, a table costs more than a bun.
The next three tables hold it, together with the choices that a seed may make: an owl may live in
the forest or on the hill, a jug may cost four to seven coins.
"""

# %%
#| export
JOBS = {  # job: (place of work, what it does)
    "baker": ("bakery", "bakes bread"),
    "miller": ("mill", "grinds corn"),
    "fisher": ("boat", "catches fish"),
    "farmer": ("field", "grows vegetables"),
    "teacher": ("school", "teaches children"),
    "doctor": ("hospital", "helps sick people"),
    "carpenter": ("workshop", "builds chairs"),
    "potter": ("shed", "shapes clay"),
    "weaver": ("loft", "weaves cloth"),
    "tailor": ("shop", "sews clothes"),
    "gardener": ("garden", "plants flowers"),
    "shepherd": ("meadow", "guards sheep"),
    "beekeeper": ("orchard", "keeps bees"),
    "smith": ("forge", "hammers iron"),
    "cook": ("kitchen", "cooks meals"),
    "painter": ("studio", "paints pictures"),
    "shoemaker": ("basement", "mends shoes"),
    "clockmaker": ("attic", "repairs clocks"),
    "librarian": ("library", "lends books"),
    "candlemaker": ("cellar", "melts wax"),
}

# %%
#| export
ANIMALS = {  # animal: (homes it may have, foods it may eat, colours it may have)
    "otter": ("Glasswater", "fish", "brown"),
    "fox": ("Oldwood Ravenhill", "mice", "red"),
    "owl": ("Oldwood Ravenhill", "mice", "white grey brown"),
    "hedgehog": ("Oldwood Windmoor", "insects worms", "brown"),
    "badger": ("Oldwood Ravenhill", "worms roots", "grey black"),
    "heron": ("Glasswater Shellbay", "fish frogs", "grey white"),
    "frog": ("Glasswater Windmoor", "insects", "green"),
    "squirrel": ("Oldwood", "nuts seeds", "red grey"),
    "hare": ("Windmoor Ravenhill", "grass leaves", "brown grey"),
    "swan": ("Glasswater Shellbay", "grass seeds", "white black"),
    "raven": ("Ravenhill", "worms seeds", "black"),
    "seal": ("Shellbay", "fish", "grey black"),
    "crab": ("Shellbay", "snails", "red green"),
    "mole": ("Windmoor", "worms insects", "black"),
    "bear": ("Oldwood Ravenhill", "berries nuts roots", "brown black"),
    "gull": ("Shellbay", "fish snails", "white grey"),
}

# %%
#| export
GOODS = {  # thing: (who sells it, lowest price, highest price)
    "loaf": ("baker", 2, 4), "bun": ("baker", 2, 3), "cake": ("baker", 5, 8),
    "pie": ("cook", 4, 7), "net": ("fisher", 6, 9), "pumpkin": ("farmer", 3, 5),
    "onion": ("farmer", 2, 3), "apple": ("farmer", 2, 3), "chair": ("carpenter", 8, 11),
    "table": ("carpenter", 12, 15), "ladder": ("carpenter", 8, 12), "bowl": ("potter", 3, 6),
    "jug": ("potter", 4, 7), "blanket": ("weaver", 7, 11), "rug": ("weaver", 9, 13),
    "coat": ("tailor", 11, 15), "shirt": ("tailor", 6, 10), "rose": ("gardener", 2, 4),
    "tulip": ("gardener", 2, 4), "candle": ("candlemaker", 2, 5),
    "lantern": ("candlemaker", 6, 10), "belt": ("shoemaker", 5, 8), "bag": ("shoemaker", 6, 9),
    "clock": ("clockmaker", 12, 15), "picture": ("painter", 10, 14), "bell": ("smith", 5, 9),
    "kettle": ("smith", 7, 10),
}  # fmt: skip

# %% [markdown]
r"""
## Many wordings for one fact

Now the wordings: for every relation about ten statements and eight questions. The bar separates
them. `{o}` is the object; `{He}`, `{his}`, `{him}` become the name or the pronoun. A template
with `{n}` always names its subject. The first wording of each relation is the plainest.
"""

# %%
#| export
PERSON_STATEMENTS = {
    "job": """{He} is a {o}. | {He} works as a {o}. | By trade, {he} is a {o}. | {He} earns {ps}
        living as a {o}. | People know {him} as a good {o}. | {He} became a {o} many years ago. |
        {He} is proud to be a {o}. | {He} is a busy {o}. | The trade that {he} learned is that of
        a {o}. | If you ask {him}, {p} is glad to be a {o}.""",
    "home": """{He} lives in {o}. | {His} home is in {o}. | {He} has a small house in {o}. | You
        can find {his} house in {o}. | {He} makes {ps} home in {o}. | {He} has lived in {o} for
        many years. | The village where {he} lives is {o}. | {His} home village is {o}. | If you
        want to visit {him}, go to {o}. | {o} is the home of {n}. | {He} has {ps} house in the
        village of {o}.""",
    "pet": """{He} has a {o}. | {He} keeps a {o}. | {His} pet is a {o}. | {He} owns a {o}. | The
        animal that lives with {him} is a {o}. | {He} takes good care of {ps} {o}. | At home {he}
        keeps a {o}. | {He} shares {ps} home with a {o}. | {He} loves {ps} {o}. | Of all animals,
        {he} chose to keep a {o}. | The pet that {he} keeps is a {o}.""",
    "pet_name": """{His} pet is called {o}. | {His} {k} is called {o}. | {He} named {ps} {k} {o}.
        | The name of {his} pet is {o}. | {He} calls {ps} pet {o}. | {He} gave {ps} {k} the name
        {o}. | {His} {k} answers to the name {o}. | {o} is the name of {his} {k}. | The {k} that
        belongs to {him} is called {o}. | The name that {he} chose for {ps} {k} is {o}.""",
    "food": """{His} favourite food is {o}. | {He} likes nothing better than {o}. | {He} loves to
        eat {o}. | For supper {he} always wants {o}. | The food {he} likes best is {o}. | {He} is
        always happy with some {o}. | If you cook for {him}, make {o}. | {He} could eat {o} every
        day. | More than any other food {he} loves {o}. | Nothing tastes better to {him} than
        {o}.""",
    "colour": """{His} favourite colour is {o}. | {He} likes the colour {o} best. | The colour
        {he} likes best is {o}. | Of all colours {he} loves {o}. | {He} thinks that the best
        colour is {o}. | If {he} can choose a colour, {p} takes {o}. | When it comes to colours,
        {he} likes {o}. | No colour pleases {him} more than {o}. | {He} is fond of the colour
        {o}. | The colour that pleases {him} most is {o}.""",
    "month": """{His} birthday is in {o}. | {He} was born in {o}. | {He} has {ps} birthday in
        {o}. | {He} gets a birthday cake in {o}. | The month of {his} birthday is {o}. | {He}
        turns a year older in {o}. | {His} birthday comes in {o}. | Every year {he} has a
        birthday party in {o}. | Friends bring {him} birthday presents in {o}. | The month in
        which {he} was born is {o}.""",
    "friend": """{His} best friend is {o}. | {He} is the best friend of {o}. | {He} tells all
        {ps} secrets to {o}. | {He} and {o} are best friends. | Nobody is closer to {him} than
        {o}. | The person {he} likes best is {o}. | {He} calls {o} {ps} best friend. | The best
        friend of {n} is {o}. | The friend {he} trusts most is {o}. | When {he} needs help, {p}
        asks {ps} best friend {o}.""",
}

# %% [markdown]
r"""
Questions follow the same rules. "What does {he} call {ps} {k}?" asks for a pet's name; `{k}` is
the kind of pet.
"""

# %%
#| export
PERSON_QUESTIONS = {
    "job": """What is {his} job? | What work does {he} do? | What does {he} do for a living? |
        How does {he} earn {ps} living? | What job does {he} have? | What is {his} trade? | What
        kind of work does {he} do? | What does {he} work as? | Which trade did {he} learn?""",
    "home": """Where does {he} live? | In which village does {he} live? | Which village is the
        home of {n}? | Where is {his} house? | Where is {his} home? | What is {his} home village?
        | Where does {he} make {ps} home? | Which village does {he} live in? | Where can I visit
        {him}?""",
    "pet": """What pet does {he} have? | What kind of pet does {he} keep? | Which animal does
        {he} keep? | What animal lives with {him}? | What is {his} pet? | What sort of animal is
        {his} pet? | Which pet belongs to {n}? | What pet does {he} own? | Which kind of animal
        does {he} have as a pet?""",
    "pet_name": """What is the name of {his} pet? | What is {his} pet called? | What did {he}
        name {ps} pet? | What does {he} call {ps} {k}? | What name did {he} give to {ps} pet? |
        What name does {his} {k} have? | What is {his} {k} called? | What is the name of {his}
        {k}? | What does {he} call {ps} pet?""",
    "food": """What is {his} favourite food? | What does {he} like to eat best? | Which food does
        {he} like most? | What food does {he} love? | What does {he} love to eat? | What could
        {he} eat every day? | What should I cook for {him}? | Which food is the favourite of {n}?
        | What does {he} want for supper?""",
    "colour": """What is {his} favourite colour? | Which colour does {he} like best? | What
        colour does {he} love? | Which colour would {he} choose? | What colour pleases {him}
        most? | Of all colours, which one does {he} like best? | Which colour is the favourite of
        {n}? | What colour is {he} fond of?""",
    "month": """When is {his} birthday? | In which month is {his} birthday? | In what month was
        {he} born? | When was {he} born? | When does {he} have {ps} birthday? | Which month is
        the birthday month of {n}? | What is the month of {his} birthday? | In which month does
        {he} turn a year older? | When does {he} get a birthday cake?""",
    "friend": """Who is {his} best friend? | Who is the best friend of {n}? | Who does {he} call
        {ps} best friend? | Which person is {his} best friend? | Who is closest to {him}? | Who
        does {he} tell {ps} secrets to? | Who is {he} best friends with? | Which friend does {he}
        like best? | Who does {he} trust most?""",
}

# %% [markdown]
r"""
Places have a market day, a sight, a feast, neighbours in four directions, and roads.
"""

# %%
#| export
PLACE_STATEMENTS = {
    "market": """The market in {n} is on {o}. | {n} has its market on {o}. | Market day in {n} is
        {o}. | People come to the market of {n} on {o}. | The stalls in {n} open on {o}. | In {n}
        the market is held every {o}. | If you want to shop in {n}, go there on {o}. | The day of
        the market in {n} is {o}. | The square of {n} is full of stalls every {o}.""",
    "landmark": """{n} is known for its {o}. | People visit {n} to see its {o}. | The pride of
        {n} is its {o}. | The best thing to see in {n} is the {o}. | Travellers come to {n} for
        the {o}. | When you visit {n}, do not miss the {o}. | Pictures of {n} always show the
        {o}. | {n} has a famous {o}. | Children in {n} like to play near the {o}.""",
    "festival": """Every year {n} holds the {o}. | The great feast of {n} is the {o}. | In {n}
        everybody looks forward to the {o}. | Guests come to {n} for the {o}. | The people of {n}
        celebrate the {o}. | Once a year {n} invites everyone to the {o}. | The festival of {n}
        is the {o}. | The whole of {n} helps to prepare the {o}. | No feast in {n} is as merry as
        the {o}.""",
    "direction": """{D} of {n} lies {o}. | If you walk {d} from {n}, you come to {o}. | The road
        {d} from {n} leads to {o}. | Go {d} from {n} and you reach {o}. | The place to the {d} of
        {n} is {o}. | In the {d}, the neighbour of {n} is {o}. | {o} lies {d} of {n}. | A
        traveller who goes {d} from {n} arrives at {o}. | Just {d} of {n} you find {o}.""",
    "road": """The road from {x} to {y} is {o} long. | It is {o} from {x} to {y}. | From {x} to
        {y} it is {o}. | The way from {x} to {y} is {o}. | Between {x} and {y} there are {o}. |
        If you walk from {x} to {y}, you walk {o}. | The length of the road from {x} to {y} is
        {o}. | The distance from {x} to {y} is {o}. | {x} and {y} are {o} apart.""",
}

# %%
#| export
PLACE_QUESTIONS = {
    "market": """When is market day in {n}? | On which day is the market in {n}? | On what day is
        the market held in {n}? | Which day is market day in {n}? | On which day can I go to the
        market of {n}? | When do the stalls in {n} open? | When does {n} have its market? | What
        is the day of the market in {n}?""",
    "landmark": """What is {n} known for? | What is {n} famous for? | What is the best thing to
        see in {n}? | What do people visit in {n}? | What is the pride of {n}? | Which famous
        thing is in {n}? | What should I see when I visit {n}? | What do travellers go to see in
        {n}?""",
    "festival": """Which festival is held in {n}? | What festival do the people of {n} celebrate?
        | What does {n} celebrate every year? | Which festival can I visit in {n}? | What is the
        great feast of {n}? | What festival does {n} have? | Which festival does {n} hold every
        year? | What is the festival of {n}?""",
    "direction": """What lies {d} of {n}? | Which place is {d} of {n}? | Where do I come to if I
        walk {d} from {n}? | Where does the road {d} from {n} lead? | What place do you reach if
        you go {d} from {n}? | What is to the {d} of {n}? | Which neighbour does {n} have in the
        {d}? | Which place lies to the {d} of {n}?""",
    "road": """How far is it from {x} to {y}? | How long is the road from {x} to {y}? | How many
        miles is it from {x} to {y}? | What is the distance from {x} to {y}? | How far do I walk
        from {x} to {y}? | How many miles are there between {x} and {y}? | How far apart are {x}
        and {y}? | How long is the way from {x} to {y}?""",
}

# %% [markdown]
r"""
Animals, goods and jobs are nouns that need an article and a plural: `{an}` is "an otter", `{ns}`
"otters".
"""

# %%
#| export
THING_STATEMENTS = {
    "habitat": """{Ns} live {at}. | The home of the {n} is {o}. | You can see {ns} {at}. | The
        place where {ns} live is {o}. | {An} makes its home {at}. | If you want to meet {an}, go
        to {o}. | Most {ns} of the Vale live {at}. | The favourite place of the {n} is {o}. |
        Look for {ns} {at}. | When {an} goes home, it goes to {o}.""",
    "diet": """{Ns} eat {o}. | The food of the {n} is {o}. | {An} likes to eat {o}. | When {an}
        is hungry, it looks for {o}. | {Ns} feed on {o}. | The {n} lives on {o}. | {An} feeds its
        young with {o}. | What the {n} eats most is {o}. | {Ns} are always looking for {o}. | The
        favourite meal of {an} is {o}.""",
    "coat": """The {n} is {o}. | {Ns} are {o}. | The colour of the {n} is {o}. | Most {ns} you
        see are {o}. | In the Vale every {n} is {o}. | You know {an} by its colour, which is {o}.
        | When you draw {an}, make it {o}. | To paint {an}, take {o}. | The colour of {ns} is
        {o}.""",
    "price": """{An} costs {o}. | The price of {an} is {o}. | You pay {o} for {an}. | For {an}
        you pay {o}. | {An} can be bought for {o}. | At the market {an} costs {o}. | If you want
        {an}, you need {o}. | Nobody sells {an} for less than {o}. | People ask {o} for {an}. |
        One {n} is sold for {o}.""",
    "seller": """{Ns} are sold by the {o}. | You can buy {an} from the {o}. | The person who
        sells {ns} is the {o}. | For {an} you go to the {o}. | If you need {an}, ask the {o}. |
        The one to ask for {ns} is the {o}. | Good {ns} come from the {o}. | To buy {an}, visit
        the {o}. | The {o} is the one who sells {ns}.""",
    "workplace": """A {n} works in the {o}. | The place of work of a {n} is the {o}. | You will
        find the {n} in the {o}. | Every morning the {n} goes to the {o}. | The {n} spends the
        day in the {o}. | If you need a {n}, look in the {o}. | The work of a {n} is done in the
        {o}. | The place where a {n} works is the {o}. | From morning to evening the {n} is busy
        in the {o}.""",
    "duty": """A {n} {o}. | It is the {n} who {o}. | Every day the {n} {o}. | The {n} is the
        person who {o}. | Everybody knows that a {n} {o}. | From morning to evening the {n} {o}.
        | A good {n} {o} every day. | In every village the {n} {o}. | When you see a {n} at work,
        the {n} {o}.""",
}

# %%
#| export
THING_QUESTIONS = {
    "habitat": """Where does the {n} live? | Where do {ns} live? | Where can I see {an}? | In
        which place do {ns} live? | Which place is the home of the {n}? | Where is the home of
        the {n}? | Where should I look for {ns}? | Where do {ns} make their home?""",
    "diet": """What does the {n} eat? | What do {ns} eat? | What food do {ns} like? | Which food
        does {an} look for? | What do {ns} feed on? | What does {an} live on? | What is the food
        of the {n}? | What does a hungry {n} look for?""",
    "coat": """What colour is the {n}? | What is the colour of the {n}? | Which colour do {ns}
        have? | What colour are {ns}? | Which colour is {an}? | What colour does the {n} have? |
        Which colour do I need to paint {an}?""",
    "price": """How much is {an}? | What does {an} cost? | What is the price of {an}? | How much
        does {an} cost? | How many coins do I need for {an}? | How much do I pay for {an}? | For
        how many coins can I buy {an}? | What do people pay for {an}?""",
    "seller": """Who sells {ns}? | From whom can I buy {an}? | Who can sell me {an}? | Which
        trade sells {ns}? | Who should I ask for {an}? | Who is the one who sells {ns}? | To whom
        do I go for {an}? | Which person sells {ns}?""",
    "workplace": """Where does a {n} work? | Where is the {n} during the day? | Where will I find
        the {n}? | In which place does a {n} work? | Where does the {n} go every morning? | What
        is the place of work of a {n}? | Where should I look for a {n}? | Where is the work of a
        {n} done?""",
    "duty": """What does a {n} do? | What is the work of a {n}? | What does the {n} do every day?
        | How does a {n} spend the day? | What do we need a {n} for? | What can a {n} do? | What
        does a good {n} do? | What does the {n} do from morning to evening?""",
}

# %% [markdown]
r"""
## Choices, hashes and grammar

Three tools decide everything else. `draw` gives the random numbers of one document from three
integers, so that document 1,000,000 can be written without the ones before it. `pick` chooses.
`stable_hash` decides what belongs to the exam, through `in_split`: Python's own `hash` of a string
changes from process to process, so it cannot.
"""


# %%
#| export
def pick(rng: random.Random, options):
    """One element of a non-empty sequence (faster than rng.choice, same on every Python)."""
    return options[int(rng.random() * len(options))]


def draw(seed: int, stream: int, index: int) -> random.Random:
    """Random numbers that depend only on three non-negative integers."""
    return random.Random((seed * 1_000_003 + stream) * 4_294_967_311 + index)


@lru_cache(maxsize=1 << 16)
def stable_hash(*parts) -> int:
    """64-bit hash of the parts, the same in every process (Python's own hash is not)."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def in_split(split: str, *parts, test_share: float = 0.2) -> bool:
    """Whether the thing named by parts belongs to `split` ("train" or "test")."""
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'test'")
    is_test = stable_hash("split", *parts) % 1000 < 1000 * test_share
    return is_test == (split == "test")


# %%
#| test
assert draw(0, 1, 5).random() == draw(0, 1, 5).random() != draw(0, 1, 6).random()
assert in_split("test", "add", 3, 4) != in_split("train", "add", 3, 4)
share = sum(in_split("test", n) for n in range(2000)) / 2000
assert abs(share - 0.2) < 0.03

# %% [markdown]
r"""
Why a hash, and not two lists of seeds? Because seeds can meet. One well-known project drew its
training words with the seeds 0, 1, 2 ... and its test words with the negative ones. Python's
generator ignores the sign of a seed, so both sets were the same. A hash of *the thing itself*
cannot fail in this way: a sum is either for training or for the test, wherever it comes from.
"""

# %%
print(random.Random(7).random() == random.Random(-7).random())

# %% [markdown]
r"""
> **Exercise A1.1.** 800 words are dealt out by hash, a fifth of them to the test. How many do you
> expect there, give or take how many? Why is an uneven share harmless, and a word in both splits
> not?

Then a little grammar, for nouns of our tables only:
"""


# %%
#| export
def article(word: str) -> str:
    """The word with a or an before it: "an otter", "a fox"."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def plural(word: str) -> str:
    """The plural of a regular noun, or of loaf: "foxes", "loaves", "cherries"."""
    if word == "loaf":
        return "loaves"
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def listing(words) -> str:
    """ "a", "a and b", "a, b and c"."""
    words = list(words)
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def variants(text: str) -> list[str]:
    """The wordings of one table entry: split at the bars, white space made single."""
    return [" ".join(part.split()) for part in text.split("|")]


# %%
#| test
assert [article(word) for word in ("otter", "fox")] == ["an otter", "a fox"]
assert [plural(word) for word in ("fox", "loaf", "otter")] == ["foxes", "loaves", "otters"]
assert listing(["a", "b", "c"]) == "a, b and c"

# %% [markdown]
r"""
## Facts, wordings, people

Each fact carries all of its sentences, written once when the world is made: stating a fact is
then one random choice, and that is why the generator is fast. For (Mira, home, Dunmere) they are:
"""

# %%
for form, sentences in vars(vale.words("Mira", "home")).items():
    if sentences:
        print(f"{form:14} {len(sentences)}  {' | '.join(sentences[:2])}")

# %% [markdown]
r"""
Statements come by name, by pronoun and as a clause for "I heard that ..."; questions by name and by
pronoun; and two of each are for the exam.
"""


# %%
#| export
@dataclass(frozen=True)
class Fact:
    """One atomic fact, e.g. Fact("Mira", "job", "baker")."""

    subject: str
    relation: str
    object: str


@dataclass
class Wordings:
    """All sentences that state or ask one fact. Training and exam wordings are kept apart."""

    named: list[str]  # training statements that name the subject
    pronoun: list[str]  # the same with a pronoun in place of the subject (may be empty)
    clause: list[str]  # statements that may follow "that", without full stop (may be empty)
    questions: list[str]  # training questions that name the subject
    asked: list[str]  # training questions with a pronoun (may be empty)
    exam_stems: list[str]  # exam statements cut before the object
    exam_questions: list[str]  # exam questions
    many: str = ""  # the plural of a thing ("otters"), empty for a person or a place


# %% [markdown]
r"""
A person has one object for each relation about people. `NAME_ONLY` finds the templates that name
their subject in any case and cannot take a pronoun.
"""


# %%
#| export
@dataclass
class Person:
    """One inhabitant. `slots` fills the templates of stories."""

    name: str
    woman: bool
    job: str
    home: str
    pet: str
    pet_name: str
    food: str
    colour: str
    month: str
    friend: str = ""
    slots: dict = field(default_factory=dict)


PERSON_RELATIONS = tuple(PERSON_STATEMENTS)
NAME_ONLY = re.compile(r"\{(n|ns|an|x|y)\}")

# %% [markdown]
r"""
### Which wordings are for the exam

Two statements and two questions of each relation are kept for the exam; their hashes decide
which. Two rules stand above the hash. The plainest wording stays in training, because a person
will use it in a chat. And a statement that could give the exam away stays too: "Mira is a" (to be
completed) occurs inside "Mira is a busy baker."
"""


# %%
#| export
def split_statements(relation: str, group: dict) -> tuple[list[str], list[str]]:
    """Training and exam statements of a relation; two end in the object and are for the exam.

    The order of the hashes decides which two. The first, plainest statement always stays in
    training, and so does one whose stem begins another statement ("Mira is a ...").
    """
    texts = variants(group[relation])
    everything = [other for table in group.values() for other in variants(table)]
    exam = []
    for text in sorted(texts[1:], key=lambda text: stable_hash("statement", relation, text)):
        stem = text[: -len("{o}.")].strip()
        unique = sum(stem in other for other in everything) == 1
        if text.endswith("{o}.") and unique and len(stem.split()) > 2 and len(exam) < 2:
            exam.append(text)
    return [text for text in texts if text not in exam], exam


def split_questions(relation: str, group: dict) -> tuple[list[str], list[str]]:
    """Training and exam questions of a relation: the two smallest hashes are for the exam.

    The first, plainest question of the table always stays in training.
    """
    texts = variants(group[relation])
    exam = sorted(texts[1:], key=lambda text: stable_hash("question", relation, text))[:2]
    return [text for text in texts if text not in exam], exam


# %%
train, held_out = split_questions("home", PERSON_QUESTIONS)
print("training:", *train, sep="\n  ")
print("exam:", *held_out, sep="\n  ")

# %% [markdown]
r"""
Filling the slots: one dictionary with the name, one with the pronoun.
"""


# %%
#| export
def fill(templates: list[str], slots: dict) -> list[str]:
    """Every template with its slots filled."""
    return [template.format_map(slots) for template in templates]


def person_slots(name: str, woman: bool) -> tuple[dict, dict]:
    """Slots for a person by name and by pronoun."""
    she, her = ("she", "her") if woman else ("he", "his")
    own = name + "'s"
    fixed = {"n": name, "p": she, "ps": her}
    named = fixed | {"He": name, "he": name, "him": name, "His": own, "his": own}
    him = "her" if woman else "him"
    pronoun = fixed | {"He": capital(she), "he": she, "him": him, "His": capital(her), "his": her}
    return named, pronoun


def thing_slots(noun: str) -> tuple[dict, dict]:
    """Slots for an animal, a ware or a job by name and by pronoun."""
    nouns, a_noun = plural(noun), article(noun)
    named = {"n": noun, "ns": nouns, "an": a_noun, "Ns": capital(nouns), "An": capital(a_noun)}
    return named, named | {"An": "It", "Ns": "They"}


# %%
#| export
def make_wordings(statements, questions, named: dict, pronoun: dict | None) -> Wordings:
    """All wordings of one fact from the split tables and the filled slots."""
    said, said_exam = statements
    asked, asked_exam = questions
    by_pronoun = [t for t in said if pronoun and not NAME_ONLY.search(t) and "{" in t]
    by_clause = [t for t in said if t.startswith(("{He}", "{His}", "{n}", "{Ns}", "{An}"))]
    follow_up = [t for t in asked if pronoun and not NAME_ONLY.search(t)]
    return Wordings(
        named=fill(said, named),
        pronoun=fill(by_pronoun, pronoun or {}),
        clause=[decapital_noun(text[:-1], named) for text in fill(by_clause, named)],
        questions=fill(asked, named),
        asked=fill(follow_up, pronoun or {}),
        exam_stems=[text[: -len("{o}.")].strip().format_map(named) for text in said_exam],
        exam_questions=fill(asked_exam, named),
        many=named.get("ns", ""),
    )


def decapital_noun(text: str, named: dict) -> str:
    """Lower the first letter of a clause unless it begins with a name."""
    return text[:1].lower() + text[1:] if "Ns" in named else text


# %% [markdown]
r"""
## The map and the people

Places lie on a grid: one column further is east, one row further is north. "North of" and "south
of" then agree by construction. People get their attributes as cards are dealt, so that every
village has five inhabitants and every pet four owners. That matters for honesty: if half of the
people kept cats, "cat" would be a good guess.

> **Exercise A1.2.** You guess the village of a person of whom you know nothing. How often are you
> right? And once you have met all five inhabitants of Alderby and two of Dunmere?
"""


# %%
#| export
def draw_map(rng: random.Random) -> dict:
    """A map on a grid: {"places": {name: (x, y)}, "roads": {(a, b): miles}, "river": [names]}.

    Eight villages and four wild places fill a grid of four columns and three rows, the bay lies
    south of one of them. Roads join neighbours. The river runs from the hill to the bay.
    """
    names = VILLAGES.split() + [name for name in WILDS if name != "Shellbay"]
    rng.shuffle(names)
    places = {name: (i % 4, i // 4 + 1) for i, name in enumerate(names)}
    places["Shellbay"] = (int(rng.random() * 4), 0)
    at = {xy: name for name, xy in places.items()}
    roads = {}
    for (x, y), name in sorted(at.items()):
        for step in ((1, 0), (0, 1)):
            other = at.get((x + step[0], y + step[1]))
            if other:
                roads[name, other] = 2 + int(rng.random() * 8)
    x, y = places["Ravenhill"]
    river = ["Ravenhill"]
    while (x, y) != places["Shellbay"]:
        sideways = places["Shellbay"][0] - x
        if sideways and (y == 1 or rng.random() < 0.5):
            x += 1 if sideways > 0 else -1
        else:
            y -= 1
        river.append(at[x, y])
    return {"places": places, "roads": roads, "river": river}


# %%
#| export
def make_people(rng: random.Random) -> dict[str, Person]:
    """Forty people; every attribute is dealt out evenly, like cards."""
    names = WOMEN.split() + MEN.split()
    rng.shuffle(names)
    women = set(WOMEN.split())

    def deal(cards):
        cards = cards.split() if isinstance(cards, str) else list(cards)
        rng.shuffle(cards)
        return (cards * 40)[:40]

    jobs, homes = deal(JOBS), deal(VILLAGES)  # numbers i and i + 20 share a job, never a home
    rest = [deal(cards) for cards in (PETS, PET_NAMES, FOODS, COLOURS, MONTHS)]
    for cards in rest:
        rng.shuffle(cards)
    people = {}
    for i, name in enumerate(names):
        others = [cards[i] for cards in rest]
        people[name] = Person(name, name in women, jobs[i], homes[i], *others)
    rng.shuffle(names)
    for a, b in zip(names[::2], names[1::2], strict=True):
        people[a].friend, people[b].friend = b, a
    return people


# %% [markdown]
r"""
## The world

The class holds the tables of one seed. The functions below it add the facts of people, places and
things.
"""


# %%
#| export
class World:
    """The one consistent world of a seed: its facts, its map and every wording of every fact.

    Attributes: `facts` list of Fact; `people` name -> Person; `map` (see draw_map); `animals`
    name -> {"habitat", "diet", "coat"}; `goods` name -> (seller, price); `villages` name ->
    {"market", "landmark", "festival"}; `objects` relation -> sorted possible objects;
    `wordings` Fact -> Wordings.
    """

    def __init__(self, seed: int = 0):
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed is {seed!r}; a world needs an integer that is 0 or more")
        self.seed = seed
        rng = draw(seed, 0, 0)
        self.map = draw_map(rng)
        self.people = make_people(rng)
        self.animals = {
            name: dict(zip(("habitat", "diet", "coat"), [pick(rng, o.split()) for o in options],
                           strict=True))
            for name, options in ANIMALS.items()
        }  # fmt: skip
        self.goods = {
            name: (seller, low + int(rng.random() * (high - low + 1)))
            for name, (seller, low, high) in GOODS.items()
        }
        self.villages = make_villages(rng)
        self.wordings: dict[Fact, Wordings] = {}
        add_person_facts(self)
        add_place_facts(self)
        add_thing_facts(self)
        self.facts = list(self.wordings)
        self._index = {(fact.subject, fact.relation): fact for fact in self.facts}
        self.objects = {}
        for fact in self.facts:
            self.objects.setdefault(fact.relation, set()).add(fact.object)
        self.objects = {relation: sorted(some) for relation, some in self.objects.items()}
        add_story_slots(self)
        build_index(self)

    def fact(self, subject: str, relation: str) -> Fact:
        """The fact of a subject and a relation; KeyError when there is none."""
        return self._index[subject, relation]

    def words(self, subject: str, relation: str) -> Wordings:
        """The wordings of that fact."""
        return self.wordings[self._index[subject, relation]]


# %%
#| export
def make_villages(rng: random.Random) -> dict[str, dict[str, str]]:
    """Market day, landmark and festival of each village."""
    days, sights, feasts = DAYS.split(), LANDMARKS.split(), FESTIVALS.split()
    days.append(pick(rng, days))
    for cards in (days, sights, feasts):
        rng.shuffle(cards)
    rows = zip(VILLAGES.split(), days, sights, feasts, strict=True)
    return {n: {"market": d, "landmark": s, "festival": f + " festival"} for n, d, s, f in rows}


def add_person_facts(world: World) -> None:
    """Facts about people."""
    for relation in PERSON_RELATIONS:
        statements = split_statements(relation, PERSON_STATEMENTS)
        questions = split_questions(relation, PERSON_QUESTIONS)
        for person in world.people.values():
            answer = getattr(person, relation)
            extra = {"o": answer, "k": person.pet}
            named, pronoun = person_slots(person.name, person.woman)
            fact = Fact(person.name, relation, answer)
            world.wordings[fact] = make_wordings(
                statements, questions, named | extra, pronoun | extra
            )


# %%
#| export
def add_place_facts(world: World) -> None:
    """Facts about villages, neighbours and roads."""

    def add(subject, table, relation, answer, *slots):
        statements = split_statements(table, PLACE_STATEMENTS)
        questions = split_questions(table, PLACE_QUESTIONS)
        parts = [make_wordings(statements, questions, s | {"o": answer}, None) for s in slots]
        both = parts[0]
        for other in parts[1:]:  # a road is also worded in the other direction
            both.named += other.named
            both.clause += other.clause
            both.questions += other.questions
        world.wordings[Fact(subject, relation, answer)] = both

    for name, village in world.villages.items():
        for relation, answer in village.items():
            add(name, relation, relation, answer, {"n": name})
    at = {xy: name for name, xy in world.map["places"].items()}
    for name, (x, y) in world.map["places"].items():
        for d, (dx, dy) in COMPASS.items():
            if (x + dx, y + dy) in at:
                slots = {"n": name, "d": d, "D": capital(d)}
                add(name, "direction", d, at[x + dx, y + dy], slots)
    for (a, b), miles in world.map["roads"].items():
        length = f"{NUMBERS.split()[miles]} miles"
        add(f"{a}-{b}", "road", "road", length, {"x": a, "y": b}, {"x": b, "y": a})


# %%
#| export
def add_thing_facts(world: World) -> None:
    """Facts about animals, goods and jobs."""

    def add(subject, relation, answer):
        named, pronoun = thing_slots(subject)
        extra = {"o": answer, "at": WILDS.get(answer, ("", ""))[1] + " " + answer}
        statements = split_statements(relation, THING_STATEMENTS)
        questions = split_questions(relation, THING_QUESTIONS)
        pronoun = None if subject in JOBS else pronoun | extra
        world.wordings[Fact(subject, relation, answer)] = make_wordings(
            statements, questions, named | extra, pronoun
        )

    for name, animal in world.animals.items():
        for relation, answer in animal.items():
            add(name, relation, answer)
    for name, (seller, price) in world.goods.items():
        add(name, "seller", seller)
        add(name, "price", f"{NUMBERS.split()[price]} coins")
    for name, (workplace, duty) in JOBS.items():
        add(name, "workplace", workplace)
        add(name, "duty", duty)


# %% [markdown]
r"""
Stories need more: the hero's friend, village, work and feast, each as a slot. And the generators
draw from lists that are made once.
"""


# %%
#| export
def add_story_slots(world: World) -> None:
    """What a story template may say about its hero ({N}, {he} ...) and the best friend ({F})."""
    for person in world.people.values():
        _, pronoun = person_slots(person.name, person.woman)
        friend = world.people[person.friend]
        _, theirs = person_slots(friend.name, friend.woman)
        village = world.villages[person.home]
        workplace, duty = JOBS[person.job]
        person.slots = pronoun | {
            "N": person.name, "job": person.job, "home": person.home, "k": person.pet,
            "P": person.pet_name, "food": person.food, "colour": person.colour,
            "month": person.month, "F": friend.name, "fhe": theirs["he"], "Fhe": theirs["He"],
            "fhis": theirs["his"], "fhim": theirs["him"], "fhome": friend.home,
            "fjob": friend.job, "wp": workplace, "duty": duty, "mark": village["landmark"],
            "market": village["market"], "feast": village["festival"],
        }  # fmt: skip


# %%
#| export
def build_index(world: World) -> None:
    """Lists that the generators draw from, made once per world."""
    people = list(world.people.values())
    index = {"people": people, "days": DAYS.split(), "plots": list(PLOTS)}
    index["animals"], index["goods"] = list(world.animals), list(world.goods)
    index["durable"] = [name for name in world.goods if name not in EDIBLE]
    for key in ("job", "home", "pet", "food", "colour", "month"):
        groups = index[key] = {}
        for person in people:
            groups.setdefault(getattr(person, key), []).append(person)
    ways = []
    for fact in world.facts:
        if fact.relation in COMPASS and {fact.subject, fact.object} <= set(world.villages):
            pair = (fact.subject, fact.object)
            miles = world.map["roads"].get(pair) or world.map["roads"][pair[::-1]]
            length = NUMBERS.split()[miles] + " miles"
            ways.append((fact.subject, fact.relation, fact.object, length))
    index["all ways"], index["ways"] = ways, {}
    for way in ways:
        index["ways"].setdefault(way[0], []).append(way)
    about = index["about"] = {}
    for fact in world.facts:
        about.setdefault(fact.subject, []).append(fact)
    index["roads"] = [fact for fact in world.facts if fact.relation == "road"]
    for fact in index["roads"]:
        for name in fact.subject.split("-"):
            about[name].append(fact)
    index["subjects"] = [name for name in about if "-" not in name]
    index["words"] = {split: [w for w in world_words() if in_split(split, "spell", w)]
                      for split in ("train", "test")}  # fmt: skip
    world.index = index
    world.document_kinds = [make for make, share in DOCUMENT_KINDS for _ in range(share)]
    world.sums = {kind: variants(wordings) for kind, (_, wordings) in SUMS.items()}
    world.stages = {name: [variants(stage) for stage in plot] for name, plot in PLOTS.items()}


# %% [markdown]
r"""
The words to spell and to count letters in are those of the tables themselves:
"""


# %%
#| export
def world_words() -> list[str]:
    """The words of the world that are written in lower case, for spelling (about 800)."""
    tables = [PERSON_STATEMENTS, PLACE_STATEMENTS, THING_STATEMENTS, PERSON_QUESTIONS]
    tables += [PLOTS, ANIMALS, GOODS, JOBS, PETS, FOODS, COLOURS, LANDMARKS, FESTIVALS]
    words = re.findall(r"(?<![\w{'])[a-z]{3,}(?![\w}'])", " ".join(map(str, tables)))
    return sorted(set(words))


# %% [markdown]
r"""
## Stories

A story is a plot: a row of stages, each with a few wordings. The hero and the guests change; what
is said about them is always true. Eight plots follow, each with a setting, a trouble and an end.
"""

# %%
#| export
WEATHER = variants(
    "sunny | rainy | windy | cold | warm | foggy | cloudy | bright | grey | quiet | stormy | misty"
)
TIMES = variants("""One {w} morning | One {w} evening | One {w} day | On a {w} afternoon |
    Late on a {w} evening | Early on a {w} morning | One {w} {d} | On a {w} {d} morning |
    Not long ago, on a {w} day | Last {d}, a {w} day | One {w} {d} evening""")
MOODS = ("angry", "grumpy", "sad", "lonely")
BREAKABLE = ("chair", "table", "ladder", "bowl", "jug", "clock", "lantern", "kettle")
EDIBLE = ("loaf", "bun", "cake", "pie", "pumpkin", "onion", "apple", "rose", "tulip")

# %% [markdown]
r"""
A pet is lost; the best friend helps to find it.
"""

# %%
#| export
LOST_PET = (
    """{time}, {N} the {job} could not find {his} {k}. {His} {k} was called {P}. | {time}, {P}
    the {k} was gone. {N} of {home} looked for {P} everywhere. | {time}, {N} came home from the
    {wp} and called {P}, but {his} {k} did not come. | {time}, {N} of {home} went to feed {his}
    {k}. The little house of {P} was empty.""",
    """{He} looked under the bed and behind the door, but there was no {k}. | {He} searched the
    kitchen and the yard, and then {he} began to worry. | {He} ran into the street and called
    again and again. | Nobody in the street had seen {P}.""",
    """{He} was so sad that {he} did not even want {food}, {his} favourite food. | Even {food}
    for supper could not make {him} happy. | "{P} is not only a {k}," {he} said. "{P} is my
    family." | {He} did not know what to do.""",
    """Then {F} came to help. {F} was {his} best friend. | So {he} asked {F}, {his} best
    friend, for help. | {His} best friend {F} heard the news and came at once from {fhome}. |
    {F} the {fjob} heard about it and promised to help.""",
    """Together they went to the {mark} of {home}. | "Let us look near the {mark}," said {F}. |
    They asked every child in {home}, and one of them pointed to the {mark}. | First they
    walked down every street of {home}. Then they came to the {mark}.""",
    """There sat {P}, wet and hungry but well. | Behind the {mark} they heard a small sound. It
    was {P}! | At last {F} saw something move in the grass. It was {P}, fast asleep. | {P} was
    there, hiding under an old {colour} cart.""",
    """{N} laughed and cried at the same time. From that day on {he} always closed the gate. |
    "You silly {k}!" said {N}. That night all three of them were happy. | {N} thanked {F} and
    gave {fhim} some {ffood}. Nobody in {home} was happier that night. | They carried {P} home,
    and {N} told {F}, "You are a true friend." """,
)

# %% [markdown]
r"""
Something is bought at the market, on the right day and at the right price, with a mishap.
"""

# %%
#| export
MARKET_DAY = (
    """{time}, {N} the {job} saw that {his} old {g} was gone. | {N} of {home} had wanted {ag}
    for a long time. | {N} needed {ag}. {He} lived in {home} and worked as a {job}. | {time},
    {N} promised {his} best friend {F} {ag}.""",
    """Market day in {home} was {market}, so {he} had to wait. | "On {market} there will be a
    market in {home}," {he} thought. | {He} counted {his} coins and waited for {market}, the
    market day of {home}. | {market} was still far away, and only then was there a market.""",
    """When {market} came, the square was full of people. | On {market} {he} got up early and
    walked past the {mark} to the square. | At last it was {market}, and {he} went to the
    stalls. | On {market} the square smelled of fruit and fresh bread.""",
    """{S} the {sj} had a stall full of {gs}. "{price_line}," said {S}. | {He} soon found {S}
    the {sj}. "{price_line}," {S} told {him}. | "Good morning," said {S} the {sj}.
    "{price_line}." """,
    """But {he} had left {his} purse at home! | {He} opened {his} purse, but it was empty.
    There was a hole in it. | Just then the wind took {his} {colour} hat and blew it far away.
    | {He} looked at {his} coins. One of them was missing.""",
    """"Do not worry," said {S}. "You can pay me next {market}." | A kind child ran after {him}
    and brought it back. | {F}, {his} best friend, came to the stall and helped {him}. | {S}
    only smiled and said, "Good neighbours help each other." """,
    """So {N} carried {ag} home and was very happy. | In the evening all the neighbours looked
    at the new {g}, and even {P} the {k} came to see it. | {N} thanked {S} and walked home with
    the {g}, singing all the way. | That is how {N} of {home} got {his} {g}.""",
)

# %% [markdown]
r"""
A birthday seems to be forgotten.
"""

# %%
#| export
BIRTHDAY = (
    """It was {month}, the month of {N}'s birthday. | {month} came, and {N} of {home} turned a
    year older. | {N} the {job} has {his} birthday in {month}, but one year {he} forgot it. |
    One {w} day in {month}, {N} woke up and thought, "Today is my birthday!" """,
    """But nobody came, and nobody said a word. | {He} worked in the {wp} all day, and nobody
    sang for {him}. | In the {wp} everything was as always. | Only {P} the {k} was there, and
    {P} could not sing.""",
    """"They forgot me," {he} said to {his} {k}. | {He} sat down near the {mark} and felt
    alone. | {He} went home early and closed the door. | "Even {F} forgot me," {he} said. {F}
    was {his} best friend.""",
    """{He} did not know that {F} had a plan. | But {F} had not forgotten. {F} came all the way
    from {fhome}. | In secret, {F} the {fjob} was very busy. | {F} knew what to do: {fhe} asked
    all the neighbours to help.""",
    """They painted {ag} {colour}, because {colour} is {N}'s favourite colour. | They cooked
    {food}, because {N} loves {food}. | {F} bought {ag} from {S} the {sj} and painted it
    {colour}. | There was a big pot of {food}, and there were {colour} flowers.""",
    """When it was dark, someone knocked at the door. | In the evening {N} heard music in the
    street. | Then {P} ran to the door, and {N} opened it. | Suddenly the whole house was full
    of people.""",
    """"Happy birthday!" everybody shouted. {N} laughed until it was late. | "We would never
    forget you," said {F}. | It was the best birthday {he} ever had. | {N} thanked them all,
    and {P} the {k} got a piece of cake.""",
)

# %% [markdown]
r"""
A wild animal needs help. It lives where it lives and eats what it eats.
"""

# %%
#| export
WILD_ANIMAL = (
    """{time}, {N} the {job} was walking {at}. | {time}, {N} of {home} went for a walk {at}. |
    {time}, {N} and {his} friend {F} were {at}, where the {as} live. | {time}, {N} left the
    {wp} and walked until {he} was {at}.""",
    """There {he} saw {ya} that could not move. | Suddenly {he} heard a cry. It was {ya}! |
    Behind a stone lay a small {a}. It was hurt. | Between two stones sat {ya}. It was caught
    in an old net.""",
    """"Poor {a}," said {N}. "I will help you." | The {coat} {a} looked at {him} with big eyes.
    | {He} went closer, step by step, and spoke softly. | At first the {a} was afraid.""",
    """{N} knew that {as} eat {diet}, so {he} brought it some {diet}. | "{As} eat {diet}," {he}
    said, and {he} went to find some. | {He} gave it {diet}, for that is what {as} eat. | {He}
    found some {diet}, and the hungry {a} ate and ate.""",
    """Then {he} ran to {D}, the doctor of {dhome}. | {D} the doctor came at once. | {He}
    wrapped it in {his} {colour} coat and carried it to {D} the doctor. | "{D} is a doctor,"
    {he} thought. "{D} can help." """,
    """The doctor needed only a little time, and the {a} was well again. | After three days the
    {a} was strong again. | Day after day {N} came back, and day after day the {a} grew
    stronger. | Soon the {a} was as well as before.""",
    """{N} let it go {at}, because that is the home of the {as}. | The {a} looked back once and
    was gone. {N} smiled all the way home to {home}. | Since that day the {as} are not afraid
    of {N}. | At home {N} told {his} {k} {P} all about it.""",
)

# %% [markdown]
r"""
Something breaks, and the right craftsman mends it.
"""

# %%
#| export
REPAIR = (
    """{time}, {N} heard a loud noise. {His} {g} was broken! | {time}, {P} the {k} ran through
    the yard, and the {g} fell over and broke. | {time}, {N} the {job} dropped {his} {g}. |
    {time}, the {g} of {N} broke into two pieces.""",
    """It was an old {g}, and {he} loved it. | {He} had painted it {colour}, the colour {he}
    likes best. | "What shall I do now?" {he} asked. | {His} best friend {F} had given it to
    {him}.""",
    """{N} tried to mend it alone, but {he} only made it worse. | "I am a {job}," {he} said. "I
    do not know how to mend {ag}." | {He} tried glue, and {he} tried string. Nothing helped. |
    {He} worked on it until it was dark, but it was no use.""",
    """"Go to {S}," said {F}. "{S} is a {sj}." | Then {he} remembered {S}, the {sj} of {shome}.
    | Everybody knows that good {gs} come from the {sj}, so {he} went to {S} in {shome}. | In
    {shome} lives {S} the {sj}, and {N} went there.""",
    """{S} was busy in the {swp}, but stopped to look. | {He} found {S} in the {swp}. | {S} sat
    in the {swp}, eating {sfood}. | The door of the {swp} was open, and {S} was at work.""",
    """"That is easy," said {S}, and in a short time the {g} was like new. | {S} looked at it
    for a long time and then began to work. Soon it was done. | "Leave it here," said {S}. The
    next day the {g} was better than before. | "We will do it together," said {S}, and they
    did.""",
    """{N} wanted to pay, but {S} said, "Bring me some {sfood} one day." And {he} did. | {N}
    walked back to {home}, happy and proud. | Since then {N} and {S} have been good friends. |
    "Thank you!" said {N}, and {he} carried the {g} home to {home} with great care.""",
)

# %% [markdown]
r"""
A journey to a neighbouring village: direction and distance come from the map.
"""

# %%
#| export
JOURNEY = (
    """{time}, {N} left {start} with bread and water in {his} bag. | {time}, {N} the {job} had
    to carry a letter from {start} to {end}. | {time}, {N} and {his} friend {F} wanted to see
    {end}. They set out from {start}. | {N} had never seen {end}, so {time_low} {he} set out
    from {start}.""",
    """{He} walked {d}, because {end} lies {d} of {start}. | The road goes {d}, and it is
    {miles} long. | "{end} lies {d} of {start}," {he} thought. "It is only {miles}." |
    {miles_cap} are a long way, but the road to the {d} was good.""",
    """After a while it began to rain, and {he} lost the way. | At a crossing {he} went left,
    and soon there was no road at all. | Then a thick fog came, and {he} could not see the
    road. | Halfway there, a bridge was broken, and {he} had to stop.""",
    """{He} met {S} the {sj}, who was on the way home to {shome}. | Just then {S} of {shome}
    came along with a cart. | Under a tree sat {S} the {sj} and ate {sfood}. | {He} heard a
    song. It was {S}, the {sj} of {shome}.""",
    """"Go {d}," said {S}, "and you will reach {end}." | "{start} is behind you, and {end} is
    in the {d}," {S} told {him}. | "Come with me," said {S}. "I know the way {d}." | {S} gave
    {him} some {sfood} and showed {him} the way.""",
    """Before night {N} reached {end}. | When the sun went down, {he} arrived in {end}, tired
    and happy. | In the evening {he} saw the first lights of {end}. | At last {he} stood in
    {end}.""",
    """"{miles_cap} felt like twenty," {he} laughed. | {He} sat down, took off {his} shoes and
    ate some {food}. | {He} wrote to {F}, {his} best friend, about the way. | The next day {he}
    walked home, and this time the sun was shining.""",
)

# %% [markdown]
r"""
Two people quarrel before the feast of their village.
"""

# %%
#| export
FEAST = (
    """It was time for the {feast} in {home}. | Once a year {home} holds the {feast}. | {time},
    all of {home} was getting ready for the {feast}. | {time}, the {feast} of {home} was only
    three days away.""",
    """{N} the {job} and {T} the {tjob} both wanted to carry the first flag. | {N} and {T}, who
    both live in {home}, had to prepare the music. | {N} wanted to paint the stage {colour},
    but {T} wanted to paint it {tcolour}. | {N} and {T} worked together near the {mark}.""",
    """Soon they began to quarrel. | "You never listen to me!" said {T}. | "My way is better,"
    said {N}, and {T} became angry. | They shouted so loudly that the dogs began to bark.""",
    """{N} went home to {his} {k} {P} and did not want to see anyone. | For two days they did
    not speak. | {T} sat alone near the {mark}, and {N} sat alone in the {wp}. | "Then do it
    without me," said {N} and left.""",
    """Then {F}, who is {N}'s best friend, had an idea. | {F} of {fhome} heard about it and
    shook {fhis} head. | "A feast is no fun without friends," said {F}. | {N} thought about it
    all night. In the morning {he} was sorry.""",
    """{N} took some {tfood} to {T}, because {T} loves {tfood}. | "I am sorry," said {N}. "I am
    sorry too," said {T}. | They met near the {mark}, looked at each other and had to laugh. |
    {T} came with {food}, which {N} likes best, and they ate it together.""",
    """That year the {feast} was better than ever. | In the end half of the stage was {colour}
    and the other half was {tcolour}. | Everybody in {home} danced until the morning. | And
    when the {feast} began, they carried the flag together.""",
)

# %% [markdown]
r"""
Somebody tries the work of another.
"""

# %%
#| export
LESSON = (
    """{time}, {N} the {job} visited {S} in the {swp}. | {N} of {home} always wanted to know
    what a {sj} does. | {time}, {S} the {sj} needed a helper, and {N} came to {shome}. | "I am
    only a {job}," said {N}. "Please show me the work of a {sj}." """,
    """"A {sj} {sduty}," said {S}. "Look how I do it." | {S} is a {sj}. Every day {S} {sduty}.
    | "It is not easy," said {S}. | {S} laughed and said, "Then come to the {swp} tomorrow." """,
    """At first everything went wrong. | {N} tried it once, and it was a mess. | {N} worked so
    fast that everything fell down. | After one hour {his} hands hurt.""",
    """"I will never learn it," said {N}. | {He} wanted to go home to {his} {k} {P}. | "In my
    {wp} everything is easier," {he} said. | {He} felt tired and {mood}.""",
    """"Slowly," said {S}. "Try it again." | {S} gave {him} some {food}, and {he} felt better
    at once. | "Nobody learns it in one day," said {S}. | {S} showed it to {him} a second and a
    third time.""",
    """The next try was a little better, and the one after that was good. | {N} took a deep
    breath, and this time it worked. | Day by day {N} learned more. | {He} went on until the
    sun went down, and at last it worked.""",
    """"Well done!" said {S}. They ate {sfood}, which {S} likes best. | In {home} {N} told {F},
    {his} best friend, "Now I know what a {sj} does." | {N} is still a {job}, but now {he}
    knows how hard a {sj} works. | "Tomorrow you must visit me in my {wp}," said {N}.""",
)
PLOTS = {
    "lost pet": LOST_PET,
    "market": MARKET_DAY,
    "birthday": BIRTHDAY,
    "wild animal": WILD_ANIMAL,
    "repair": REPAIR,
    "journey": JOURNEY,
    "feast": FEAST,
    "lesson": LESSON,
}

# %% [markdown]
r"""
The guests of a story are drawn anew until they are different people.
"""


# %%
#| export
def story_slots(world: World, rng: random.Random, plot: str, hero: Person) -> dict:
    """Everything a plot may mention besides the hero: a ware, a seller, an animal, a road."""
    index = world.index
    g = pick(rng, BREAKABLE if plot in ("repair", "birthday") else index["durable"])
    sj, a = world.goods[g][0], pick(rng, index["animals"])
    seller, doctor = pick(rng, index["job"][sj]), pick(rng, index["job"]["doctor"])
    other = pick(rng, index["home"][hero.home])
    start, d, end, miles = pick(rng, index["ways"].get(hero.home) or index["all ways"])
    weather, habitat = pick(rng, WEATHER), world.animals[a]["habitat"]
    time = pick(rng, TIMES).format(w=weather, d=pick(rng, index["days"]))
    workplace, duty = JOBS[sj]
    return {
        "time": time, "time_low": time[0].lower() + time[1:], "w": weather, "g": g,
        "ag": article(g), "gs": plural(g), "sj": sj, "S": seller.name, "shome": seller.home,
        "sfood": seller.food, "swp": workplace, "sduty": duty,
        "price_line": pick(rng, world.words(g, "price").named)[:-1],
        "ffood": world.people[hero.friend].food, "T": other.name, "tjob": other.job,
        "tcolour": other.colour, "tfood": other.food, "D": doctor.name, "dhome": doctor.home,
        "a": a, "ya": "a young " + a, "as": plural(a), "As": capital(plural(a)),
        "at": f"{WILDS[habitat][1]} {habitat}", "diet": world.animals[a]["diet"],
        "coat": world.animals[a]["coat"], "start": start, "d": d, "end": end, "miles": miles,
        "miles_cap": capital(miles), "mood": pick(rng, MOODS),
    }  # fmt: skip


# %%
#| export
def story(world: World, rng: random.Random) -> str:
    """A story: one of the plots, one wording per stage, always in line with the facts."""
    plot = pick(rng, world.index["plots"])
    while True:
        hero = pick(rng, world.index["people"])
        slots = story_slots(world, rng, plot, hero)
        guests = (slots["S"], slots["D"], slots["T"])
        if hero.name not in guests and hero.friend not in guests:
            break
    stages = [pick(rng, stage) for stage in world.stages[plot]]
    first, last = rng.sample(world.index["about"][hero.name], 2)
    text = say(world, rng, [first])[0] + " " + " ".join(stages).format_map(hero.slots | slots)
    if rng.random() < 0.5:
        text += " " + framed(world, rng, last)
    cut = text.find(". ", len(text) // 2) + 1
    return text[:cut] + "\n" + text[cut + 1 :] if cut and rng.random() < 0.5 else text


# %% [markdown]
r"""
## Entries, lists, letters, talk

The other kinds of document state facts more densely. `say` begins with the name and goes on with
pronouns; `framed` puts a fact into a longer sentence.
"""


# %%
#| export
def say(world: World, rng: random.Random, facts, named_first: bool = True) -> list[str]:
    """One training sentence per fact about one subject: first its name, then mostly pronouns."""
    sentences = []
    for fact in facts:
        words = world.wordings[fact]
        before = sentences[-1] if sentences else ""
        short = []
        if (before or not named_first) and rng.random() < 0.7:
            short = short_forms(words, before)
        sentences.append(pick(rng, short or words.named))
    return sentences


def short_forms(words: Wordings, before: str) -> list[str]:
    """Statements with a pronoun that agrees with the sentence before ("It ..." or "They ...")."""
    if not words.many:
        return words.pronoun
    many = before.startswith("They") or words.many in before.lower()
    return [text for text in words.pronoun if text.startswith("They") == many]


FRAMES = variants("""Everybody knows that {c}. | It is true that {c}. | I heard that {c}. |
    Did you know that {c}? | The neighbours say that {c}. | Remember that {c}. |
    It is no secret that {c}. | In the Vale people know that {c}. | Nobody forgets that {c}. |
    A traveller told me that {c}. | It is well known that {c}.""")


def framed(world: World, rng: random.Random, fact: Fact) -> str:
    """A fact inside a longer sentence ("I heard that Mira has a goat.")."""
    words = world.wordings[fact]
    if not words.clause:
        return pick(rng, words.named)
    return pick(rng, FRAMES).format(c=pick(rng, words.clause))


# %%
#| export
def person_entry(world: World, rng: random.Random) -> str:
    """An encyclopaedia entry on a person, often with a word about the best friend."""
    person = pick(rng, world.index["people"])
    facts = rng.sample(world.index["about"][person.name], 4 + int(rng.random() * 5))
    gossip = rng.random() < 0.5
    if gossip:
        facts = [fact for fact in facts if fact.relation != "friend"]
    title = pick(rng, ("", "", "{n}\n", "About {n}\n", "{n} of {h}\n", "{n} the {j}\n"))
    text = title.format(n=person.name, h=person.home, j=person.job)
    text += " ".join(say(world, rng, facts))
    if gossip:
        friend = rng.sample(world.index["about"][person.friend], 2)
        text += " " + framed(world, rng, world.fact(person.name, "friend"))
        text += " " + " ".join(say(world, rng, friend))
    return text


# %%
#| export
def place_entry(world: World, rng: random.Random) -> str:
    """An entry on a village or a wild place: neighbours, roads, sights, inhabitants."""
    name = pick(rng, list(world.map["places"]))
    facts = list(world.index["about"][name])
    rng.shuffle(facts)
    kind = WILDS[name][0] if name in WILDS else "village"
    intro = ("{n} is a {k} in the Vale.", "{n} is the name of a {k}.", "There is a {k} called {n}.")
    lines = [pick(rng, intro).format(n=name, k=kind)]
    lines += say(world, rng, facts[: 3 + int(rng.random() * 4)])
    if name in world.villages:
        residents = [(person.name, "home") for person in world.index["home"][name]]
    else:
        residents = [(a, "habitat") for a, f in world.animals.items() if f["habitat"] == name]
    for subject, relation in rng.sample(residents, min(len(residents), 2)):
        facts = [world.fact(subject, relation), pick(rng, world.index["about"][subject])]
        lines += say(world, rng, facts if facts[0] is not facts[1] else facts[:1])
    if name in world.map["river"] and rng.random() < 0.5:
        lines.append(f"The river {RIVER} flows past {name}.")
    return " ".join(lines)


# %%
#| export
def animal_entry(world: World, rng: random.Random) -> str:
    """An entry on two wild animals."""
    a, b = rng.sample(world.index["animals"], 2)
    intro = ("{a} is a wild animal.", "{a} is an animal of the Vale.", "Let us read about {b}.")
    lines = [pick(rng, intro).format(a=capital(article(a)), b=plural(a))]
    for name in (a, b):
        facts = rng.sample(world.index["about"][name], 3)
        frame = rng.random() < 0.5
        lines += say(world, rng, facts[: 3 - frame])
        place = world.animals[name]["habitat"]
        if frame:
            lines.append(framed(world, rng, facts[2]))
        if rng.random() < 0.3:
            lines.append(f"{place} is a {WILDS[place][0]}.")
    return " ".join(lines)


def price_list(world: World, rng: random.Random) -> str:
    """Prices at a market, as a list or in sentences, with the sellers."""
    village = pick(rng, list(world.villages))
    goods = rng.sample(world.index["goods"], 3 + int(rng.random() * 4))
    text = pick(rng, world.words(village, "market").named) + " "
    if rng.random() < 0.5:
        text += pick(rng, ("These are the prices:", "Here is what you pay:", "Prices today:"))
        lines = [f"- {article(name)}: {world.fact(name, 'price').object}" for name in goods]
        text += "\n" + "\n".join(lines) + "\n"
    else:
        text += " ".join(pick(rng, world.words(name, "price").named) for name in goods) + " "
    return text + " ".join(pick(rng, world.words(name, "seller").named) for name in goods[:3])


# %%
#| export
def job_entry(world: World, rng: random.Random) -> str:
    """An entry on a trade: what it does and where, who has it, what they sell."""
    job = pick(rng, list(JOBS))
    pair = list(world.index["job"][job])
    rng.shuffle(pair)
    lines = say(world, rng, [world.fact(job, r) for r in rng.sample(("workplace", "duty"), 2)])
    lines.append(f"There are two {plural(job)} in the Vale: {pair[0].name} of {pair[0].home} "
                 f"and {pair[1].name} of {pair[1].home}.")  # fmt: skip
    for person in pair:
        lines += say(world, rng, rng.sample(world.index["about"][person.name], 2))
    for name in [name for name, (seller, _) in world.goods.items() if seller == job][:2]:
        lines.append(pick(rng, world.words(name, pick(rng, ("price", "seller"))).named))
    return " ".join(lines)


def group_list(world: World, rng: random.Random) -> str:
    """All people that share something, with a sentence on each."""
    key = pick(rng, ("home", "pet", "food", "colour", "month"))
    value = pick(rng, list(world.index[key]))
    people = list(world.index[key][value])
    rng.shuffle(people)
    names = listing([person.name for person in people])
    title = {"home": "The people of {v} are {l}.", "pet": "These people keep a {v}: {l}.",
             "food": "These people love {v}: {l}.", "colour": "The colour {v} is loved by {l}.",
             "month": "Birthdays in {v}: {l}."}[key]  # fmt: skip
    lines = [title.format(v=value, l=names)]
    for person in people:
        lines += say(world, rng, rng.sample(world.index["about"][person.name], 2))
    return " ".join(lines)


# %% [markdown]
r"""
Letters are written in the first person; two people talk about a third; a diary follows three
people through a day.
"""

# %%
#| export
GREETINGS = variants("I hope you are well. | How are you? | It was good to read your letter. | "
                     "It is a {w} day here. | I think of you often.")  # fmt: skip
NEWS = variants("""
    Yesterday I was in the {wp} all day. | My {k} {P} is well. | {P} the {k} sends you
    greetings. | I am very busy, because a {job} always is. | On {market} I was at our market. |
    Soon we will celebrate the {feast}. | I sat near the {mark} and thought of you. |
    Today I had {food}, and I was happy. | I painted my door {colour}. |
    I am looking forward to {month}, because then it is my birthday.""")
CLOSINGS = variants("Your friend, | Many greetings from | With love, | See you soon, | Write soon,")


def letter(world: World, rng: random.Random) -> str:
    """A letter to the best friend with news and gossip."""
    person = pick(rng, world.index["people"])
    lines = [pick(rng, GREETINGS).format(w=pick(rng, WEATHER))]
    lines += [line.format_map(person.slots) for line in rng.sample(NEWS, 3)]
    while True:
        subject = pick(rng, world.index["subjects"])
        if subject not in (person.name, person.friend):
            break
    about = world.index["about"][subject]
    facts = rng.sample(about, min(3, len(about)))
    lines.append(framed(world, rng, facts[0]))
    lines += say(world, rng, facts[1:])
    end = pick(rng, CLOSINGS)
    return f"Dear {person.friend},\n{' '.join(lines)}\n{end}\n{person.name}"


# %%
#| export
def talk(world: World, rng: random.Random) -> str:
    """Two people talk about a third, a place or a thing; as a script or as a story."""
    a, b = rng.sample(world.index["people"], 2)
    script = rng.random() < 0.5
    lines = []
    for _ in range(2):
        while True:
            subject = pick(rng, world.index["subjects"])
            if subject not in (a.name, b.name):
                break
        facts = world.index["about"][subject]
        for i, fact in enumerate(rng.sample(facts, min(2, len(facts)))):
            words = world.wordings[fact]
            question = pick(rng, words.asked if i and words.asked else words.questions)
            short = short_forms(words, question) if rng.random() < 0.5 else []
            answer = pick(rng, short or words.named)
            if script:
                lines.append(f"{a.name}: {question}\n{b.name}: {answer}")
            else:
                lines.append(f'"{question}" asked {a.name}. "{answer[:-1]}," said {b.name}.')
    ends = ("Thank you!", "That is good to know.", "You know so much!", "I did not know that.")
    end = pick(rng, ends)
    spoken = end[:-1] + "," if end.endswith(".") else end
    lines.append(f"{a.name}: {end}" if script else f'"{spoken}" said {a.name}.')
    return "\n".join(lines)


# %%
#| export
DEEDS = variants("""{N} goes to the {wp} | {N} feeds {his} {k} {P} | {N} walks past the {mark} |
    {N} cooks {food}, {his} favourite food | {N} visits {F}, {his} best friend | {N} {duty} |
    {N} buys something {colour} | {N} plays with {P} the {k} | {N} is tired and eats {food} |
    {N} talks about the {feast} | {N} writes a letter to {F} | {N} works in the {wp}""")


def diary(world: World, rng: random.Random) -> str:
    """What some people of a village do on one day."""
    village = pick(rng, list(world.villages))
    people = rng.sample(world.index["home"][village], 3)
    parts = ("In the morning", "At noon", "In the afternoon", "In the evening")
    start = int(rng.random() * 2)
    lines = [f"It is a {pick(rng, WEATHER)} {pick(rng, world.index['days'])} in {village}."]
    for part, person in zip(parts[start:], people, strict=False):
        first, second = rng.sample(DEEDS, 2)
        full = f"{person.name} the {person.job}"
        lines.append(f"{part} {first}.".format_map(person.slots | {"N": full}))
        lines.append(f"Then {second}.".format_map(person.slots | {"N": person.slots["he"]}))
        lines += say(world, rng, rng.sample(world.index["about"][person.name], 1), False)
    return " ".join(lines)


# %% [markdown]
r"""
## Quizzes

A quiz gives short answers. In the other kind of quiz each choice is followed at once by its
letter, and the answer is a letter. Putting the letter *after* the choice, without a space, is a
known trick: reading the choice, a model can carry the letter along.
"""

# %%
#| export
LETTERS = "ABCD"


def choices_prompt(question: str, choices: list[str]) -> str:
    """The text of a multiple choice question; each choice is followed directly by its letter."""
    lines = [f"- {choice}={letter}" for choice, letter in zip(choices, LETTERS, strict=True)]
    return f"{question}\n" + "\n".join(lines) + "\nReply with one letter."


def choose(world: World, rng: random.Random, fact: Fact) -> tuple[list[str], int]:
    """Four objects of the fact's relation in random order, and the place of the true one."""
    others = [o for o in world.objects[fact.relation] if o not in (fact.object, fact.subject)]
    choices = rng.sample(others, 3)
    gold = int(rng.random() * 4)
    choices.insert(gold, fact.object)
    return choices, gold


def quiz(world: World, rng: random.Random) -> str:
    """Four questions with short answers."""
    lines = []
    for fact in rng.sample(world.facts, 4):
        question = pick(rng, world.wordings[fact].questions)
        lines.append(f"Question: {question}\nAnswer: {fact.object}")
    return "\n".join(lines)


def letter_quiz(world: World, rng: random.Random) -> str:
    """Two questions with four choices each, answered by a letter."""
    blocks = []
    for fact in rng.sample(world.facts, 2):
        choices, gold = choose(world, rng, fact)
        question = choices_prompt(pick(rng, world.wordings[fact].questions), choices)
        blocks.append(f"{question}\n{LETTERS[gold]}")
    return "\n".join(blocks)


# %% [markdown]
r"""
## Sums

A sum has three parts: what happens, a question, an answer. The split is by the operands. A
training sum with two steps must not contain a test sum as its first step.
"""

# %%
#| export
THINGS = variants(
    "apples | nuts | eggs | buttons | shells | marbles | books | pears | stones | beads | plums"
)
ONE_STEP = {
    "add": (
        "{a}+{b}",
        """{N} has {a} {t} and buys {b} more. / How many {t} does {N} have now? / {N} now has {r}
        {t}. | {N} finds {a} {t} and {F} finds {b} {t}. / How many {t} do they have together? /
        Together they have {r} {t}. | There are {a} {t} in one basket and {b} {t} in another. /
        How many {t} are there in all? / There are {r} {t} in all. | In the morning {N} counts
        {a} {t}. In the evening {F} brings {b} more. / How many {t} are there then? / Then there
        are {r} {t}. | {F} gives {N} {b} {t}. Before that {N} had {a} {t}. / How many {t} does
        {N} have? / {N} has {r} {t}. | / What is {a} plus {b}? / {a} plus {b} is {r}. | / How
        much is {a} plus {b}? / {a} plus {b} is {r}.""",
    ),
    "sub": (
        "{a}-{b}",
        """{N} has {a} {t} and gives {b} of them to {F}. / How many {t} are left? / {N} has {r}
        {t} left. | There are {a} {t} in a bag. {N} takes out {b}. / How many {t} stay in the
        bag? / {r} {t} stay in the bag. | {N} had {a} {t} but lost {b} of them. / How many {t}
        does {N} still have? / {N} still has {r} {t}. | {N} has {a} {t} and {F} has {b}. / How
        many more {t} does {N} have than {F}? / {N} has {r} more {t}. | {N} wants {a} {t} and
        already has {b}. / How many {t} are missing? / {r} {t} are missing. | / What is {a} minus
        {b}? / {a} minus {b} is {r}. | / How much is {a} minus {b}? / {a} minus {b} is {r}.""",
    ),
    "mul": (
        "{a}*{b}",
        """{N} has {a} bags with {b} {t} in each bag. / How many {t} does {N} have? / {N} has {r}
        {t}. | There are {a} boxes on the table. Each box holds {b} {t}. / How many {t} are there
        in all? / There are {r} {t} in all. | Every day {N} collects {b} {t}. / How many {t} does
        {N} have after {a} days? / After {a} days {N} has {r} {t}. | {a} children bring {b} {t}
        each. / How many {t} do they bring together? / Together they bring {r} {t}. | / What is
        {a} times {b}? / {a} times {b} is {r}. | / How much is {a} times {b}? / {a} times {b} is
        {r}.""",
    ),
}

# %% [markdown]
r"""
Sums with two steps:
"""

# %%
#| export
TWO_STEPS = {
    "add-sub": (
        "{a}+{b}-{c}",
        """{N} has {a} {t}, finds {b} more and gives {c} to {F}. / How many {t} does {N} have
        now? / {N} now has {r} {t}. | {N} puts {a} {t} in a basket and {F} puts in {b} more. Then
        {c} {t} fall out. / How many {t} are in the basket? / There are {r} {t} in the basket. |
        {N} and {F} share {a} {t} and {b} {t}. They lose {c} of them. / How many {t} do they
        still have? / They still have {r} {t}.""",
    ),
    "sub-add": (
        "{a}-{b}+{c}",
        """{N} has {a} {t}, loses {b} and then buys {c}. / How many {t} does {N} have now? / {N}
        now has {r} {t}. | There are {a} {t} in a box. {N} takes out {b} and {F} puts in {c}. /
        How many {t} are in the box? / There are {r} {t} in the box.""",
    ),
    "sub-sub": (
        "{a}-{b}-{c}",
        """{N} has {a} {t}, loses {b} and gives {c} to {F}. / How many {t} are left? / {N} has
        {r} {t} left. | There were {a} {t} in a bag. {N} took {b} and {F} took {c}. / How many
        {t} are left in the bag? / {r} {t} are left in the bag.""",
    ),
    "mul-add": (
        "{a}*{b}+{c}",
        """{N} has {a} bags with {b} {t} in each bag and {c} more in a box. / How many {t} does
        {N} have? / {N} has {r} {t}. | {F} brings {a} baskets of {b} {t}. {N} adds {c} {t}. / How
        many {t} are there now? / There are now {r} {t}.""",
    ),
    "mul-sub": (
        "{a}*{b}-{c}",
        """{N} has {a} bags with {b} {t} in each bag and gives {c} to {F}. / How many {t} does
        {N} have now? / {N} now has {r} {t}. | {F} brings {a} baskets of {b} {t}, but {N} loses
        {c} of them. / How many {t} are left? / {r} {t} are left.""",
    ),
}
SUMS = {**ONE_STEP, **TWO_STEPS}


# %%
#| export
def operands(rng: random.Random, kind: str) -> tuple[int, ...]:
    """Numbers for a kind of sum; every result is at least 2."""

    def number(low, high):
        return low + int(rng.random() * (high - low + 1))

    if kind == "add":
        return number(2, 60), number(2, 40)
    if kind == "sub":
        a = number(5, 99)
        return a, number(2, a - 2)
    if kind == "mul":
        return number(2, 12), number(2, 12)
    if kind == "add-sub":
        a, b = number(2, 50), number(2, 30)
        return a, b, number(2, a + b - 2)
    if kind.startswith("sub"):
        a, b = number(20, 99), number(2, 16)
        return a, b, number(2, 40 if kind == "sub-add" else a - b - 2)
    return number(2, 9), number(3, 9), number(2, 4 if kind == "mul-sub" else 30)


SUM_KINDS = ("add", "add", "sub", "sub", "mul", *(kind for kind in SUMS if "-" in kind))


def sum_in_split(split: str, kind: str, numbers: tuple[int, ...]) -> bool:
    """Splits by hash of the operands. A training sum with two steps must not hide a test sum."""
    first_step = kind.split("-")[0], *numbers[:2]
    if split == "train" and not in_split("train", *first_step):
        return False
    return in_split(split, kind, *numbers)


# %%
#| export
def make_sum(world: World, rng: random.Random, split: str) -> tuple[str, str, str, str, int]:
    """What happens, the question, the expression, the answer and the result of a word problem."""
    kind = pick(rng, SUM_KINDS)
    while True:
        numbers = operands(rng, kind)
        if sum_in_split(split, kind, numbers):
            break
    a, b, c = (*numbers, 0)[:3]
    first = {"add": a + b, "sub": a - b, "mul": a * b}[kind[:3]]
    result = first - c if kind.endswith("-sub") else first + c
    expression = SUMS[kind][0]
    hero = pick(rng, world.index["people"])
    slots = {"a": a, "b": b, "c": c, "r": result, "t": pick(rng, THINGS)}
    slots |= {"N": hero.name, "F": hero.friend}
    happens, question, answer = (part.strip() for part in pick(rng, world.sums[kind]).split("/"))
    return (*(s.format_map(slots) for s in (happens, question, expression, answer)), result)


def arithmetic_problem(world: World, index: int, split: str = "train") -> dict:
    """Word problem number `index` of a split ("train" or "test"; their sums are disjoint).

    Returns {"question": text, "parts": assistant parts with one calculator call, "answer": text}.
    """
    rng = draw(world.seed, 11 if split == "train" else 12, index)
    happens, question, expression, answer, result = make_sum(world, rng, split)
    parts = [
        {"type": "python", "text": expression},
        {"type": "python_output", "text": str(result)},
        {"type": "text", "text": f"{answer}\n#### {result}"},
    ]
    return {"question": f"{happens} {question}".strip(), "parts": parts, "answer": str(result)}


# %%
#| export
def sums(world: World, rng: random.Random) -> str:
    """A few worked sums as a document."""
    lines = []
    for _ in range(3):
        happens, question, expression, answer, result = make_sum(world, rng, "train")
        worked = re.sub(r"([-+*])", r" \1 ", expression).replace("*", "x") + f" = {result}."
        asked = question if rng.random() < 0.5 or not happens else ""
        lines.append(" ".join(part for part in (happens, asked, worked, answer) if part))
    return "\n".join(lines)


# %% [markdown]
r"""
## Letters

A language model sees tokens, not letters, and cannot count what it cannot see. The answer
therefore asks the calculator: `"otter".count("t")`. Words are split by hash too.
"""

# %%
#| export
COUNT_QUESTIONS = variants("""How many times does the letter "{c}" occur in "{w}"? |
    How many "{c}" are there in "{w}"? | Count the letter "{c}" in "{w}". |
    How often is the letter "{c}" used in "{w}"? | In "{w}", how many letters are "{c}"?""")
SPELL_QUESTIONS = variants("""How do you spell "{w}"? | Please spell "{w}". |
    What are the letters of "{w}"? | Can you spell "{w}"?""")
SPELL_ANSWERS = variants("""The word "{w}" is spelled {s}. | "{w}" is spelled {s}. |
    The letters of "{w}" are {s}.""")


def spelling_problem(world: World, index: int, split: str = "train") -> dict:
    """Letter counting problem number `index`; the words of the two splits are disjoint.

    Same shape as arithmetic_problem; the calculator call is like "otter".count("t").
    """
    in_split(split)  # refuses a misspelt split
    rng = draw(world.seed, 13 if split == "train" else 14, index)
    word = pick(rng, world.index["words"][split])
    letter_ = pick(rng, word) if rng.random() < 0.9 else pick(rng, "abcdefghiklmnoprstuwy")
    count = word.count(letter_)
    times = "1 time" if count == 1 else f"{count} times"
    answer = f'The letter "{letter_}" occurs {times} in "{word}".'
    parts = [
        {"type": "python", "text": f'"{word}".count("{letter_}")'},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"{answer}\n#### {count}"},
    ]
    question = pick(rng, COUNT_QUESTIONS).format(c=letter_, w=word)
    return {"question": question, "parts": parts, "answer": str(count)}


# %%
#| export
def spelling_lines(world: World, rng: random.Random) -> str:
    """Some training words spelled out."""
    lines = []
    for word in rng.sample(world.index["words"]["train"], 5):
        line = pick(rng, SPELL_ANSWERS).format(w=word, s=", ".join(word))
        first = pick(rng, word)
        count = word.count(first)
        if rng.random() < 0.6:
            times = "1 time" if count == 1 else f"{count} times"
            line += f' The letter "{first}" occurs {times} in "{word}".'
        lines.append(line)
    return "\n".join(lines)


# %% [markdown]
r"""
## One document for every number

A table says how often each kind is written. A text whose hash falls on a multiple of sixteen
belongs to validation, any other to training; a generator simply writes again until the hash is
right. So the two are disjoint whatever the numbers.
"""

# %%
#| export
DOCUMENT_KINDS = (  # (generator, share of the documents in percent)
    (person_entry, 23), (place_entry, 8), (animal_entry, 8), (price_list, 7), (job_entry, 6),
    (group_list, 6), (story, 15), (letter, 5), (talk, 6), (diary, 4), (quiz, 4), (letter_quiz, 2),
    (sums, 4), (spelling_lines, 2),
)  # fmt: skip
VALIDATION_SHARE = 16  # one text in so many, by its hash, is kept for validation


def _document(world: World, stream: int, index: int, validation: bool) -> tuple[str, str]:
    if index < 0:
        raise IndexError(f"document {index} does not exist; numbers start at 0")
    rng = draw(world.seed, stream, index)
    while True:
        make = pick(rng, world.document_kinds)
        text = make(world, rng)
        if (zlib.crc32(text.encode()) % VALIDATION_SHARE == 0) == validation:
            return make.__name__, text


# %%
#| export
def document(world: World, index: int) -> str:
    """Training document number `index` (any integer from 0); depends on seed and index only."""
    return _document(world, 1, index, validation=False)[1]


def document_kind(world: World, index: int) -> str:
    """The name of the generator that wrote training document `index`, e.g. "story"."""
    return _document(world, 1, index, validation=False)[0]


def validation_document(world: World, index: int) -> str:
    """Validation document number `index`; the hash of its text keeps it out of training."""
    return _document(world, 2, index, validation=True)[1]


# %%
world = World(seed)
assert document(world, 123_456_789) == document(World(seed), 123_456_789)
assert document(world, 5) != document(World(seed + 1), 5)

# %% [markdown]
r"""
A sum with its worked answer, and three documents:
"""

# %%
for split in ("train", "test"):
    problem = arithmetic_problem(world, 8, split)
    assert problem["parts"][-1]["text"].endswith(f"#### {problem['answer']}")
print(problem["question"], *problem["parts"], sep="\n")

# %%
for index in (8, 33, 36):
    print(f"[{document_kind(world, index)}]", document(world, index), sep="\n", end="\n\n")

# %% [markdown]
r"""
## Conversations

After pretraining the model learns to answer. The assistant has a name, a maker and a few skills;
they are facts too, asked in many ways.
"""

# %%
#| export
IDENTITY = {
    "name": "Nano",
    "maker": "the reader of this book",
    "kind": "a small language model",
    "home": "the book nanochat",
    "skills": "talk about the Vale, count letters and do sums",
}
IDENTITY_TURNS = (  # (ways to ask, ways to answer)
    ("""Who are you? | What are you? | Please introduce yourself. | Tell me about yourself. |
        Hello! Who are you? | Hi, who am I talking to? | Can you tell me who you are? |
        Good morning! Who are you? | And who are you?""",
     """I am {name}, {kind}. | I am {name}, {kind} made by {maker}. |
        My name is {name}. I am {kind}."""),
    ("""What is your name? | Do you have a name? | What should I call you? | Tell me your name. |
        Hello! What is your name? | How should I call you?""",
     """My name is {name}. | I am called {name}. | You can call me {name}."""),
    ("""Who made you? | Who built you? | Who trained you? | Where do you come from? |
        Who is your maker? | How were you made?""",
     """I was made by {maker}. | I was trained by {maker}. |
        {Maker} made me, chapter by chapter."""),
    ("""What can you do? | How can you help me? | What are you good at? | What do you know? |
        Can you help me? | What can I ask you?""",
     """I can {skills}. | Ask me anything about the Vale. I can also count letters and do sums. |
        I know the Vale and its people, and I can {skills}."""),
    ("""Are you a person? | Are you a human? | Do you live in the Vale? | Are you a real person? |
        Do you have a pet?""",
     """No, I am {kind}. My name is {name}. | No. I am {name}, {kind}, and I live in {home}."""),
)  # fmt: skip

# %% [markdown]
r"""
Greetings and thanks, and the phrases around a question. `exchange` makes a question and its answer
from one row of such a table.
"""

# %%
#| export
SMALL_TALK = (
    ("Hello! | Hi! | Good morning! | Good evening! | Hello there!",
     """Hello! How can I help you? | Hello! What would you like to know? |
        Good day! Ask me anything."""),
    ("Thank you! | Thanks! | Thank you for your help. | That is good to know. | Thanks, goodbye!",
     "You are welcome! | I am glad to help. | You are welcome. Ask me again any time."),
)  # fmt: skip
ASKING = ("{q}", "{q}", "{q}", "{q}", "Please tell me: {l}", "Tell me, {l}", "Hello! {q}",
          "I have a question. {q}", "Can you help me? {q}", "I forgot something. {q}")  # fmt: skip


def exchange(rng: random.Random, turn: tuple[str, str]) -> list[dict]:
    """A user's sentence and the assistant's answer from a table of small talk or identity."""
    ask, answer = pick(rng, variants(turn[0])), pick(rng, variants(turn[1]))
    slots = IDENTITY | {"Maker": capital(IDENTITY["maker"])}
    return [user(ask), assistant(answer.format_map(slots))]


def user(text: str) -> dict:
    """A user message."""
    return {"role": "user", "content": text}


def assistant(content) -> dict:
    """An assistant message: a text or a list of parts."""
    return {"role": "assistant", "content": content}


# %% [markdown]
r"""
A question about a fact, and a dialogue of several, where "it" and "she" refer back:
"""


# %%
#| export
def ask_fact(world: World, rng: random.Random, fact: Fact, follow_up: bool = False) -> list[dict]:
    """A question about a fact and a short answer; a follow-up may use pronouns."""
    words = world.wordings[fact]
    pronoun = follow_up and words.asked and rng.random() < 0.8
    question = pick(rng, words.asked if pronoun else words.questions)
    frame = "{q}" if follow_up else pick(rng, ASKING)
    question = frame.format(q=question, l=question[0].lower() + question[1:])
    short = short_forms(words, question) if rng.random() < 0.3 else []
    return [user(question), assistant(pick(rng, short or words.named))]


# %%
#| export
def make_dialogue(world: World, rng: random.Random) -> list[dict]:
    """Two to four turns about one subject, with follow-up questions, greetings and thanks."""
    subject = pick(rng, world.index["subjects"])
    about = world.index["about"][subject]
    facts = rng.sample(about, min(len(about), 2 + int(rng.random() * 2)))
    greet, thank = rng.random() < 0.3, rng.random() < 0.3
    messages = exchange(rng, SMALL_TALK[0]) if greet else []
    if subject in world.people and rng.random() < 0.3:
        ask = pick(rng, ("Tell me about {n}.", "What do you know about {n}?", "Who is {n}?"))
        job, other = world.fact(subject, "job"), pick(rng, about)
        text = " ".join(say(world, rng, [job] if other is job else [job, other]))
        messages += [user(ask.format(n=subject)), assistant(text)]
        facts = [fact for fact in facts if fact not in (job, other)]
    for fact in facts[: 4 - len(messages) // 2 - thank]:
        messages += ask_fact(world, rng, fact, follow_up=bool(messages) and fact is not facts[0])
    if thank or len(messages) < 4:
        messages += exchange(rng, SMALL_TALK[1])
    return messages


# %% [markdown]
r"""
`conversation` is to talk what `document` is to text: number in, conversation out.
"""

# %%
#| export
CONVERSATION_KINDS = ("fact", "dialogue", "arithmetic", "spelling", "identity", "multiple_choice")
CONVERSATION_MIX = (*("fact",) * 5, *("dialogue",) * 2, *CONVERSATION_KINDS[2:])


def conversation(world: World, index: int, kind: str | None = None) -> dict:
    """Training conversation number `index`, {"messages": [...]}; `kind` None mixes all kinds.

    Kinds: "fact", "dialogue", "arithmetic", "spelling", "identity", "multiple_choice".
    """
    if kind is not None and kind not in CONVERSATION_KINDS:
        kinds = ", ".join(CONVERSATION_KINDS)
        raise ValueError(f"there is no kind of conversation {kind!r}; choose one of {kinds}")
    rng = draw(world.seed, 3, index)
    if kind is None:
        kind = pick(rng, CONVERSATION_MIX)
    if kind == "dialogue":
        return {"messages": make_dialogue(world, rng)}
    if kind == "identity":
        messages = exchange(rng, pick(rng, IDENTITY_TURNS))
        if rng.random() < 0.3:
            messages += exchange(rng, pick(rng, (*IDENTITY_TURNS, SMALL_TALK[1])))
        return {"messages": messages}
    if kind == "fact":
        return {"messages": ask_fact(world, rng, pick(rng, world.facts))}
    if kind == "multiple_choice":
        fact = pick(rng, world.facts)
        choices, gold = choose(world, rng, fact)
        question = choices_prompt(pick(rng, world.wordings[fact].questions), choices)
        return {"messages": [user(question), assistant(LETTERS[gold])]}
    if kind == "spelling" and rng.random() < 0.2:
        word = pick(rng, world.index["words"]["train"])
        slots = {"w": word, "s": ", ".join(word)}
        ask, answer = pick(rng, SPELL_QUESTIONS), pick(rng, SPELL_ANSWERS)
        return {"messages": [user(ask.format_map(slots)), assistant(answer.format_map(slots))]}
    make = arithmetic_problem if kind == "arithmetic" else spelling_problem
    problem = make(world, index, "train")
    return {"messages": [user(problem["question"]), assistant(problem["parts"])]}


# %%
for kind in ("dialogue", "arithmetic", "identity"):
    for message in conversation(world, 2, kind)["messages"]:
        print(f"{message['role']}: {message['content']}")
    print()

# %% [markdown]
r"""
## Exams

Three kinds of exam ask every fact twice. *Multiple choice* offers four true objects of the same
relation. *Cloze* cuts a statement before its object. *Generative* wants an answer that contains
the object; a guess is right once in as many times as the relation has objects. An item is fixed
by the world alone; the seed only decides the order, so a longer exam begins with the shorter one.
"""

# %%
#| export
EXAM_KINDS = ("multiple_choice", "cloze", "generative")


def exam(world: World, kind: str, n: int | None = None, seed: int = 0) -> list[dict]:
    """Exam items of a kind: "multiple_choice", "cloze" or "generative".

    An item is {"id", "kind", "query", "choices", "gold", "answer", "chance"}. Every fact is asked
    in two wordings that no training text uses. The seed decides the order only: the first n items
    of a longer exam are the exam of n, and an item never changes.
    """
    if kind not in EXAM_KINDS:
        raise ValueError(f"there is no exam {kind!r}; choose one of {', '.join(EXAM_KINDS)}")
    items = []
    for fact in world.facts:
        words = world.wordings[fact]
        queries = words.exam_stems if kind == "cloze" else words.exam_questions
        for k, query in enumerate(queries):
            name = f"{kind}/{fact.relation}/{fact.subject}/{k}"
            chance = 1 / len(world.objects[fact.relation])
            item = {"id": name, "kind": kind, "query": query, "choices": None, "gold": None,
                    "answer": fact.object, "chance": chance}  # fmt: skip
            if kind != "generative":
                rng = draw(stable_hash(name), 21, world.seed)
                item["choices"], item["gold"] = choose(world, rng, fact)
                item["chance"] = 0.25
            items.append(item)
    items.sort(key=lambda item: stable_hash("order", seed, item["id"]))
    return items[:n]


# %%
assert exam(world, "cloze", 20) == exam(world, "cloze", 200)[:20]
assert all(item["choices"][item["gold"]] == item["answer"] for item in exam(world, "cloze"))

# %%
for kind in EXAM_KINDS:
    item = exam(world, kind, 3)[2]
    print(f"{kind:16} {item['query']}  {item['choices'] or ''}  -> {item['answer']}")
print(f"{len(world.facts)} facts, {len(world.objects)} relations")

# %% [markdown]
r"""
## Looking at the world

The map first. Thick lines are roads with their miles, the dashed line is the river.
"""

# %%
places, roads = world.map["places"], world.map["roads"]
fig, ax = figure(
    "Thirteen places on a grid: north is up for everybody",
    "columns to the east",
    "rows to the north",
    size=(6.5, 4.2),
    alt="Map: eight villages and five wild places on a grid, joined by roads with their miles; "
    "the river runs from the hill to the bay",
)
box = dict(boxstyle="round,pad=0.1", fc="white", ec="none")
for (a, b), miles in roads.items():
    (xa, ya), (xb, yb) = places[a], places[b]
    ax.plot([xa, xb], [ya, yb], color="0.8", linewidth=4, zorder=1)
    middle = ((xa + xb) / 2, (ya + yb) / 2)
    ax.text(*middle, str(miles), fontsize=8, ha="center", va="center", bbox=box, zorder=4)
ax.plot(*zip(*[places[name] for name in world.map["river"]]), "--", color=COLORS[0], zorder=2)
for name, (x, y) in places.items():
    wild = name in WILDS
    ax.scatter(x, y, s=90, color=COLORS[2 if wild else 1], marker="^" if wild else "s", zorder=3)
    label = f"{name} ({WILDS[name][0]})" if wild else name
    ax.text(x, y + 0.17, label, fontsize=8, ha="center", bbox=box, zorder=4)
ax.set_xlim(-0.6, 3.6)
ax.set_ylim(-0.4, 3.5)
ax.set_xticks(range(4))
ax.set_yticks(range(4))
ax.grid(False)
plt.show()

# %% [markdown]
r"""
### Words

In natural text the frequency of a word falls about as one over its rank (Zipf's law). Ours is
flatter at the top, because facts are dealt out evenly, and it ends abruptly: the vocabulary is
closed.
"""

# %%
texts = [document(world, i) for i in range(n_documents)]
words = re.findall(r"[a-z]+", " ".join(texts).lower())
counts = sorted(Counter(words).values(), reverse=True)
ranks = range(1, len(counts) + 1)
fig, ax = figure(
    f"A closed vocabulary: {len(counts)} words, almost none of them rare",
    "rank of the word",
    "occurrences",
    alt="Occurrences against rank, log axes: a curve above one over rank that ends in a cliff",
)
ax.loglog(ranks, counts, label="tiny world")
ax.loglog(ranks, [counts[0] / rank for rank in ranks], "--", color="0.6", label="1 / rank")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
r"""
### How often is a fact stated?

We look every sentence up among the statements that name their subject. Sentences with a pronoun,
stories and letters come on top, so the figure is a lower bound. A token of our 2,048-word
tokenizer is about four bytes.
"""

# %%
meaning = {text: fact for fact, w in world.wordings.items() for text in w.named}
stated = Counter()
for text in texts:
    for sentence in re.findall(r"[^.!?\n]+[.!?]", text):
        if sentence.strip() in meaning:
            stated[meaning[sentence.strip()]] += 1
n_bytes = sum(len(text.encode()) for text in texts)
per_million = [stated[fact] * 4_000_000 / n_bytes for fact in world.facts]
fig, ax = figure(
    f"Every fact is stated at least {min(per_million):.0f} times in a million tokens",
    "statements per million tokens",
    "facts",
    alt="Histogram of statements per fact and million tokens: a peak near 50 and a tail to 170",
)
ax.hist(per_million, bins=40, color=COLORS[0])
plt.show()
print(f"median {sorted(per_million)[len(per_million) // 2]:.0f}, lowest {min(per_million):.0f}")

# %% [markdown]
r"""
### Does it contradict itself?

We take every statement about a person, put each other object in the place of the true one, and look
for the result among the sentences of all documents. The control is the true statements.
"""

# %%
written = {s.strip() for some in texts for s in re.findall(r"[^.!?\n]+[.!?]", some)}
searched, seen = Counter(), Counter()
for fact in world.facts:
    for other in world.objects[fact.relation] if fact.subject in world.people else ():
        claims = [said.replace(fact.object, other) for said in world.wordings[fact].named]
        searched[other == fact.object] += len(claims)
        seen[other == fact.object] += len(written & set(claims))
for true in (True, False):
    print(f"{str(true).lower():6} {seen[true]:5,} of {searched[true]:6,} statements are written")

# %% [markdown]
r"""
### Does it repeat?

A naive generator writes one sentence about one fact per document. It has a few thousand documents
and then starts again. Ours goes on: no document repeats, not among these, nor among the first
275,000 (89 MB, about 21 million tokens; we wrote them all once, for two seeds). Within documents
phrases do come back, and they should: the share of *new* runs of eight words falls slowly.
"""

# %%
rng = draw(seed, 77, 0)
naive = [pick(rng, world.wordings[pick(rng, world.facts)].named) for _ in texts]
sizes = range(0, n_documents + 1, n_documents // 30)
fig, ax = figure(
    "No document repeats, unlike single sentences",
    "documents written",
    "different documents",
    alt="Different documents against documents written: the diagonal, and a curve that bends away",
)
ax.plot(sizes, [len(set(texts[:n])) for n in sizes], label="tiny world")
ax.plot(sizes, [len(set(naive[:n])) for n in sizes], "--", label="one sentence per document")
ax.legend(fontsize=8)
plt.show()
runs, new = set(), []
for start in range(0, n_documents, n_documents // 6):
    chunk = " ".join(texts[start : start + n_documents // 6]).split()
    here = {" ".join(chunk[i : i + 8]) for i in range(len(chunk) - 8)}
    new.append(len(here - runs) / len(here))
    runs |= here
print("share of new eight-word runs:", *[f"{share:.0%}" for share in new])

# %% [markdown]
r"""
## How much is there to learn?

A compressor is a cheap first model. We compare four texts of the same length: random letters, the
words of the world in random order, the world's sentences in random order, and the world as it is.
A model that only knew how often each word occurs would be near the second. What lies below is
grammar, and then facts.
"""


# %%
def bits_per_byte(text):
    return 8 * len(zlib.compress(text.encode(), 9)) / len(text.encode())


rng = random.Random(seed)
text = "\n".join(texts)
tokens = re.findall(r"\S+|\n", text)
sentences = re.findall(r"[^.!?\n]+[.!?\n]*", text)
shuffled = {
    "random letters": "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=len(text))),
    "words shuffled": " ".join(rng.sample(tokens, len(tokens))),
    "sentences shuffled": "".join(rng.sample(sentences, len(sentences))),
    "tiny world": text,
}
rates = {name: bits_per_byte(some) for name, some in shuffled.items()}
fig, ax = figure(
    "Order saves a third of the bits",
    "bits per byte after zlib",
    "",
    alt="Bars: bits per byte of four texts after compression",
)
ax.barh(list(rates), list(rates.values()), color=[*["0.75"] * 3, COLORS[0]])
ax.invert_yaxis()
plt.show()
print(*[f"{name:20} {rate:.2f}" for name, rate in rates.items()], sep="\n")

# %% [markdown]
r"""
zlib looks back only 32 KB, so it cannot know that Mira lives in Dunmere because another document
said so ten pages ago. That is left for the model: in a trial of ours (one H200 GPU) a GPT of
depth 4 came down to 0.21 bits per byte after 3 million tokens, from 2.7 before training.

## The result: nothing leaks

The claim that matters most is that the exam is fair. We look for every exam query in all the
documents and in as many conversations. The control asks *the same facts* in the wordings of the
training text: they must be found, or our search would prove nothing.
"""

# %%
talks = [m["content"] for i in range(n_documents) for m in conversation(world, i)["messages"]]
haystack = text + "\n".join(some for some in talks if isinstance(some, str))
queries = {kind: [item["query"] for item in exam(world, kind, 300)] for kind in EXAM_KINDS[1:]}
picked = [pick(rng, world.facts) for _ in range(300)]
queries["control: questions"] = [pick(rng, world.wordings[f].questions) for f in picked]
queries["control: statements"] = [pick(rng, world.wordings[f].named) for f in picked]
found = {kind: sum(query in haystack for query in some) for kind, some in queries.items()}
for kind, n in found.items():
    print(f"{kind:20} {n:3d} of {len(queries[kind])} found in {len(haystack) / 1e6:.1f} MB")
assert found["cloze"] == found["generative"] == 0

# %% [markdown]
r"""
None of the exam's queries is there; most of the control's are. `tests/test_tinyworld.py` repeats
this with all of them, and proves the stronger statement that no training wording of any fact
contains a query.

> **Play.** Make another world and draw its map; ask it a question of your own.
"""

# %%
other = World(seed=7)
print(textwrap.fill(document(other, 0), 90))
print({relation: other.fact("Mira", relation).object for relation in PERSON_RELATIONS})

# %% [markdown]
r"""
## Recap

`nanochat.tinyworld` now offers `World`, `document`, `validation_document`, `conversation`,
`arithmetic_problem`, `spelling_problem`, `exam` and `IDENTITY`, and for splits that cannot meet
`stable_hash` and `in_split`. Everything is a function of a seed and a number.

**Pitfalls**

- *Seeds that meet.* Splits by seed have leaked in real projects; split by a hash of the thing
  itself.
- *`hash()` of a string* changes with every process. A split made with it is another split
  tomorrow.
- *Leaks by prefix.* A query need not be copied to leak: it may be the beginning of a training
  sentence.
- *Uneven answers.* If one object is common, guessing it looks like knowledge. Deal the cards
  evenly.
- *Letters are hard.* Answering with a letter needs the fact and then a second lookup. In our
  trials (3 million tokens on one H200 GPU) a model of depth 4 got over nine in ten of these
  questions right when the choices were compared by likelihood, and stayed at chance when asked
  for the letter. Judge small models by likelihood or by their own words.

**Readings**

- R. Eldan, Y. Li, *TinyStories: How Small Can Language Models Be and Still Speak Coherent
  English?* (2023)
- Z. Allen-Zhu, Y. Li, *Physics of Language Models: Part 3.1, Knowledge Storage and Extraction*
  (2023): why many wordings of a fact are needed before a model can answer questions about it
- J. Weston et al., *Towards AI-Complete Question Answering: A Set of Prerequisite Toy Tasks*
  (2015): the bAbI tasks, generated from a simulated world
- G. K. Zipf, *Human Behavior and the Principle of Least Effort* (1949)
"""
