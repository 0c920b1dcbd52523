"""The kinds of tools in the demo data: how each may be named, asked for and answered.

A `Spec` is a family (all ways to offer "the weather"); a `Tool` is one concrete member with one name for the tool and
for each parameter. Invented tools are made by `invent`: their names never tell more than their own text does, so the
model has to read the tool line.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pools import CITIES, DAYS, FIRST_NAMES, LANGUAGES, NOUNS, PARAMETERS, UNITS, VERBS, Pools

Value = int | float | str | bool


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter of a family: its possible names and the kind of value (see `draw_value`)."""

    names: tuple[str, ...]
    kind: str


@dataclass(frozen=True, slots=True)
class Spec:
    """A family of tools. `asks` are orders that can be chained, `questions` stand alone; `{0}` is the first slot.

    `says` is the answer with `{r}` for the result; `result` is its kind.
    """

    names: tuple[str, ...]
    slots: tuple[Slot, ...]
    asks: tuple[str, ...]
    questions: tuple[str, ...] = ()
    says: str = "the result is {r}"
    result: str = "any"


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool as offered in a prompt: parameter names with JSON types, and the family it comes from."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    spec: Spec
    optional: frozenset[str] = field(default_factory=frozenset)

    def schema(self) -> dict[str, object]:
        """The tool as chat templates expect it."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.name.replace("_", " ").capitalize() + ".",
                "parameters": {
                    "type": "object",
                    "properties": {name: {"type": kind} for name, kind in self.parameters},
                    "required": [name for name, _ in self.parameters if name not in self.optional],
                },
            },
        }


def _s(names: str, kind: str) -> Slot:
    return Slot(tuple(names.split()), kind)


def _math(names: str, left: str, right: str, asks: tuple[str, ...], questions: tuple[str, ...], result: str) -> Spec:
    return Spec(
        tuple(names.split()), (_s(left, "number"), _s(right, "number")), asks, questions, "the answer is {r}", result
    )


_LEFT, _RIGHT = "a a a x first left", "b b b y second right"
_CITY = _s("city city location place town", "city")
_PERSON = _s("name name user username person", "person")

CATALOGUE: tuple[Spec, ...] = (
    _math(
        "add add add sum plus add_numbers",
        _LEFT,
        _RIGHT,
        (
            "add {0} and {1}",
            "add {0} and {1}",
            "sum {0} and {1}",
            "add {0} to {1}",
            "add up {0} and {1}",
            "add {0} plus {1}",
            "compute {0} plus {1}",
            "calculate {0} + {1}",
            "work out the sum of {0} and {1}",
        ),
        (
            "what is {0} plus {1}",
            "what is the sum of {0} and {1}",
            "how much is {0} plus {1}",
            "what is {0} + {1}",
            "{0} + {1}",
            "{0} plus {1}",
        ),
        "add",
    ),
    _math(
        "subtract subtract minus sub subtract_numbers",
        _LEFT,
        _RIGHT,
        (
            "subtract {1} from {0}",
            "take {1} from {0}",
            "compute {0} minus {1}",
            "take {1} away from {0}",
            "calculate {0} - {1}",
        ),
        ("what is {0} minus {1}", "how much is {0} minus {1}", "what is {0} - {1}", "{0} - {1}", "{0} minus {1}"),
        "subtract",
    ),
    _math(
        "multiply multiply times mul multiply_numbers product",
        _LEFT,
        _RIGHT,
        (
            "multiply {0} by {1}",
            "multiply {0} by {1}",
            "multiply {0} and {1}",
            "multiply {0} with {1}",
            "compute {0} times {1}",
            "calculate {0} * {1}",
            "multiply {0} times {1}",
        ),
        (
            "what is {0} times {1}",
            "how much is {0} times {1}",
            "what is {0} * {1}",
            "{0} * {1}",
            "{0} times {1}",
            "what is the product of {0} and {1}",
        ),
        "multiply",
    ),
    _math(
        "divide divide div divide_numbers",
        _LEFT,
        _RIGHT,
        ("divide {0} by {1}", "compute {0} divided by {1}", "calculate {0} / {1}", "split {0} by {1}"),
        ("what is {0} divided by {1}", "how much is {0} divided by {1}", "what is {0} / {1}", "{0} / {1}"),
        "divide",
    ),
    Spec(
        ("sqrt", "square_root", "root"),
        (_s("x n number value a", "number"),),
        ("take the square root of {0}", "compute the square root of {0}", "get the root of {0}"),
        ("what is the square root of {0}",),
        "the answer is {r}",
        "int",
    ),
    Spec(
        ("square", "square", "square_number"),
        (_s("x n number value a", "number"),),
        ("square {0}", "compute the square of {0}"),
        ("what is the square of {0}", "what is {0} squared"),
        "the answer is {r}",
        "int",
    ),
    Spec(
        ("get_weather", "get_weather", "weather", "check_weather", "current_weather", "weather_in"),
        (_CITY,),
        (
            "get the weather in {0}",
            "check the weather in {0}",
            "look up the weather in {0}",
            "tell me the weather in {0}",
            "get the weather for {0}",
            "find the weather in {0}",
        ),
        (
            "what is the weather in {0}",
            "what is the weather in {0}",
            "how is the weather in {0}",
            "what is the weather like in {0}",
            "weather in {0}",
            "weather for {0}",
            "what's the weather in {0}",
        ),
        "the weather in {0} is {r}",
        "weather",
    ),
    Spec(
        ("get_time", "get_time", "time_in", "current_time", "local_time"),
        (_CITY,),
        ("get the time in {0}", "check the time in {0}", "tell me the time in {0}", "look up the time in {0}"),
        ("what time is it in {0}", "what is the time in {0}", "time in {0}"),
        "the time in {0} is {r}",
        "clock",
    ),
    Spec(
        ("get_population", "population"),
        (_CITY,),
        ("get the population of {0}", "look up the population of {0}"),
        ("what is the population of {0}", "how many people live in {0}"),
        "the population of {0} is {r}",
        "int",
    ),
    Spec(
        ("find_user", "find_user", "lookup_user", "get_user", "lookup", "search_user"),
        (_PERSON,),
        ("find the user {0}", "find user {0}", "look up the user {0}", "look up {0}", "find {0}", "get the user {0}"),
        ("who is {0}", "who is the user {0}"),
        "the user {0} is {r}",
        "record",
    ),
    Spec(
        ("get_age", "age_of"),
        (_PERSON,),
        ("get the age of {0}", "look up the age of {0}"),
        ("how old is {0}", "what is the age of {0}"),
        "the age of {0} is {r}",
        "small",
    ),
    Spec(
        ("get_phone", "phone_number", "find_phone"),
        (_PERSON,),
        ("get the phone number of {0}", "find the phone number of {0}", "look up the phone number of {0}"),
        ("what is the phone number of {0}",),
        "the phone number of {0} is {r}",
        "int",
    ),
    Spec(
        ("send_message", "send_message", "message", "send", "send_text"),
        (_s("to to recipient user name", "person"), _s("text text message body content", "message")),
        (
            "send {1} to {0}",
            "send the message {1} to {0}",
            "send a message to {0}: {1}",
            "send {0} the message {1}",
            "tell {0} {1}",
            "write {0}: {1}",
            "message {0}: {1}",
            "send a message to {0} saying {1}",
            'send "{1}" to {0}',
            'send the message "{1}" to {0}',
            "send {0} a message: {1}",
            "tell {0}: {1}",
        ),
        (),
        "the message to {0} is {r}",
        "sent",
    ),
    Spec(
        ("send_email", "email", "send_mail"),
        (_s("to recipient address", "contact"), _s("subject title", "message")),
        (
            "send an email to {0} about {1}",
            "email {0} about {1}",
            "send {0} an email about {1}",
            "write an email to {0} with subject {1}",
        ),
        (),
        "the email to {0} is {r}",
        "sent",
    ),
    Spec(
        ("set_timer", "set_timer", "timer", "start_timer"),
        (_s("minutes minutes duration time", "small"),),
        (
            "set a timer for {0} minutes",
            "start a timer for {0} minutes",
            "set a timer of {0} minutes",
            "set the timer to {0} minutes",
            "set a {0} minute timer",
        ),
        (),
        "the timer for {0} minutes is {r}",
        "set",
    ),
    Spec(
        ("set_timer", "timer", "wait", "sleep"),
        (_s("seconds seconds secs", "small"),),
        (
            "set a timer for {0} seconds",
            "wait {0} seconds",
            "wait for {0} seconds",
            "sleep for {0} seconds",
            "start a timer for {0} seconds",
        ),
        (),
        "the timer for {0} seconds is {r}",
        "set",
    ),
    Spec(
        ("set_alarm", "alarm"),
        (_s("time at hour", "clock"),),
        ("set an alarm for {0}", "set the alarm to {0}", "wake me at {0}"),
        (),
        "the alarm for {0} is {r}",
        "set",
    ),
    Spec(
        ("search", "search", "web_search", "search_web", "find"),
        (_s("query query q text term", "query"),),
        (
            "search for {0}",
            "search {0}",
            "search the web for {0}",
            "look for {0}",
            'search for "{0}"',
            "run a search for {0}",
        ),
        (),
        "I found {r}",
        "found",
    ),
    Spec(
        ("convert", "convert", "convert_currency", "exchange", "convert_units"),
        (
            _s("amount amount value", "number"),
            _s("from_currency from_unit source from", "unit"),
            _s("to_currency to_unit target to", "unit"),
        ),
        ("convert {0} {1} to {2}", "convert {0} {1} into {2}", "change {0} {1} to {2}", "change {0} {1} into {2}"),
        ("how much is {0} {1} in {2}", "what is {0} {1} in {2}"),
        "the answer is {r}",
        "number",
    ),
    Spec(
        ("translate", "translate", "translate_text"),
        (_s("text text phrase", "message"), _s("language language to target", "language")),
        ("translate {0} to {1}", "translate {0} into {1}", 'translate "{0}" to {1}', 'translate "{0}" into {1}'),
        ("how do you say {0} in {1}",),
        "the translation is {r}",
        "phrase",
    ),
    Spec(
        ("read_file", "read_file", "open_file", "read"),
        (_s("path path file filename", "path"),),
        ("read the file {0}", "read {0}", "open {0}", "show me {0}", "open the file {0}", "show the file {0}"),
        ("what is in {0}", "what is in the file {0}"),
        "the file says {r}",
        "phrase",
    ),
    Spec(
        ("write_file", "write_file", "save_file", "write"),
        (_s("path path file filename", "path"), _s("text text content data", "message")),
        (
            "write {1} to {0}",
            "write {1} into {0}",
            "write {1} to the file {0}",
            "save {1} to {0}",
            "save {1} in {0}",
            'write "{1}" to {0}',
        ),
        (),
        "the file {0} is {r}",
        "saved",
    ),
    Spec(
        ("delete_file", "remove_file", "delete"),
        (_s("path file filename", "path"),),
        ("delete the file {0}", "delete {0}", "remove {0}", "remove the file {0}"),
        (),
        "the file {0} is {r}",
        "gone",
    ),
    Spec(
        ("get_price", "price", "price_of"),
        (_s("item product name", "thing"),),
        ("get the price of {0}", "look up the price of {0}", "find the price of {0}", "check the price of {0}"),
        ("what is the price of {0}", "how much does {0} cost", "how much is {0}"),
        "the price of {0} is {r}",
        "number",
    ),
    Spec(
        ("get_stock", "stock_price", "get_stock_price", "quote"),
        (_s("symbol symbol ticker", "symbol"),),
        ("get the stock price of {0}", "look up the stock price of {0}", "check the stock {0}"),
        ("what is the stock price of {0}", "how is the stock {0}"),
        "the stock price of {0} is {r}",
        "number",
    ),
    Spec(
        ("remember", "store", "save", "set_value"),
        (_s("key name", "word"), _s("value text", "message")),
        ("remember {0} as {1}", "store {1} under {0}", "save {1} as {0}", "remember that {0} is {1}", "set {0} to {1}"),
        (),
        "the note {0} is {r}",
        "saved",
    ),
    Spec(
        ("recall", "load", "get_value"),
        (_s("key name", "word"),),
        ("recall {0}", "get the value of {0}", "load {0}"),
        ("what is the value of {0}", "what did I store under {0}"),
        "the value of {0} is {r}",
        "any",
    ),
    Spec(
        ("roll_dice", "roll_die", "dice"),
        (_s("sides sides n", "small"),),
        ("roll a die with {0} sides", "roll a {0} sided die", "roll dice with {0} sides"),
        (),
        "the roll is {r}",
        "small",
    ),
    Spec(
        ("random_number", "random", "pick_number"),
        (_s("low min from start", "small"), _s("high max to end", "small")),
        (
            "pick a number between {0} and {1}",
            "pick a random number from {0} to {1}",
            "give me a random number between {0} and {1}",
        ),
        (),
        "the number is {r}",
        "int",
    ),
    Spec(
        ("reverse", "reverse_text"),
        (_s("text text word", "word"),),
        ("reverse {0}", "reverse the word {0}", "reverse the text {0}"),
        (),
        "the result is {r}",
        "word",
    ),
    Spec(
        ("count_letters", "length", "text_length"),
        (_s("text text word", "word"),),
        ("count the letters in {0}", "count the letters of {0}"),
        ("how long is {0}", "how many letters are in {0}"),
        "the answer is {r}",
        "small",
    ),
    Spec(
        ("turn_on", "switch_on", "enable"),
        (_s("device name", "thing"),),
        ("turn on the {0}", "switch on the {0}", "turn the {0} on"),
        (),
        "the {0} is {r}",
        "on",
    ),
    Spec(
        ("turn_off", "switch_off", "disable"),
        (_s("device name", "thing"),),
        ("turn off the {0}", "switch off the {0}", "turn the {0} off"),
        (),
        "the {0} is {r}",
        "off",
    ),
    Spec(
        ("set_volume", "volume"),
        (_s("level volume value", "small"),),
        ("set the volume to {0}", "turn the volume to {0}"),
        (),
        "the volume is {r}",
        "set",
    ),
    Spec(
        ("set_temperature", "heat"),
        (_s("room", "word"), _s("degrees temperature celsius", "small")),
        ("set the {0} to {1} degrees", "heat the {0} to {1} degrees", "set the temperature in the {0} to {1}"),
        (),
        "the {0} is {r}",
        "set",
    ),
    Spec(
        ("add_event", "create_event", "schedule"),
        (_s("title name event", "phrase"), _s("day date when", "day")),
        ("add {0} to my calendar on {1}", "schedule {0} for {1}", "schedule {0} on {1}", "add the event {0} on {1}"),
        (),
        "the event is {r}",
        "saved",
    ),
    Spec(
        ("create_task", "add_task", "add_todo"),
        (_s("title title text name task", "phrase"),),
        ("create a task: {0}", "add a task: {0}", "create the task {0}", "add {0} to my tasks", "add the task {0}"),
        (),
        "the task is {r}",
        "saved",
    ),
    Spec(
        ("delete_task", "close_task", "remove_task"),
        (_s("id task_id number", "small"),),
        ("delete task {0}", "delete the task {0}", "close task {0}", "remove task {0}"),
        (),
        "task {0} is {r}",
        "gone",
    ),
    Spec(
        ("get_order", "order_status", "track_order"),
        (_s("id order_id number order", "int"),),
        ("look up order {0}", "check order {0}", "track order {0}", "get the order {0}"),
        ("where is order {0}", "what is the status of order {0}"),
        "order {0} is {r}",
        "gone",
    ),
    Spec(
        ("get_distance", "distance"),
        (_s("start origin a", "city"), _s("end destination b", "city")),
        ("get the distance from {0} to {1}", "measure the distance between {0} and {1}"),
        ("how far is it from {0} to {1}", "what is the distance between {0} and {1}"),
        "the distance is {r}",
        "int",
    ),
    Spec(
        ("book_flight", "find_flight"),
        (_s("start origin from_city", "city"), _s("end destination to_city", "city")),
        ("book a flight from {0} to {1}", "find a flight from {0} to {1}"),
        (),
        "the flight is {r}",
        "code",
    ),
    Spec(
        ("book_hotel", "find_hotel"),
        (_CITY, _s("nights nights days", "small")),
        ("book a hotel in {0} for {1} nights", "find a hotel in {0} for {1} nights"),
        (),
        "the hotel is {r}",
        "code",
    ),
    Spec(
        ("echo", "say", "print"),
        (_s("text text message", "message"),),
        ("echo {0}", "say {0}", "print {0}", 'echo "{0}"', 'say "{0}"'),
        (),
        "the tool said {r}",
        "phrase",
    ),
    Spec(
        ("get_date", "today", "date"),
        (),
        ("get the date", "look up the date", "check the date"),
        ("what is the date", "what day is it", "what day is it today"),
        "the date is {r}",
        "date",
    ),
    Spec(
        ("get_time", "now", "clock"),
        (),
        ("get the time", "check the time"),
        ("what time is it", "what is the time"),
        "the time is {r}",
        "clock",
    ),
    Spec(
        ("ping", "check_status", "get_status"),
        (),
        ("check the status", "get the status"),
        ("what is the status",),
        "the status is {r}",
        "word",
    ),
)

JSON_TYPES = {"int": "integer", "small": "integer", "flag": "boolean", "decimal": "number"}
_WORD_KINDS = ("word", "word", "city", "person", "phrase", "code", "thing", "path")
_FORMS = ("verb_noun",) * 6 + ("get_noun",) * 2 + ("noun", "verb", "pseudo", "pseudo", "pseudo_pseudo", "verb_pseudo")


def draw_value(pools: Pools, kind: str, numeric: str = "integer") -> Value:
    """A value of a kind. `numeric` is the type that `number` stands for in this conversation."""
    match kind:
        case "number":
            return pools.decimal() if numeric == "number" and pools.chance(0.25) else pools.integer()
        case "int":
            return pools.integer()
        case "small":
            return pools.integer(small=True)
        case "decimal":
            return pools.decimal()
        case "flag":
            return pools.chance(0.5)
        case "city":
            return pools.proper(CITIES)
        case "person":
            return pools.proper(FIRST_NAMES)
        case "contact":
            return pools.address() if pools.chance(0.4) else pools.proper(FIRST_NAMES)
        case "thing":
            return pools.word() if pools.chance(0.8) else pools.phrase(2, 2)
        case "message":
            text = pools.phrase(1, 3) if pools.chance(0.92) else pools.phrase(4, 7)
            return text.capitalize() if pools.chance(0.15) else text
        case "query" | "phrase":
            return pools.phrase(1, 3)
        case "path":
            return pools.path()
        case "symbol":
            return pools.symbol()
        case "code":
            return pools.code()
        case "unit":
            return pools.rng.choice(UNITS) if pools.chance(0.7) else pools.pseudo()
        case "language":
            return pools.rng.choice(LANGUAGES) if pools.chance(0.7) else pools.pseudo().capitalize()
        case "day":
            return pools.rng.choice(DAYS)
        case "clock":
            return clock(pools)
        case _:
            return pools.word()


def clock(pools: Pools) -> str:
    """A time of day such as 07:45."""
    return f"{pools.rng.randrange(24):02}:{pools.rng.randrange(60):02}"


def offer(pools: Pools, spec: Spec, numeric: str) -> Tool:
    """A member of a known family, with one of its names for itself and for each parameter."""
    parameters = []
    for slot in spec.slots:
        # Sharing the index keeps pairs together: (a, b), (x, y), (left, right).
        names = slot.names
        parameters.append((names, numeric if slot.kind == "number" else JSON_TYPES.get(slot.kind, "string")))
    index = pools.rng.randrange(60)
    named: list[tuple[str, str]] = []
    for names, kind in parameters:
        free = [name for name in names if name not in dict(named)]
        named.append((free[index % len(free)] if len(free) == len(names) else free[0], kind))
    if pools.chance(0.12):
        # Now and then a known tool has parameter names that are not the usual ones.
        named = _unlike(pools, [kind for _, kind in named])
    return Tool(pools.rng.choice(spec.names), tuple(named), spec)


def _unlike(pools: Pools, kinds: list[str]) -> list[tuple[str, str]]:
    names: list[str] = []
    while len(names) < len(kinds):
        name = parameter_name(pools)
        if name not in names:
            names.append(name)
    return list(zip(names, kinds, strict=True))


def parameter_name(pools: Pools) -> str:
    """A name for a parameter of an invented tool."""
    kind = pools.rng.random()
    if kind < 0.62:
        return pools.pick(PARAMETERS)
    if kind < 0.68:
        return f"{pools.pick(NOUNS)}_{pools.pick(PARAMETERS)}"
    return pools.pick(NOUNS) if kind < 0.82 else pools.pseudo()


def _title(pools: Pools) -> tuple[str, str, str]:
    """Name, verb and noun of an invented tool; either word may be missing ("")."""
    form = pools.rng.choice(_FORMS)
    match form:
        case "verb_noun":
            verb, noun = pools.pick(VERBS), pools.pick(NOUNS)
            return f"{verb}_{noun}", verb, noun
        case "get_noun":
            noun = pools.pick(NOUNS)
            return f"get_{noun}", "get", noun
        case "noun":
            noun = pools.pick(NOUNS)
            return noun, "", noun
        case "verb":
            verb = pools.pick(VERBS)
            return verb, verb, ""
        case "pseudo":
            return pools.pseudo(), "", ""
        case "verb_pseudo":
            verb, noun = pools.pick(VERBS), pools.pseudo()
            return f"{verb}_{noun}", verb, noun
        case _:
            verb, noun = pools.pseudo(), pools.pseudo()
            return f"{verb}_{noun}", verb, noun


def invent(pools: Pools) -> Tool:
    """A tool of no known family: an invented name, up to four parameters, orders made of its own words."""
    name, verb, noun = _title(pools)
    count = pools.rng.choices((0, 1, 2, 3, 4), (4, 48, 34, 11, 3))[0]
    kinds = [invent_kind(pools) for _ in range(count)]
    types = [JSON_TYPES.get(kind, "string") for kind in kinds]
    if count and pools.chance(0.05):
        types[-1] = "string"  # A number in a string parameter: the type in the tool line decides on the quotes.
    named = _unlike(pools, types)
    slots = tuple(Slot((parameter,), kind) for (parameter, _), kind in zip(named, kinds, strict=True))
    asks = _orders(pools, name, verb, noun, [parameter for parameter, _ in named])
    result = pools.rng.choices(("int", "word", "phrase", "record", "number"), (38, 32, 12, 6, 12))[0]
    return Tool(name, tuple(named), Spec((name,), slots, asks, (), "the result is {r}", result))


def invent_kind(pools: Pools) -> str:
    """A kind of value for an invented parameter."""
    kind = pools.rng.random()
    if kind < 0.4:
        return "int"
    if kind < 0.45:
        return "decimal"
    return "flag" if kind < 0.49 else pools.rng.choice(_WORD_KINDS)


def _orders(pools: Pools, name: str, verb: str, noun: str, parameters: list[str]) -> tuple[str, ...]:
    """Ways to order a call of an invented tool, in which its words or its whole name appear."""
    rng = pools.rng
    spaced = name.replace("_", " ")
    called = rng.choice(
        (
            f"call {name}",
            f"use {name}",
            f"run {name}",
            f"use the {name} tool",
            f"use the tool {name}",
            name,
            f"run {spaced}",
            f"call the {spaced} tool",
        )
    )
    if verb and noun:
        plain = rng.choice((f"{verb} the {noun}", f"{verb} {noun}", f"{verb} a {noun}", f"{verb} the {noun}"))
    elif noun:
        plain = rng.choice((f"get the {noun}", f"show me the {noun}", f"tell me the {noun}", f"look up the {noun}"))
    else:
        plain = spaced
    orders = [plain, plain + " for", plain + " of", called + " with", called + " on", called + " for"]
    if not parameters:
        return (plain, called)
    places = [f"{{{index}}}" for index in range(len(parameters))]
    listed = _listed(pools, places)
    out = [f"{order} {listed}" for order in orders]
    pairs = [
        (parameter.replace("_", " ") if rng.random() < 0.5 else parameter, place)
        for parameter, place in zip(parameters, places, strict=True)
    ]
    for head in (plain, called):
        rng.shuffle(pairs)
        link = rng.choice((" ", " ", "=", " = ", ": ", " set to ", " is "))
        out.append(f"{head} with {_listed(pools, [parameter + link + place for parameter, place in pairs])}")
    if len(places) > 1:
        # The first value by place, the others by name.
        rest = _listed(pools, [f"{parameters[index]} {places[index]}" for index in range(1, len(places))])
        out.append(f"{plain} {places[0]} with {rest}")
    return tuple(out)


def _listed(pools: Pools, items: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`, or with commas alone."""
    if len(items) < 2:
        return items[0]
    if pools.chance(0.3):
        return ", ".join(items)
    return ", ".join(items[:-1]) + " and " + items[-1]
