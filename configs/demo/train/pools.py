"""Where every random name, number and word of the demo data comes from, and which of them training may see.

A value belongs to the evaluation when the checksum of its text says so (`held_out`). Training never draws such a
value, the evaluation draws nothing else, so "never seen" holds by construction and not by luck.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]

# One value in six is kept for the evaluation: enough to draw from, little lost for training.
HELD_OUT_SHARE = 6

CITIES = """Paris Rome London Berlin Madrid Lisbon Vienna Prague Warsaw Athens Dublin Oslo Helsinki Stockholm Brussels
Amsterdam Zurich Geneva Milan Naples Venice Florence Munich Hamburg Cologne Lyon Nice Porto Seville Valencia Barcelona
Budapest Bucharest Sofia Belgrade Zagreb Riga Tallinn Vilnius Moscow Kyiv Istanbul Ankara Cairo Tunis Lagos Nairobi
Accra Dakar Tokyo Osaka Kyoto Seoul Beijing Shanghai Delhi Mumbai Bangkok Hanoi Jakarta Manila Sydney Perth Auckland
Toronto Montreal Boston Chicago Denver Dallas Miami Seattle Portland Austin Lima Quito Bogota Santiago Havana""".split()
PEOPLE = """Anna Bob Carla David Emma Felix Greta Hugo Ines Jonas Klara Leon Maria Nils Olga Paul Rosa Simon Tina
Ulrich Vera Walter Yara Zoe Alice Ben Clara Daniel Eva Frank Gina Henry Ida Jack Karen Lucas Mia Noah Oscar Peter Quinn
Ruth Sam Tom Ursula Victor Wendy Xenia Adam Bella Carl Dora Erik Fiona George Hanna Ivan Julia Kevin Laura Mark Nora
Otto Petra Robert Sara Thomas Uma Vince Willa""".split()
WORDS = """apple book chair door eagle forest garden house island jacket kitchen lamp mountain notebook ocean pencil
queen river stone table umbrella village window yellow zebra bread cheese coffee dinner engine flower glass hammer
iron jungle kettle letter mirror needle orange paper quilt rocket silver tiger uncle valley water winter summer spring
autumn bridge candle desert energy finger guitar hill ink jewel king lemon market night onion piano radio salt train
urban violin wagon yard anchor basket camera dragon evening feather giant harbor idea journey kite ladder meadow
morning nature oil pepper rain shadow thunder truth voice wheel bright calm deep early fast gentle happy kind late
merry new old proud quick round sharp tall warm young blue green red black white small large open quiet strong sweet
cold dark dry empty full heavy light long low meeting report budget project party lunch movie music holiday doctor
school ticket photo story game recipe invoice contract update release review lecture concert hello shoes
notes""".split()
VERBS = """get find fetch load save make build check count draw edit fill grab hide join keep lock mark move name
order pack paint park pick plan post print pull push rate rent reset scan sell ship show sign sort split start stop
store test trace track trim turn vote wash watch weigh wrap book buy call clean close compute copy create delete drop
estimate explain export filter follow format guess hold import inspect invite label launch list log measure merge
mount notify pay play predict publish query record register remove rename repair report request resize restore rotate
run schedule select share submit suggest sync tag tell unlock upload validate verify view visit write zip""".split()
NOUNS = """account address album alarm animal answer area article author badge balance bank battery bill bird block
boat bottle box branch brand bus button cable cake capital car card case cat chart city class clock cloud code coin
color company contact country course crop customer cycle date day deal debt degree desk device disk doc dog draft
drive driver event farm fee field file film flag flight floor folder food form frame friend fruit fuel gate gift goal
grade grid group guest guide height hotel hour image item job key lane layer lease lesson level line link loan lock
map match menu metal model month mood mouse name network note number offer office owner page parcel park part path
person phone pixel plane plant plate player pool port price prize product quote rank rate recipe record region rent
road robot room route rule sample score screen season seat section sensor server ship shop signal size song source
speed sport stage star stock street student style table task taxi team term text theme tool topic town track trade
tree trip truck user value video visit vote wallet week weight wind word year zone""".split()
PARAMETERS = """age amount author band base body brand budget card category channel city code color content count
country date day depth distance email end field file first folder format guests group height host id index item
key kind label language last left length level limit line location low high max message min minutes mode month
name note number offset order origin owner page password path percent person phone place port position price
priority quantity query range rate reason recipient restaurant right room scale second seconds section size sort source
speed start status street style subject symbol tag target text time title to topic total unit user
username value version volume week weight width word x y z year zone a b c n m p q""".split()
LANGUAGES = "French German Spanish Italian Dutch Polish Greek Turkish Chinese Japanese Russian Latin".split()
UNITS = "EUR USD GBP JPY CHF SEK NOK CAD meters feet miles grams liters hours minutes days".split()
EXTENSIONS = "txt md py json csv log".split()
ACCENTED = "Zürich São Málaga Kraków Łódź Besançon Göteborg Århus 東京 北京 Москва Αθήνα naïve café über señor".split()

_ALL = [word for word in dict.fromkeys(VERBS + NOUNS + PARAMETERS + WORDS) if len(word) > 2]
_CONSONANTS = "b c d f g h j k l m n p r s t v w z br cr dr fl gl gr kr pl pr sh sl st th tr ch".split()
_VOWELS = "a e i o u a e i o u ai ee oo ou".split()
_CODAS = ["", "", "", "n", "r", "l", "s", "t", "m", "k", "nd", "rk", "ng"]
_DIGITS = ((1, 2, 3, 4, 5, 6), (20, 44, 22, 8, 4, 2))


@dataclass(frozen=True, slots=True)
class MadeUp:
    """Shares: coined words among the made-up ones, made-up words in names of invented tools, made-up parameters."""

    coined: float
    tools: float
    parameters: float


SELDOM = MadeUp(0.0, 0.08, 0.05)
# Of the real names that training may draw, all parameters and most verbs are single tokens, but not of those held out.
# With these shares training copies names of several tokens often enough.
OFTEN = MadeUp(0.5, 0.4, 0.5)


def held_out(text: str) -> bool:
    """Whether this value is kept for the evaluation. Case does not matter, so that `paris` and `Paris` go together."""
    return zlib.crc32(text.lower().encode()) % HELD_OUT_SHARE == 0


class Pools:
    """Draws values for one split from one random stream.

    `pieces` are tokens of small letters: values built of them make every embedding one that gets copied.
    """

    def __init__(self, rng: random.Random, split: Split, pieces: Sequence[str] = (), made_up: MadeUp = SELDOM) -> None:
        self.rng = rng
        self.split = split
        self.pieces = tuple(pieces) or tuple("abcdefghijklmnopqrstuvwxyz")
        self.made_up = made_up
        self._usable: dict[int, list[str]] = {}

    def allowed(self, text: str) -> bool:
        """Whether this split may draw a value. One sign cannot be held out: all texts are made of them."""
        return len(text) < 2 or held_out(text) == (self.split == "test")

    def chance(self, share: float) -> bool:
        """True with probability `share`."""
        return self.rng.random() < share

    def pick(self, words: list[str]) -> str:
        """One of `words` that the split may use."""
        usable = self._usable.get(id(words))
        if usable is None:
            usable = self._usable[id(words)] = [word for word in words if self.allowed(word)]
        return self.rng.choice(usable)

    def fake(self) -> str:
        """A word that nobody has seen: random letters, random tokens or syllables."""
        rng = self.rng
        while True:
            if self.made_up.coined and self.chance(self.made_up.coined):
                return self.coined()
            kind = rng.random()
            if kind < 0.1:
                word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 4)))
            elif kind < 0.75:
                word = "".join(rng.choices(self.pieces, k=rng.choice((1, 1, 1, 2, 2))))
            else:
                syllables = (rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.choice((1, 1, 2))))
                word = "".join(syllables) + rng.choice(_CODAS)
            if self.allowed(word):
                return word

    def coined(self) -> str:
        """A made-up word of several tokens: the head of one real word and the tail of another, or tokens in a row."""
        rng = self.rng
        while True:
            if self.chance(0.65):
                one, other = self.pick(_ALL), self.pick(_ALL)
                word = one[: rng.randint(1, max(2, len(one) - 1))] + other[-rng.randint(1, max(2, len(other) - 1)) :]
            else:
                word = "".join(rng.choices(self.pieces, k=rng.choice((2, 2, 3))))
            if 2 < len(word) <= 10 and self.allowed(word):
                return word

    def word(self) -> str:
        """A word of small letters, real or not."""
        return self.pick(WORDS) if self.chance(0.6) else self.fake()

    def name(self, real: list[str]) -> str:
        """A capitalised name, more often than not one of `real`; now and then one with letters beyond ASCII."""
        if self.split == "train" and self.chance(0.01):
            return self.rng.choice(ACCENTED)
        return self.pick(real) if self.chance(0.75) else self.fake().capitalize()

    def integer(self, small: bool = False) -> int:
        """A number of one to six digits, most of them short; `small` keeps it to two."""
        while True:
            digits = self.rng.choice((1, 2, 2)) if small else self.rng.choices(*_DIGITS)[0]
            value = self.rng.randrange(0 if digits == 1 else 10 ** (digits - 1), 10**digits)
            if self.allowed(str(value)):
                return value

    def phrase(self, low: int = 1, high: int = 3) -> str:
        """A few words in a row, rather fewer than more."""
        return " ".join(self.word() for _ in range(min(self.rng.randint(low, high), self.rng.randint(low, high))))

    def path(self) -> str:
        """A file name such as `notes.txt`."""
        return f"{self.word()}.{self.rng.choice(EXTENSIONS)}"
