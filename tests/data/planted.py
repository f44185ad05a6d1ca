"""A corpus of varied, clean rows with faults of known kinds planted in known rows; the same every time."""

# ruff: noqa: E501  -- tables of sentences and faults, one a line

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

CITIES = [
    "Oslo",
    "Lima",
    "Cairo",
    "Seoul",
    "Busan",
    "Quito",
    "Perth",
    "Turin",
    "Lagos",
    "Delhi",
    "Miami",
    "Porto",
    "Kyoto",
    "Dakar",
    "Tunis",
    "Hanoi",
    "Natal",
    "Leeds",
]
THINGS = [
    "lamp",
    "kettle",
    "ladder",
    "bicycle",
    "telescope",
    "piano",
    "blanket",
    "compass",
    "wallet",
    "camera",
    "violin",
    "carpet",
    "saddle",
    "barrel",
]
PEOPLE = [
    "Mina",
    "Jonas",
    "Aisha",
    "Pedro",
    "Yuki",
    "Helga",
    "Omar",
    "Priya",
    "Tomas",
    "Ines",
    "Bram",
    "Chloe",
    "Dmitri",
    "Esra",
    "Farid",
    "Greta",
    "Hugo",
]
VERBS = [
    "repair",
    "paint",
    "carry",
    "measure",
    "borrow",
    "clean",
    "wrap",
    "sell",
    "polish",
    "photograph",
    "weigh",
    "hide",
    "describe",
    "return",
]
MOODS = ["calm", "noisy", "bright", "dusty", "narrow", "crowded", "quiet", "windy", "modern", "ancient"]
KO_PLACES = ["서울", "부산", "대구", "인천", "광주", "대전", "울산", "수원", "전주", "제주", "강릉", "춘천"]
KO_THINGS = ["사과", "우산", "책상", "시계", "자전거", "냉장고", "공책", "안경", "커튼", "주전자", "가방", "의자"]


def english(draw: random.Random, number: int) -> tuple[str, str]:
    city, other = draw.sample(CITIES, 2)
    thing, second = draw.sample(THINGS, 2)
    who, friend = draw.sample(PEOPLE, 2)
    verb, mood, count = draw.choice(VERBS), draw.choice(MOODS), draw.randint(3, 900)
    return draw.choice(
        [
            (
                f"How should {who} {verb} the {thing} before the trip from {city} to {other} in {count} days?",
                f"{who} should start with the loose parts and {verb} the {thing} slowly. After that, {friend} can check it "
                f"once more. In a {mood} place like {city} it takes about {count % 7 + 2} hours in all.",
            ),
            (
                f"Write two sentences about a {mood} street in {city} where {friend} sells {count} {second}s.",
                f"The {mood} street in {city} wakes up early, and {friend} puts {count} {second}s on the table. By noon "
                f"only {count // 3} are left, and {who} carries them home.",
            ),
            (
                f"{who} has {count} coins and gives {count % 3 + 1} to {friend} for a {thing}. How many are left?",
                f"{who} had {count} coins and gave {count % 3 + 1} for the {thing}, so {count - count % 3 - 1} coins are left.",
            ),
            (
                f"What does one need to {verb} a {thing} of size {count}?",
                f"To {verb} a {thing} of size {count}, one needs a soft cloth, a table and some patience. {friend} from "
                f"{other} does it with a {second} too.",
            ),
            (
                f"Give {who} three tips for a {mood} evening with a {thing} and {count} guests.",
                f"1. Put the {thing} near the door.\n2. Ask {friend} to greet the {count} guests.\n3. Keep the room {mood}.",
            ),
            (f"Name a city where a {thing} costs {count} coins.", f"{city}."),
        ]
    )


def korean(draw: random.Random, number: int) -> tuple[str, str]:
    place, thing, count = draw.choice(KO_PLACES), draw.choice(KO_THINGS), draw.randint(2, 900)
    return draw.choice(
        [
            (
                f"{place}에서 {thing} {count}개를 사려면 어디로 가야 하나요?",
                f"{place} 시장에 가시면 {thing}를 싸게 살 수 있습니다. {count}개라면 미리 전화해 보세요.",
            ),
            (
                f"{thing} {count}개를 {place}까지 어떻게 옮기죠?",
                f"{thing} {count}개는 트럭으로 옮기는 것이 좋아요. {place}까지 두 시간쯤 걸립니다.",
            ),
            (
                f"{place} 날씨에 {thing} {count}개 중 몇 개가 필요할까요?",
                f"{count % 9 + 1}개면 충분해요. {place}에는 비가 자주 오지 않습니다.",
            ),
        ]
    )


