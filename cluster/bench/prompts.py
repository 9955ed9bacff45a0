"""The built-in prompt set: our own texts, two for each of the field's six task groups."""

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

PROMPTS = (
    BenchPrompt("chat", "Give me five tips for learning to play the guitar as an adult."),
    BenchPrompt("chat", "Write a short letter to a friend who has just moved to another city."),
    BenchPrompt("translation", f"Translate into French: {_RIVER}"),
    BenchPrompt(
        "translation",
        "Translate into Spanish: The museum is closed on Mondays.",
    ),
    BenchPrompt("summarization", f"Summarise this text in two sentences: {_BEES}"),
    BenchPrompt("summarization", f"Shorten this text to its most important facts: {_RIVER}"),
    BenchPrompt("qa", "What is photosynthesis, and why does it matter for life on Earth?"),
    BenchPrompt("qa", "How does a refrigerator keep food cold?"),
    BenchPrompt(
        "math",
        "A train travels 60 km in one hour and 45 km in the next. How far is that in all?",
    ),
    BenchPrompt(
        "math", "Tom has 24 apples and gives a third of them to Ann. How many does he keep? Show each step."
    ),
    BenchPrompt("rag", f"Context: {_BEES}\n\nUsing only the context, how do bees cool the hive?"),
    BenchPrompt("rag", f"Context: {_RIVER}\n\nUsing only the context, why was the stone bridge built?"),
)
