"""The built-in prompt set: our own texts, eight or more for each of Spec-Bench's six task groups, so that a
benchmark runs without a data file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """One user turn. `task` is the Spec-Bench group it resembles."""

    task: str
    text: str


_RIVER = (
    "The river rises in the hills above the town. In spring it floods the lower meadows, and the "
    "farmers move their sheep to the upper pastures. In summer it is shallow enough to cross on foot. A"
    " stone bridge with five arches was built after the flood that carried the wooden one away, and the"
    " mill beside it ground corn until the railway came."
)
_BEES = (
    "Honey bees keep the brood nest at about 35 degrees. When it is cold, workers cluster and shiver "
    "their flight muscles to make heat. When it is hot, they carry water into the hive and fan it with "
    "their wings. A colony sends out foragers for nectar, pollen, water and resin, and the foragers "
    "tell each other of good places by dancing."
)
_LIBRARY = (
    "The town library will move to the old post office in October. For three weeks no books can be borrowed, "
    "but books on loan need not be returned before the new building opens. The reading room will have forty "
    "seats instead of eighteen, and a lift will make the upper floor accessible for the first time. The "
    "children's department gets the former counter hall with its high windows. The council voted for the "
    "move because the roof of the present building would have cost more to repair than the post office cost "
    "to convert. Evening opening hours, which were given up two years ago, return on Tuesdays and Thursdays."
)
_BATTERY = (
    "A lithium-ion battery ages in two ways. Each charge and discharge moves lithium in and out of the "
    "electrodes, which swell and shrink and slowly crack; this is cycle ageing. Even an unused battery loses "
    "capacity, because the electrolyte reacts with the electrode; this is calendar ageing, and it is faster "
    "when the battery is warm or full. Charging below freezing does a third kind of harm: metallic lithium "
    "settles on the surface of the anode and does not come back. For a long life, keep the battery between "
    "twenty and eighty per cent, store it cool, and do not charge it quickly when it is cold."
)
_LIGHTHOUSE = (
    "The lighthouse on the northern cape was lit for the first time in 1874. Its keeper, Marta "
    "Lindqvist, took over from her father when she was nineteen and stayed for forty-one years. She "
    "wrote down the weather three times a day, and her books are now used to study how the climate of "
    "the coast has changed. In the winter of 1893 the supply boat could not land for eleven weeks, and "
    "she lived on fish, potatoes and the last of the flour. The lamp burned rapeseed oil at first, then "
    "paraffin, and was made electric in 1931, after which no keeper was needed. The house beside the "
    "tower is a museum today."
)
_MINUTES = (
    "Minutes of the garden club. Present: Anna, Jorge, Mei, Paul, Salma. Jorge reports that the water tank "
    "leaks at the tap; a new tap costs 18 euros, and he will fit it on Saturday. Mei proposes a shared tool "
    "shed in place of the five small boxes. Paul is against it, because tools were lost the last time. It is "
    "agreed to try for one season, with a list on the door. Salma has seeds left over: beans, dill and two "
    "kinds of pumpkin. The summer party is on 20 July; Anna asks the neighbours about the noise. The next "
    "meeting is on the first Monday of June at seven."
)

_CHAT = (
    "Give me five tips for learning to play the guitar as an adult.",
    "Write a short letter to a friend who has just moved to another city.",
    "Write a Python function that returns the second largest number of a list, and explain it.",
    "You are the ghost of a ship's cook. Tell a visitor about your favourite storm.",
    "Compare living in a small village with living in a big city. Use a list of advantages for each.",
    "Plan a weekend in the mountains for two people who do not like to walk far.",
    "Write a polite email that asks the landlord to repair the heating before winter.",
    "Write a short story about a clock that runs backwards.",
    "Write a JSON document that describes three invented books with title, author, year and topics.",
)
_TRANSLATION = (
    f"Translate into French: {_RIVER}",
    "Translate into Spanish: The museum is closed on Mondays.",
    "Translate into German: Could you tell me how to get to the station, and when the last train leaves?",
    f"Translate into Italian: {_BEES}",
    "Translate from German to English: Der Zug hatte zwanzig Minuten Verspätung, weil ein Baum auf den "
    "Gleisen lag. Wir haben im Speisewagen gewartet und Karten gespielt.",
    "Translate from French to English: Le marché a lieu chaque samedi sur la place. On y trouve des légumes, "
    "du fromage et du pain, et l'on y rencontre tous ses voisins.",
    "Translate from Spanish to English: Mi abuela guardaba las cartas en una caja de madera. Nadie las leyó "
    "hasta que ella misma nos pidió que la abriéramos.",
    f"Translate into Portuguese: {_MINUTES}",
)
_SUMMARIZATION = (
    f"Summarise this text in two sentences: {_BEES}",
    f"Shorten this text to its most important facts: {_RIVER}",
    f"Summarise this announcement for someone who only wants to know what changes for them: {_LIBRARY}",
    f"Summarise in three bullet points: {_BATTERY}",
    f"Summarise this text: {_LIGHTHOUSE}",
    f"Write down who has to do what after this meeting: {_MINUTES}",
    f"Summarise these two texts in one paragraph: {_BATTERY}\n\n{_BEES}",
    f"Give this article a headline and a summary of one sentence: {_LIBRARY}",
)
_QA = (
    "What is photosynthesis, and why does it matter for life on Earth?",
    "How does a refrigerator keep food cold?",
    "Which planet of the solar system has the shortest day?",
    "Why do leaves change colour in autumn?",
    "What is the difference between a virus and a bacterium?",
    'Who wrote the play in which the line "To be, or not to be" is spoken?',
    "How are tides caused, and why are there usually two high tides a day?",
    "What does the heart do, and how many chambers does it have?",
)
_MATH = (
    "A train travels 60 km in one hour and 45 km in the next. How far is that in all?",
    "Tom has 24 apples and gives a third of them to Ann. How many does he keep? Show each step.",
    "A baker sells 18 loaves in the morning and twice as many in the afternoon. Each costs 3 euros. How much "
    "does she take in that day? Explain your reasoning.",
    "A tank holds 240 litres. It is filled at 16 litres a minute while 4 litres a minute leak out. After how "
    "many minutes is it full?",
    "Lena reads 20 pages on the first day and 5 pages more on every following day. How many pages has she "
    "read after six days?",
    "A jacket costs 80 euros. Its price is lowered by 25 per cent, then raised by 10 per cent. What does it "
    "cost now? Show each step.",
    "Three friends share a bill of 96 euros so that the second pays twice as much as the first and the third "
    "pays as much as the other two together. How much does each pay?",
    "A rectangle is 7 cm longer than it is wide, and its perimeter is 54 cm. What is its area?",
)
_RAG = (
    f"Context: {_BEES}\n\nUsing only the context, how do bees cool the hive?",
    f"Context: {_RIVER}\n\nUsing only the context, why was the stone bridge built?",
    f"Context: {_LIBRARY}\n\nUsing only the context, why does the library move, and when?",
    f"Context: {_BATTERY}\n\nUsing only the context, which kinds of ageing are there, and what causes each?",
    f"Context: {_LIGHTHOUSE}\n\nUsing only the context, what happened in the winter of 1893?",
    f"Context: {_MINUTES}\n\nUsing only the context, what did Paul object to, and what was agreed?",
    f"Document 1: {_RIVER}\n\nDocument 2: {_LIGHTHOUSE}\n\nAnswer from the documents, and name the document: "
    "until when did the mill grind corn, and when did the lamp become electric?",
    f"Document 1: {_BATTERY}\n\nDocument 2: {_BEES}\n\nAnswer from the documents, and name the document: at "
    "which temperature do bees keep the brood nest?",
)

_GROUPS = (
    ("mt_bench", _CHAT),
    ("translation", _TRANSLATION),
    ("summarization", _SUMMARIZATION),
    ("qa", _QA),
    ("math_reasoning", _MATH),
    ("rag", _RAG),
)
PROMPTS = tuple(
    BenchPrompt(task, texts[place])
    for place in range(max(len(texts) for _, texts in _GROUPS))
    for task, texts in _GROUPS
    if place < len(texts)
)
"""The groups take turns, so that a short run meets all of them."""
