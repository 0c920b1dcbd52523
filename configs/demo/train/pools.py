"""Where every random name, number and word of the demo data comes from, and which of them training may see.

A value belongs to the evaluation when the checksum of its text says so (`held_out`). Training never draws such a
value, the evaluation draws nothing else, so "never seen" holds by construction and not by luck.
"""

from __future__ import annotations

import random
import zlib
from typing import Literal

Split = Literal["train", "test"]

# One value in six is kept for the evaluation: enough to draw from, little lost for training.
HELD_OUT_SHARE = 6

CITIES = """Paris Rome London Berlin Madrid Lisbon Vienna Prague Warsaw Athens Dublin Oslo Helsinki Stockholm Brussels
Amsterdam Zurich Geneva Milan Naples Venice Florence Munich Hamburg Cologne Lyon Nice Porto Seville Valencia Barcelona
Budapest Bucharest Sofia Belgrade Zagreb Riga Tallinn Vilnius Moscow Kyiv Istanbul Ankara Cairo Tunis Lagos Nairobi
Accra Dakar Tokyo Osaka Kyoto Seoul Beijing Shanghai Delhi Mumbai Bangkok Hanoi Jakarta Manila Sydney Perth Auckland
Toronto Montreal Boston Chicago Denver Dallas Miami Seattle Portland Austin Lima Quito Bogota Santiago Havana Reykjavik
Edinburgh Glasgow Bergen Malmo Turin Genoa Bologna Leipzig Dresden Bremen Basel Bern Graz Linz Ghent""".split()
FIRST_NAMES = """Anna Bob Carla David Emma Felix Greta Hugo Ines Jonas Klara Leon Maria Nils Olga Paul Rosa Simon Tina
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
school ticket photo story game recipe invoice contract update release review budget lecture concert""".split()
VERBS = """get find fetch load save make build check count draw edit fill grab hide join keep lock mark move name
order pack paint park pick plan post print pull push rate rent reset scan sell ship show sign sort split start stop
store test trace track trim turn vote wash watch weigh wrap book buy call clean close compute copy create delete drop
estimate explain export filter follow format guess hold import inspect invite label launch list log measure merge
mount notify pay play predict publish query read record register remove rename rent repair report request resize
restore rotate run schedule select share submit subscribe suggest sync tag tell unlock update upload validate
verify view visit write zip analyse archive assign block boost cancel charge clear collect compare connect cook cut
decode describe detect encode enable fix flip freeze graph hash index insert install map match open paste ping quote
rank refund reserve resolve send set solve stream swap switch tune wake warn archive""".split()
NOUNS = """account address album alarm animal answer area article author badge balance bank battery bill bird block
boat bottle box branch brand bus button cable cake camera car card case cat chart city class clock cloud code coin
color company contact country course crop customer cycle date day deal debt degree desk device disk doc dog door draft
drive driver event farm fee field file film flag flight floor folder food form frame friend fruit fuel gate gift goal
grade grid group guest guide height hotel hour house image item job key lake lamp lane layer lease lesson level line
link list loan lot machine map member menu metal meter model month motor mouse movie news node note number object
office order owner package page pair parcel park part party patient payment person phone photo pipe place plan planet
plant plate player plot point pool port post price prize product profile queue quiz quote race radio rate recipe
record region rent reply report robot role room route row rule sale sample school score screen seat sensor server
service shape shelf ship shop signal site size slot song sound space speed sport stamp star state station status step
stock store street student style subject symbol system table tag task tax team term test text theme ticket tide tile
time tool topic total tour town toy track trade train tree trip truck type unit user valve value video view village
visit volume wage wall water wave week weight wind window wire word worker year zone""".split()
PARAMETERS = """amount area author base body category channel city code color content count country currency date
day depth description destination duration email end file filter first format from group height host id index input
item key kind label language left length level limit line location low high max message method min minutes mode month
name note number offset option order origin owner page password path percent person phone place port position price
priority quantity query range rate ratio reason recipient right room scale second seconds section size sort source
speed start status street style subject symbol tag target text time title to token topic total type unit url user
username value version volume week weight width word x y z year zone a b c n m p q""".split()
LANGUAGES = "French German Spanish Italian Dutch Polish Greek Turkish Chinese Japanese Russian Latin".split()
UNITS = """EUR USD GBP JPY CHF SEK NOK CAD euros dollars pounds yen francs meters feet miles kilometers inches grams
ounces liters gallons hours minutes seconds days celsius fahrenheit kilograms""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday today tomorrow".split()
EXTENSIONS = "txt md py json csv log yaml html png pdf".split()
ACCENTED = "Zürich São Málaga Kraków Łódź Besançon Göteborg Århus 東京 北京 Москва Αθήνα naïve café über señor".split()

_CONSONANTS = "b c d f g h j k l m n p r s t v w x z br cr dr fl gl kr pl pr qu sh sl st th tr ch".split()
_VOWELS = "a e i o u a e i o u ai ee oo ou y".split()
_CODAS = ["", "", "", "n", "r", "l", "s", "t", "x", "m", "k", "nd", "rk", "ck", "ng"]


def held_out(text: str) -> bool:
    """Whether this value is kept for the evaluation. Case does not matter, so that `paris` and `Paris` go together."""
    return zlib.crc32(text.lower().encode()) % HELD_OUT_SHARE == 0


def allowed(text: str, split: Split) -> bool:
    """Whether a value may be drawn for a split. One digit or letter cannot be held out: all texts are made of them."""
    return len(text) < 2 or held_out(text) == (split == "test")


class Pools:
    """Draws values for one split from one random stream.

    `pieces` are word pieces of the tokenizer: values built of them make every embedding one that gets copied.
    """

    def __init__(self, rng: random.Random, split: Split, pieces: list[str] | None = None) -> None:
        self.rng = rng
        self.split = split
        self.pieces = pieces or []
        self._filtered: dict[int, list[str]] = {}

    def chance(self, share: float) -> bool:
        """True with probability `share`."""
        return self.rng.random() < share

    def pick(self, words: list[str]) -> str:
        """One of `words` that the split may use."""
        usable = self._filtered.get(id(words))
        if usable is None:
            usable = self._filtered[id(words)] = [word for word in words if allowed(word, self.split)]
        return self.rng.choice(usable)

    def pseudo(self) -> str:
        """A word that nobody has seen: syllables, random letters or random word pieces."""
        while True:
            word = self._pseudo()
            if allowed(word, self.split):
                return word

    def _pseudo(self) -> str:
        rng = self.rng
        kind = rng.random()
        if kind < 0.2:
            return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7)))
        if kind < 0.45 and self.pieces:
            return "".join(rng.choices(self.pieces, k=rng.randint(1, 3)))
        syllables = (rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.choice((1, 2, 2, 2, 3))))
        return "".join(syllables) + rng.choice(_CODAS)

    def word(self) -> str:
        """A plain lower-case word, real or not."""
        return self.pick(WORDS) if self.chance(0.5) else self.pseudo()

    def proper(self, real: list[str]) -> str:
        """A capitalised name: one of `real`, or an invented one; now and then written small or with accents."""
        if self.chance(0.015):
            return self.rng.choice(ACCENTED)
        name = self.pick(real) if self.chance(0.5) else self.pseudo().capitalize()
        return name.lower() if self.chance(0.06) else name

    def integer(self, small: bool = False) -> int:
        """A number of one to nine digits, most of them short; `small` keeps it to three."""
        while True:
            digits = self.rng.choices((1, 2, 3, 4, 5, 6, 7, 8, 9), (24, 80, 48, 24, 12, 7, 3, 1, 1))[0]
            if small:
                digits = self.rng.choice((1, 2, 2, 2, 3))
            value = self.rng.randrange(0 if digits == 1 else 10 ** (digits - 1), 10**digits)
            if allowed(str(value), self.split):
                return -value if not small and value and self.chance(0.03) else value

    def decimal(self) -> float:
        """A number with one or two decimals."""
        while True:
            value = round(self.rng.uniform(0, self.rng.choice((1, 10, 100, 1000))), self.rng.choice((1, 2)))
            if value != int(value) and allowed(str(value), self.split):
                return value

    def phrase(self, low: int = 1, high: int = 4) -> str:
        """A few words in a row."""
        return " ".join(self.word() for _ in range(self.rng.randint(low, high)))

    def path(self) -> str:
        """A file path such as `notes.txt` or `src/main.py`."""
        folder = self.word() + "/" if self.chance(0.4) else ""
        return f"{folder}{self.word()}.{self.rng.choice(EXTENSIONS)}"

    def symbol(self) -> str:
        """Two to five capitals, as for a share."""
        while True:
            text = "".join(self.rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=self.rng.randint(2, 5)))
            if allowed(text, self.split):
                return text

    def code(self) -> str:
        """Letters and digits mixed, such as `kd93x`."""
        while True:
            text = "".join(self.rng.choices("abcdefghkmnprstuvwxz0123456789", k=self.rng.randint(3, 7)))
            if allowed(text, self.split) and not text.isdigit():
                return text

    def address(self) -> str:
        """A mail address."""
        return f"{self.word()}@{self.word()}.{self.rng.choice(('com', 'org', 'net'))}"
