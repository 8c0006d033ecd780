"""The vocabulary: words of the task as whole tokens, characters and bytes for everything else.

A worker's name is its initial with the stars before it (`**A`) and the rest; the model learns what an
initial means, so a name that training never showed works like any other with that initial.
"""

DEFAULT_NAMES = [
    "Alice", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Heidi", "Ivan", "Judy", "Karl",
    "Laura", "Mike", "Nina", "Oscar", "Peggy",
]
# Never in training data: for tests.
RESERVED_NAMES = ["Anna", "Boris", "Chloe", "Dmitri", "Emil", "Fatima", "Gustav", "Hanna"]
UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LOWER = UPPER.lower()
LABELS = "abcdefghi"
MAX_ITEMS = len(LABELS)

PAST_TEXT = "\n\n### Past steps"
OTHERS_TEXT = "\n\n### Work in progress (others)\n\n"
OWN_TEXT = "<...>\n\n### Work in progress (own)\n\n"
INTRO_TEXT = "Add up every list, sharing the work: "

SPECIAL = ["<pad>", "<|endoftext|>"]
WORDS = (
    list("0123456789")
    + list(LOWER)
    + [f"{c}) " for c in LABELS]
    + ["+", "=", ",", ".", ";", " ", "}", "<", ">", ": ", " taken, so ", "wait", " .", "The answer",
       " is \\boxed{", "; ", "\n\n", " [", "]:** ", INTRO_TEXT, PAST_TEXT, OTHERS_TEXT, OWN_TEXT]
    + [f"**{c}" for c in UPPER]
    + [name[1:] for name in DEFAULT_NAMES]
)
OTHER_CHARS = [c for c in "\n\t" + "".join(map(chr, range(33, 127))) if c not in WORDS]
BYTES = [f"<0x{b:02X}>" for b in range(128, 256)]
VOCAB = SPECIAL + WORDS + OTHER_CHARS + BYTES
ID = {s: i for i, s in enumerate(VOCAB)}
assert len(ID) == len(VOCAB), "every token once"

DIGIT = [ID[c] for c in "0123456789"]
CLAIM = [ID[c] for c in LABELS]
LABEL = [ID[f"{c}) "] for c in LABELS]
ITEM_OF = {t: i for i, t in enumerate(CLAIM)}
INITIAL = [ID[f"**{c}"] for c in UPPER]
(PLUS, EQUALS, COMMA, DOT, BLANK, CLOSE, COLON, TAKEN, WAIT, WAIT_ON, ANSWER, BOX, NEXT_ITEM, SEPARATOR,
 STEP_OPEN, STEP_CLOSE, INTRO, PAST, OTHERS, OWN) = (
    ID[s] for s in ["+", "=", ",", ".", " ", "}", ": ", " taken, so ", "wait", " .", "The answer",
                    " is \\boxed{", "; ", "\n\n", " [", "]:** ", INTRO_TEXT, PAST_TEXT, OTHERS_TEXT, OWN_TEXT])
TAILS = {name[1:]: ID[name[1:]] for name in DEFAULT_NAMES}


def number(n):
    return [DIGIT[int(c)] for c in str(n)]


def name_ids(name):
    """Tokens of a name as the step prefix writes it: a capital, then small letters."""
    tail = name[1:]
    return [INITIAL[UPPER.index(name[0])]] + ([TAILS[tail]] if tail in TAILS else [ID[c] for c in tail])


def prefix(name, step):
    """Tokens of `**{name} [{step}]:** `."""
    return [*name_ids(name), STEP_OPEN, *number(step), STEP_CLOSE]


def text(ids):
    return "".join(VOCAB[i] for i in ids)