def chat(asked: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, **more}]}


TOOL = {
    "name": "get_price",
    "description": "Price.",
    "parameters": {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]},
}


def tool_chat(draw: random.Random, number: int) -> dict[str, Any]:
    thing, city, count = draw.choice(THINGS), draw.choice(CITIES), draw.randint(10, 9999)
    call = {"type": "function", "function": {"name": "get_price", "arguments": {"item": f"{thing} {count}"}}}
    return {
        "messages": [
            {"role": "user", "content": f"What does the {thing} number {count} cost in {city}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": json.dumps({"price": count + 1})},
            {"role": "assistant", "content": f"The {thing} costs {count + 1} coins in {city}."},
        ],
        "tools": [TOOL],
    }


def clean(draw: random.Random, number: int) -> dict[str, Any]:
    kind = draw.random()
    if kind < 0.12:
        return tool_chat(draw, number)
    if kind < 0.35:
        return chat(*korean(draw, number))
    asked, answer = english(draw, number)
    row = chat(asked, answer)
    if kind < 0.5:
        follow = chat(*english(draw, number))["messages"]
        row["messages"] = [
            {"role": "system", "content": "You are a helpful shop assistant."},
            *row["messages"],
            *follow,
        ]
    return row


def _edit(position: int, change: Callable[[str, random.Random], str]) -> Callable[[dict, random.Random], Any]:
    def make(row: dict[str, Any], draw: random.Random) -> dict[str, Any]:
        row["messages"][position]["content"] = change(row["messages"][position]["content"], draw)
        return row

    return make


def _messages(change: Callable[[list, random.Random], list]) -> Callable[[dict, random.Random], Any]:
    return lambda row, draw: {**row, "messages": change(row["messages"], draw)}


def _long(draw: random.Random, number: int = 0) -> tuple[str, str]:
    while True:
        asked, answer = english(draw, number)
        if len(answer) > 100 and "\n" not in answer:
            return asked, answer


