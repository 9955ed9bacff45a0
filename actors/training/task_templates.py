"""What `actors.training.tasks` draws from: instructions, questions, word problems, small grammars."""

INSTRUCTIONS = (
    "Write a short story about {topic} that is set in {place}.",
    "Write a friendly email to a colleague about {topic}.",
    "You are a {job}. Explain {topic} to a beginner.",
    "Give me a list of ten ideas about {topic}.",
    "Write a poem about {topic} in four verses.",
    "What are the advantages and disadvantages of {topic}?",
    "Plan a three-day trip to {place} for somebody who likes {topic}.",
    "Write a {language} function that {code}. Explain how it works.",
    "Compare {topic} in {place} with the rest of the world.",
    "Draft a speech about {topic} for a {job}.",
    "Write a product description for a new tool that helps with {topic}.",
    "How would a {job} describe a normal working day?",
    "Write a dialogue between a {job} and a customer about {topic}.",
    "Explain step by step how to get started with {topic}.",
    "Write the introduction of an essay about {topic}.",
    "Give arguments for and against {topic}, then your conclusion.",
    "Write a {language} program that {code}, with comments.",
    "Pretend to be a {job} and answer questions about {topic}.",
    "Describe {place} to somebody who has never been there.",
    "Make a table of the most important facts about {topic}.",
)
TOPICS = (
    "solar energy", "gardening", "machine learning", "the history of trains", "healthy food", "time management",
    "volcanoes", "public transport", "online shopping", "the immune system", "learning a language", "chess",
    "renewable resources", "black holes", "good sleep", "working from home", "the printing press", "bees",
    "climate change", "electric cars", "modern art", "photosynthesis", "team work", "personal finance",
    "recycling", "the human heart", "earthquakes", "jazz music", "social media", "running a marathon",
    "cooking with children", "data privacy", "ancient Rome", "vaccines", "the water cycle", "robots",
    "negotiation", "the stock market", "whales", "coffee", "mountain climbing", "urban planning", "gravity",
    "childhood friendship", "artificial intelligence in medicine", "bread baking", "the moon", "photography",
    "remote learning", "stress", "evolution", "football", "the French Revolution", "wind power", "databases",
)  # fmt: skip
PLACES = (
    "Japan", "a small village", "New York", "Brazil", "the Alps", "a space station", "Egypt", "Paris",
    "Australia", "a school", "India", "the desert", "Norway", "London", "a hospital", "Canada", "Mexico City",
    "Kenya", "an island", "Berlin", "China", "Italy", "the Amazon", "South Africa", "Spain", "a big factory",
)  # fmt: skip
JOBS = (
    "teacher", "doctor", "software engineer", "gardener", "pilot", "lawyer", "journalist", "chef", "nurse",
    "historian", "mechanic", "scientist", "travel guide", "librarian", "carpenter", "banker", "coach",
)  # fmt: skip
PROGRAMMING = ("Python", "Python", "JavaScript", "C++", "Java")
CODE = (
    "reverses a string", "counts the words of a text", "finds the largest number in a list",
    "checks whether a number is prime", "sorts a list of names", "computes the factorial of a number",
    "reads a file and prints its lines", "merges two sorted lists", "removes duplicates from a list",
    "computes the Fibonacci sequence", "converts temperatures", "checks whether a word is a palindrome",
    "finds the most frequent letter", "adds two matrices", "generates a random password",
    "implements binary search", "validates an email address", "groups words by their length",
)  # fmt: skip
QUESTIONS = (
    "What is {topic}?",
    "Why is {topic} important?",
    "Who was {person}?",
    "What is {person} best known for?",
    "When did {person} live?",
    "Where does {thing} come from?",
    "Who invented {thing}?",
    "How does {thing} work?",
    "What is the capital of {place}?",
    "What language do people speak in {place}?",
    "When was {thing} first used?",
    "How many people live in {place}?",
    "What is the difference between {thing} and {topic}?",
    "Which country is the largest producer of {thing}?",
    "What is the meaning of {topic} in simple words?",
    "What are the main causes of {topic}?",
    "How long does it take to learn about {topic}?",
    "What is {thing} made of?",
)
PEOPLE = (
    "Marie Curie", "Isaac Newton", "Cleopatra", "Mozart", "Albert Einstein", "Leonardo da Vinci", "Charles Darwin",
    "Nelson Mandela", "Shakespeare", "Ada Lovelace", "Galileo", "Napoleon", "Frida Kahlo", "Mahatma Gandhi",
    "Alan Turing", "Jane Austen", "Abraham Lincoln", "Julius Caesar", "Beethoven", "Nikola Tesla", "Homer",
)  # fmt: skip
THINGS = (
    "the telephone", "paper", "chocolate", "the bicycle", "glass", "the internet", "a battery", "the compass",
    "rice", "a microwave oven", "silk", "the steam engine", "a refrigerator", "cotton", "the light bulb",
    "a vaccine", "sugar", "the camera", "steel", "a submarine", "soap", "the wheel", "olive oil", "plastic",
)  # fmt: skip
NAMES = (
    "Anna",
    "Tom",
    "Maria",
    "Ben",
    "Lily",
    "Omar",
    "Julia",
    "Sam",
    "Nina",
    "David",
    "Emma",
    "Carlos",
    "Wei",
)
ITEMS = (
    "apples", "books", "marbles", "stamps", "cookies", "pencils", "tickets", "cards", "flowers", "shells",
    "oranges", "stickers", "bottles", "eggs", "candles", "coins", "balloons", "toys", "bricks", "photos",
)  # fmt: skip
WORD_PROBLEMS = (
    "{name} has {a} {item} and buys {b} more. Then {name} gives {c} of them to a friend. How many are left?",
    "A box holds {b} {item}. How many {item} are in {c} boxes, and what do they cost at {price} dollars each?",
    "{name} earns {price} dollars an hour and works {c} hours a day. How much is that in {d} weeks of 5 days?",
    "A train travels {a} km an hour for {d} hours and then {b} km more. How far does it go in all?",
    "{name} reads {b} pages every day. A book has {a} pages more than {name} reads in {c} days. How long is it?",
    "A shop sells {a} {item} on Monday and {percent} percent more on Tuesday. How many on both days together?",
    "{c} friends share {a} {item} equally. How many does each get, and how many are left over?",
    "A garden is {b} meters long and {c} meters wide. A fence costs {price} dollars a meter. What is the total?",
    "{name} is {c} years older than a brother who is {b}. How old will they be together in {d} years?",
    "A tank has {a} liters. Each hour {c} liters flow out and {d} liters flow in. How much is left after 4 hours?",
    "{name} saves {price} dollars a month. After {c} months, {percent} percent is spent on a gift. What remains?",
    "{name} bakes {b} trays with {c} {item} each and sells all but {d}. How many are sold?",
    "Of {a}0 people in a town, {percent} percent own a bicycle. How many do not?",
    "{name} walks {c} km in the morning and {d} times as far in the evening. How far is that in {b} days?",
    "A ticket costs {price} dollars, half of it for children. What do {c} adults and {d} children pay?",
)
SUMMARISE = (
    "Summarize the following text:\n\n{text}",
    "Summarize this in two sentences: {text}",
    "{text}\n\nWhat is the main point of this text?",
    "Give me a short summary of this article.\n\n{text}",
    "Write a brief summary.\n\nText: {text}\nSummary:",
    "List the key points of the text below.\n\n{text}",
)
FROM_PASSAGES = (
    "Context:\n{text}\n\nUse the context to answer: what does it say about {subject}?",
    "Read the text and answer the question.\n\n{text}\n\nQuestion: What is said about {subject}?\nAnswer:",
    "Here is what I found:\n\n{text}\n\nWith this information, tell me more about {subject}.",
    "{text}\n\nBased on the text above, why does {subject} matter?",
    "Answer from these documents only.\n\n{text}\n\nQuestion: How is {subject} explained?",
)
TRANSLATE = (
    "Translate from {source} to {target}: {text}",
    "Translate this {source} text into {target}.\n\n{text}",
    "How do you say this in {target}? {text}",
    "{source}: {text}\n{target}:",
    "Please give me the {target} translation of: {text}",
)
LANGUAGES = ("German", "French", "Spanish", "Italian", "Portuguese")
GRAMMARS = (
    ("German", (
        ("der Minister", "die Stadt", "mein Bruder", "die Firma", "ein Sprecher der Polizei", "das Team",
         "die junge Frau", "der Präsident", "unser Lehrer", "die Regierung", "der Verein", "eine Gruppe"),
        ("hat gestern", "will in diesem Jahr", "konnte am Montag", "wird im nächsten Monat", "sollte bald",
         "möchte seit langem", "musste nach dem Spiel"),
        ("ein neues Haus", "den wichtigen Vertrag", "viele Bücher", "die alte Schule", "einen Bericht über das Wetter",
         "das große Fest", "die Arbeit der Kinder", "den Weg zum Bahnhof", "mehr Geld für den Verkehr"),
        ("gesehen", "bauen", "verkaufen", "beschreiben", "bezahlen", "verstehen", "besuchen", "ändern"),
        ("weil es viel regnet", "obwohl es teuer ist", "und alle waren froh", "sagte die Zeitung am Abend",
         "aber niemand weiß warum", "damit mehr Menschen kommen", "in der Nähe von Berlin"),
    )),
    ("French", (
        ("le ministre", "la ville", "mon frère", "cette entreprise", "le professeur", "la jeune femme"),
        ("a vu hier", "veut acheter", "doit changer", "pourrait vendre", "va construire"),
        ("une nouvelle maison", "le vieux pont", "beaucoup de livres", "la grande école", "un rapport important"),
        ("parce qu'il pleut", "malgré le prix", "près de la gare", "avec ses amis", "avant la fin de l'année"),
    )),
    ("Spanish", (
        ("el ministro", "la ciudad", "mi hermano", "esta empresa", "el profesor", "la mujer joven"),
        ("vio ayer", "quiere comprar", "debe cambiar", "podría vender", "va a construir"),
        ("una casa nueva", "el puente viejo", "muchos libros", "la escuela grande", "un informe importante"),
        ("porque llueve", "a pesar del precio", "cerca de la estación", "con sus amigos", "antes de fin de año"),
    )),
)  # fmt: skip
