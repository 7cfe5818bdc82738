"""The words and sentence patterns of the tiny model's world; `corpus.py` puts them together.

A pattern is plain text with slots in braces. A slot that a scene has fixed (`{A}`, the leading character; `{thing}`;
`{where}`) says the same thing all through a story; any other slot is drawn afresh from `POOLS` each time it is met, and
what is drawn may hold slots of its own. `{q}` and `{Q}` are the opening and closing quotation marks of the story.
Costs nothing but the memory of the text. Data only: safe to read from any thread.
"""

from __future__ import annotations

from typing import NamedTuple


class Character(NamedTuple):
    """One of the fixed cast, always the same in every story."""

    name: str
    he: str
    him: str
    his: str
    kind: str
    home: str
    food: str
    wears: str
    fear: str
    does: str


CAST: tuple[Character, ...] = (
    Character("Mia", "she", "her", "her", "a brave girl", "in the old mill", "bread with honey", "a red hat", "the dark", "draws maps"),
    Character("Ben", "he", "him", "his", "a quiet boy", "in the house on the hill", "apple cake", "a blue scarf", "thunder", "builds little boats"),
    Character("Zoé", "she", "her", "her", "a clever girl", "above the café", "warm soup", "a yellow coat", "deep water", "reads thick books"),
    Character("Otto", "he", "him", "his", "an old sailor", "by the harbour", "fried fish", "a white cap", "spiders", "tells long stories"),
    Character("Mrs. Bell", "she", "her", "her", "a kind baker", "next to the village square", "plum jam", "a silver ring", "mice", "bakes sweet rolls"),
    Character("Pip", "he", "him", "his", "a tiny bird", "in the tall oak tree", "sunflower seeds", "a purple ribbon", "the wind", "sings every morning"),
    Character("Luna", "she", "her", "her", "a grey cat", "in the red barn", "cold milk", "a golden bell", "the rain", "sleeps all day"),
    Character("Rex", "he", "him", "his", "a big dog", "in the garden of the school", "crunchy biscuits", "a brown collar", "loud drums", "guards the gate"),
    Character("Fern", "she", "her", "her", "a green frog", "beside the pond", "fresh berries", "a pair of pink boots", "the tall stork", "jumps over puddles"),
    Character("Bruno", "he", "him", "his", "a brown bear", "in the cave behind the waterfall", "wild honey", "a striped shirt", "bees", "plays the drum"),
)  # fmt: skip

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "silver", "golden", "purple", "orange")
THINGS = (
    "key", "ball", "kite", "box", "lamp", "book", "bell", "cup", "hat", "boat", "drum", "map",
    "coin", "ring", "basket", "scarf", "spoon", "shell", "flute", "umbrella", "feather", "button", "pencil", "clock",
)  # fmt: skip
HIDING = (
    "under the stone bridge", "behind the old barn", "in the deep well", "on the top shelf", "inside the broken clock",
    "near the river", "under the apple tree", "in the attic", "behind the waterfall", "under the bed",
    "in the garden shed", "beside the pond", "in a hollow log", "behind the green door", "under a flat stone",
    "in the baker's oven", "on the roof of the school", "between two rocks", "at the bottom of the stairs", "in the hay",
)  # fmt: skip
SECRETS = (
    "maple", "thunder", "pebble", "candle", "winter", "lemon", "tiger", "window", "button", "cherry",
    "rocket", "island", "feather", "silver", "pumpkin", "whistle", "garden", "marble", "dragon", "cinnamon",
)  # fmt: skip
PLACES = (
    "the forest", "the market", "the beach", "the hill", "the river", "the garden", "the library", "the village square",
    "the harbour", "the meadow", "the mill", "the bakery", "the school", "the pond", "the lighthouse", "the farm",
)  # fmt: skip
COUNTED = (
    ("apple", "apples"), ("pear", "pears"), ("nut", "nuts"), ("egg", "eggs"), ("shell", "shells"), ("coin", "coins"),
    ("stone", "stones"), ("flower", "flowers"), ("cookie", "cookies"), ("berry", "berries"), ("fish", "fish"), ("button", "buttons"),
)  # fmt: skip
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
STRANGERS = ("Karl", "Anna", "Victor", "Nina", "Hugo", "Clara", "Felix", "Rosa", "Emil", "Tilda")
EMOJI = ("🙂", "🎈", "🌟", "🐟", "🍎", "🌧️")