def _mid_sentence(row: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    asked, answer = _long(draw)
    words = answer.split()
    keep = len(words) * 2 // 3
    while not words[keep - 1].isalpha():
        keep -= 1
    return chat(asked, " ".join(words[:keep]))


def _calls(change: dict[str, Any]) -> Callable[[dict, random.Random], Any]:
    def make(row: dict[str, Any], draw: random.Random) -> dict[str, Any]:
        row = tool_chat(draw, 0)
        row["messages"][1]["tool_calls"][0]["function"].update(change)
        return row

    return make


def _no_call(row: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    row = tool_chat(draw, 0)
    del row["messages"][1]
    return row


def _mojibake(row: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    asked, answer = korean(draw, 0)
    return chat(asked, answer.encode("utf-8").decode("latin-1"))


def _smart_quotes(text: str, draw: random.Random) -> str:
    return text.replace(" ", " \u2019tis ".encode().decode("cp1252"), 1)


PREFIX = {"role": "assistant", "content": "Welcome to the shop, dear guest."}

# kind -> (what makes a row faulty, kinds that count as found). A str result is the raw line.
FAULTS: dict[str, tuple[Callable[[dict, random.Random], Any], set[str]]] = {
    "broken_json": (lambda row, draw: json.dumps(row)[: -draw.randint(2, 20)], {"broken_json"}),
    "trailing_comma": (lambda row, draw: json.dumps(row)[:-1] + ",}", {"broken_json"}),
    "not_an_object": (lambda row, draw: json.dumps([1, draw.random()]), {"not_an_object"}),
    "wrong_encoding": (lambda row, draw: json.dumps(chat(*korean(draw, 0)), ensure_ascii=False).encode("cp949"), {"wrong_encoding"}),
    "duplicate_key": (lambda row, draw: f'{{"prompt": "a", "prompt": "b{draw.random()}", "completion": "c"}}', {"duplicate_key"}),
    "no_answer": (_messages(lambda turns, draw: turns[:1]), {"no_answer"}),
    "empty_answer": (_edit(-1, lambda text, draw: ""), {"empty_answer", "empty_turn"}),
    "blank_answer": (_edit(-1, lambda text, draw: " \n\t "), {"empty_answer", "empty_turn"}),
    "empty_user_turn": (_edit(-2, lambda text, draw: ""), {"empty_turn"}),
    "unknown_role": (lambda row, draw: {"messages": [{**row["messages"][0], "role": "narrator"}, *row["messages"][1:]]}, {"unknown_role"}),
    "system_late": (_messages(lambda turns, draw: [*turns, {"role": "system", "content": "Be brief."}, *turns[-2:]]), {"system_not_first"}),
    "unknown_format": (lambda row, draw: {"colour": "red", "n": draw.random()}, {"unknown_format"}),
    "bad_arguments": (_calls({"arguments": "{item: lamp"}), {"bad_tool_arguments"}),
    "unknown_tool": (_calls({"name": "get_weather"}), {"unknown_tool"}),
    "missing_argument": (_calls({"arguments": {}}), {"missing_argument"}),
    "result_without_call": (_no_call, {"result_without_call"}),
    "consecutive_user": (_messages(lambda turns, draw: [*turns[:-1], {"role": "user", "content": "One more thing."}, turns[-1]]), {"consecutive_user"}),
    "starts_with_assistant": (_messages(lambda turns, draw: [PREFIX, *turns[-2:]]), {"starts_with_assistant"}),
    "ends_with_user": (_messages(lambda turns, draw: [*turns, {"role": "user", "content": "And then?"}]), {"ends_with_user"}),
    "placeholder": (_edit(-1, lambda text, draw: text + " Regards, {{name}}."), {"placeholder"}),
    "template_tokens": (_edit(-1, lambda text, draw: text + "<|im_end|>"), {"template_tokens"}),
    "template_tokens_user": (_edit(0, lambda text, draw: "[INST] " + text + " [/INST]"), {"template_tokens"}),
    "double_bos": (_edit(0, lambda text, draw: "<s>" + text), {"double_bos"}),
    "copies_prompt": (lambda row, draw: (lambda asked: chat(asked, asked))(_long(draw)[0]), {"copies_prompt"}),
    "mojibake": (_mojibake, {"mojibake"}),
    "mojibake_quotes": (lambda row, draw: chat(_long(draw)[0], _smart_quotes(_long(draw)[1], draw)), {"mojibake"}),
    "replacement": (_edit(-1, lambda text, draw: text[:3] + "\ufffd\ufffd" + text[3:]), {"replacement_character"}),
    "control": (_edit(-1, lambda text, draw: text[:2] + "\x07" + text[2:]), {"control_character"}),
    "html": (_edit(-1, lambda text, draw: f"<p>{text}</p><br/>"), {"html"}),
    "entities": (_edit(-1, lambda text, draw: f"{text} It&#39;s a fact &amp; so on."), {"html"}),
    "language": (lambda row, draw: chat(korean(draw, 0)[0], _long(draw)[1]), {"language"}),
    "language_french": (
        lambda row, draw: chat(_long(draw)[0], f"Il faut d'abord nettoyer la table, puis le {draw.randint(3, 99)} mai vous pouvez tout ranger dans la cuisine avec les autres et les amis qui sont là."),
        {"language"},
    ),
    "refusal": (_edit(-1, lambda text, draw: f"As an AI language model, I cannot do that. {text}"), {"refusal"}),
    "empty_thinking": (lambda row, draw: {"messages": [*row["messages"][:-1], {**row["messages"][-1], "reasoning_content": " "}]}, {"empty_thinking"}),
    "empty_think_tag": (_edit(-1, lambda text, draw: f"<think>\n</think>\n{text}"), {"empty_thinking"}),
    "echo": (lambda row, draw: (lambda pair: chat(pair[0], f"{pair[0]} {pair[1]}"))(_long(draw)), {"copies_prompt"}),
    "no_content": (_edit(-1, lambda text, draw: draw.choice(["N/A", "...", "null", "TODO"])), {"no_content"}),
    "empty_system": (_messages(lambda turns, draw: [{"role": "system", "content": " "}, *turns[-2:]]), {"empty_system"}),
    "url_only": (_edit(-1, lambda text, draw: f"https://example.com/{draw.randint(0, 10**9)}"), {"url_only"}),
    "length_outlier": (lambda row, draw: chat(_long(draw)[0], " ".join(_long(draw)[1] for _ in range(40))), {"length_outlier"}),
    "code_fence": (_edit(-1, lambda text, draw: f"{text}\n```python\nprint({draw.random()})"), {"code_fence"}),
    "cut_answer": (_mid_sentence, {"cut_answer"}),
    "whitespace": (_edit(-1, lambda text, draw: f"  {text}\n\n"), {"whitespace"}),
    "secret": (_edit(-1, lambda text, draw: f"{text} The key is sk-{draw.randbytes(16).hex()}."), {"secret"}),
    "stock_refusal": (lambda row, draw: chat(_long(draw)[0], "I'm sorry, but I can't assist with that request."), {"refusal"}),
    "bracket_placeholder": (_edit(-1, lambda text, draw: text + " Yours, [Your Name]."), {"placeholder"}),
    "invisible": (_edit(-1, lambda text, draw: text[:4] + "\u200b" + text[4:]), {"invisible_character"}),
    "cut_at_a_limit": (lambda row, draw: (lambda pair: chat(pair[0], pair[1][:90]))(_long(draw)), {"cut_answer"}),
    "korean_answer": (lambda row, draw: chat(_long(draw)[0], draw.choice(["네, 그렇게 하시면 됩니다.", korean(draw, 0)[1]])), {"language"}),
    "repetition": (_edit(-1, lambda text, draw: text + " The shop is open." * 6), {"repetition"}),
    "role_prefix": (_edit(-1, lambda text, draw: f"Assistant: {text}"), {"role_prefix"}),
}  # fmt: skip
# These need another row: a copy of it, nearly a copy, or its question with another answer.
RELATIVES = {"duplicate": {"duplicate"}, "near_duplicate": {"near_duplicate"}, "conflict": {"conflicting_answers"}}


def corpus(rows: int = 2600, each: int = 10, seed: int = 0) -> tuple[list[bytes], dict[int, tuple[str, set[str]]]]:
    """(lines of a JSONL file, line number -> (planted fault, kinds of finding that count as found))."""
    draw = random.Random(seed)
    seen: set[str] = set()
    made: list[Any] = []
    while len(made) < rows:
        row = clean(draw, len(made))
        key = row["messages"][-2 if "tools" not in row else 0]["content"]
        if key not in seen:
            seen.add(key)
            made.append(row)
    plan = [kind for kind in (*FAULTS, *RELATIVES) for _ in range(each)]
    places = sorted(draw.sample(range(rows // 2, rows), len(plan)))
    draw.shuffle(plan)
    donors = draw.sample([n for n in range(rows // 2) if len(made[n]["messages"]) == 2], len(RELATIVES) * each)
    planted = {}
    for place, kind in zip(places, plan, strict=True):
        base = json.loads(json.dumps(made[place]))
        if kind in RELATIVES:
            base = json.loads(json.dumps(made[donors.pop()]))
            asked, answer = (turn["content"] for turn in base["messages"])
            if kind == "near_duplicate":
                base = chat(asked.upper() + " ", answer.replace(" ", "  ", 2))
            elif kind == "conflict":
                base = chat(asked, f"No, surely not, but {draw.randint(1000, 9999)} would do.")
            made[place], found = base, RELATIVES[kind]
        else:
            if "tools" in base:  # faults of words are planted in rows of words
                base = chat(*english(draw, place))
            make, found = FAULTS[kind]
            made[place] = make(base, draw)
        planted[place + 1] = (kind, found)
    return [_line(row) for row in made], planted


def _line(row: Any) -> bytes:
    if isinstance(row, bytes):
        return row
    return (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)).encode("utf-8")