POOLS: dict[str, tuple[str, ...]] = {
    "when": (
        "one {sunny} {morning}", "one {morning}", "early one {sunny} {morning}", "on a {sunny} {morning} in {month}",
        "on {day}", "late on {day}", "one {sunny} day in {month}", "after breakfast", "at the end of {month}", "that {morning}",
    ),
    "sunny": ("sunny", "cold", "windy", "rainy", "bright", "warm", "foggy", "quiet", "grey", "snowy"),
    "morning": ("morning", "afternoon", "evening"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": ("March", "April", "May", "June", "July", "August", "October", "December"),
    "walked": ("walked", "ran", "hurried", "wandered", "went"),
    "happy": ("happy", "glad", "proud", "pleased", "cheerful"),
    "sad": ("sad", "worried", "upset", "unhappy", "sorry"),
    "said": ("said", "cried", "called", "whispered", "shouted"),
    "asked": ("asked", "wanted to know", "wondered"),
    "answered": ("said", "answered", "replied"),
    "slowly": ("slowly", "quietly", "carefully", "quickly", "softly", "gently"),
    "tree": ("tree", "bush", "fence", "wall", "cart", "house", "hedge"),
    "small": ("small", "little", "tiny", "big", "huge", "strange", "pretty", "old"),
    "creature": ("snail", "duck", "butterfly", "goat", "hedgehog", "squirrel", "horse", "rabbit", "crow", "sheep"),
    "did": ("danced", "slept", "sat", "waited", "sang", "jumped", "rested", "hid"),
    "near": ("near {place0}", "behind {a_tree}", "under {a_tree}", "in the grass", "by the road", "on {a_wall}"),
    "a_tree": ("a {tree}", "the {tree}", "the {small} {tree}"),
    "a_wall": ("a wall", "the roof", "a gate", "the path"),
    "place0": PLACES,
    "nature": (
        "The sun was shining.", "The wind was {cold}.", "Rain fell on the roofs.", "The sky was {grey}.", "{small_} clouds {moved} over {place0}.",
        "The leaves were {leaf}.", "Snow lay on {place0}.", "It smelled of {smell}.", "A {small} {creature} {did} {near}.",
        "Somewhere a {creature} {did} and a {creature} {did}.", "Two {colour0} birds flew over {place0}.", "The air was {cold} and the sky was {grey}.",
        "Far away, {place0} looked {small}.", "Nobody else was there — only a {small} {creature}.", "The {creature} {near} looked up and {did}.",
    ),
    "small_": ("small", "white", "dark", "soft"),
    "cold": ("cold", "warm", "soft", "strong", "gentle", "fresh"),
    "grey": ("grey", "blue", "pink", "dark", "clear", "full of birds", "full of stars"),
    "moved": ("moved", "drifted", "hurried", "sailed"),
    "leaf": ("green", "golden", "brown", "wet", "dancing in the wind"),
    "smell": ("bread", "rain", "flowers", "smoke", "the sea", "apples", "wet grass"),
    "colour0": COLOURS,
    "feeling": ("{A} felt {happy}.", "{A} smiled.", "{A} sang a {small} song.", "{A} thought of {B}.", "{A} was hungry.", "{A} took a deep breath.", "{A} hummed {slowly}."),
    "end": (
        "From that day on, {A} and {B} were the best of friends.", "That night {A} slept well and dreamed of {place0}.", "It was a {sunny} day that {A} never forgot.",
        "And so the day ended well.", "{B} laughed, and {A} laughed too.", "Then they both went home, tired but {happy}.", "“{Good}!” {said} {B}.",
        "They ate {food} and told each other stories until the {star} came out.", "{A} was {happy}, and {B} was {happy} too.", "The end.",
    ),
    "star": ("stars", "moon"),
    "Good": ("What a day", "How lovely", "That was fun", "We did it"),
    "food": tuple(person.food for person in CAST),
    "work": ("cake", "kite", "raft", "snowman", "pie", "birdhouse", "song", "lantern", "picture", "puppet"),
    "broke": ("It fell apart at once.", "It was much too {small}.", "It looked {strange}.", "The wind blew it away.", "It broke in two."),
    "strange": ("strange", "funny", "wrong", "crooked", "terrible"),
    "hello": ("Hello", "Good morning", "Good evening", "Hi", "Good day"),
}  # fmt: skip

# Each story is a tuple of beats; one pattern is drawn for each beat. A beat that may be left out holds the empty string.
LOST = (
    ("{When}, {A} could not find {his} {thing}.", "{When}, {A} lost {his} {thing}.", "{A} had {a_thing}. {When}, it was gone.", "{A} loved {his} {thing} more than anything. {When}, {he} lost it {near}."),
    ("{A} was {sad}.", "{He} was very {sad}.", "{q}Where is my {thing}?{Q} {said} {A}.", "{q}Oh no!{Q} {said} {A}. {q}My {thing} is gone!{Q}"),
    ("{B} came by and {asked}, {q}Can I help you?{Q}", "{He} {walked} to {B} and told {bhim} about the {thing}.", "{B} heard {him} and said, {q}I will help you look.{Q}", "Then {A} met {B} {near}. {q}Please help me,{Q} {said} {A}."),
    ("They looked {where2}, but the {thing} was not there.", "First they looked {where2}. There was only a {small} {creature}.", "{B} looked {where2}, and {A} looked {near}. They found nothing."),
    ("Then they looked {where3}. No {thing} there!", "", "Next they searched {where3}, but they found only {a_junk}.", "{A} wanted to give up, but {B} said, {q}Let us try once more.{Q}"),
    ("At last {B} looked {where}. There was the {thing}!", "In the end {A} found the {thing} {where}.", "Then {B} saw something {colour} {where}. It was the {thing}!", "And there, {where}, lay the {thing}."),
    ("{q}Thank you, {B}!{Q} {said} {A}.", "{A} thanked {B} and gave {bhim} {bfood}.", "{A} was so {happy} that {he} danced.", "{q}You are a good friend,{Q} {said} {A}."),
)
VISIT = (
    ("{When}, {A} wanted to visit {B}.", "{When}, {A} set out to see {B}.", "{A} had not seen {B} for a long time. {When}, {he} went to visit {bhim}."),
    ("{B} lives {bhome}.", "{He} knew that {B} lives {bhome}.", "The way was long, for {B} lives far away, {bhome}."),
    ("{He} took {bfood} with {him}, because {B} likes nothing better.", "{B} likes {bfood}, so {A} packed some.", "{q}{B} loves {bfood},{Q} thought {A}, and {he} put some in a basket."),
    ("{A} {walked} past {place0} and then past {place0}.", "On the way {he} met a {small} {creature} that {did} {near}.", "{He} {walked} {slowly} along the road to {place0}.", "{A} got lost near {place0}, but a {small} {creature} showed {him} the way."),
    ("{q}Who is there?{Q} {asked} {B}. {q}It is me, {A}!{Q}", "{B} was wearing {bwears} and opened the door.", "{B} saw {him} from far away and {walked} to meet {him}.", "{A} knocked on the door. {q}Come in!{Q} {said} {B}."),
    ("{q}I have brought you {bfood},{Q} {said} {A}.", "{q}Did you bring {bfood}?{Q} {asked} {B}. {q}Thank you!{Q}", "They sat down and ate {bfood} together.", "{B} tasted the {bfood} and was {happy}."),
    ("Then {B} showed {A} {a_thing}.", "{B} gave {A} {a_thing} to take home.", "{A} stayed until it was dark.", "They played with {a_thing} all {morning}."),
)
MAKE = (
    ("{When}, {A} wanted to make a {work1}.", "{A} had an idea. {q}I will make a {work1},{Q} {he} said.", "{When}, {A} said to {B}, {q}I want to make a {work1}.{Q}"),
    ("{He} {walked} to {place} to get what {he} needed.", "{He} worked {slowly} all {morning}.", "First {he} looked for {a_thing}, because every {work1} needs one.", "{He} began {near}."),
    ("But the {work1} was no good. {broke}", "{broke} {A} was {sad}.", "{q}This is not a {work1}!{Q} {said} {A}. {broke}"),
    ("{q}Let me help,{Q} {said} {B}.", "Then {B} came and looked at the {work1}.", "{A} asked {B} for help.", "{B}, who {bdoes}, knew what to do."),
    ("{B} {slowly} held one side, and {A} held the other.", "They worked together until {day}.", "{B} brought {a_thing2}, and {A} brought {a_thing}.", "They tried again {near}, and then once more."),
    ("At last the {work1} was ready.", "This time the {work1} was perfect.", "What a {work1} it was!", "In the end they had the best {work1} in the village."),
    ("{A} called it {q}{Secret}{Q}.", "They showed it to {C}, who was {happy} too.", "{C} saw the {work1} and wanted one too.", "", "{q}We did it together,{Q} {said} {A}."),
)
FEAR = (
    ("{A} was afraid of {fear}.", "Everyone knew that {A} was afraid of {fear}.", "There was one thing {A} did not like: {fear}."),
    ("{When}, {he} had to go to {place}.", "{When}, {A} and {B} were at {place}.", "{When}, {A} had to bring {a_thing} to {C}."),
    ("{q}I can not do it,{Q} {he} said. {q}I am afraid of {fear}.{Q}", "{He} stopped {near} and shook.", "{His} knees were shaking.", "{A} hid {where}."),
    ("{q}I am here,{Q} {said} {B}. {q}I am afraid of {bfear}, but two are braver than one.{Q}", "{B} took {his} hand. {q}Come,{Q} {bhe} said.", "{q}Do not worry,{Q} {said} {B}. {q}I am sometimes afraid too — of {bfear}.{Q}"),
    ("They went on {slowly}, step by step.", "{A} closed {his} eyes and counted to ten.", "{B} sang a song, and {A} sang too.", "So they went on together."),
    ("Nothing bad happened.", "After a while {A} opened {his} eyes and laughed.", "{q}That was not so bad,{Q} {said} {A}.", "And then it was over."),
    ("Now {A} is not so afraid of {fear} any more.", "{q}You were brave,{Q} {said} {B}.", "{A} gave {B} {a_thing} to say thank you.", "{B} was {happy} and gave {A} {a_thing}."),
)
QUARREL = (
    ("{When}, {A} and {B} found {a_thing} {where}.", "{A} and {B} were at {place}. There they saw {a_thing}.", "There was only one {thing}, but {A} and {B} both wanted it."),
    ("{q}It is mine!{Q} {said} {A}. {q}No, the {thing} is mine!{Q} {said} {B}.", "{A} pulled and {B} pulled.", "{q}I saw the {thing} first,{Q} {said} {B}. {q}No, I did,{Q} {said} {A}."),
    ("They were both angry.", "{A} {walked} away and sat down {near}.", "For a long time nobody said a word.", "{B} was {sad}, and {A} was {sad} too."),
    ("Then {C} came along. {q}What is the matter?{Q} {asked} {C}.", "{C}, {ckind}, heard them and came closer.", "{C} saw them and shook {chis} head."),
    ("{q}Take turns,{Q} {said} {C}. {q}Today {A} has the {thing}, and tomorrow {B} has it.{Q}", "{q}A {thing} is more fun for two,{Q} {said} {C}.", "{q}Friends are better than any {thing},{Q} {said} {C}."),
    ("{A} looked at {B}. {q}I am sorry,{Q} {he} said.", "{q}I am sorry,{Q} {said} {B}. {q}Me too,{Q} {said} {A}.", "{A} gave the {thing} to {B}. {q}You first,{Q} {he} said."),
    ("So they shared the {thing}.", "They played with the {thing} all {morning}.", "In the end they took the {thing} to {place} and played together.", "They put the {thing} {where2}, where both could find it."),
)
STORIES = (LOST, VISIT, MAKE, FEAR, QUARREL)
