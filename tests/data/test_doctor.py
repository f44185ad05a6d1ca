"""Doctor: planted faults are found under their names, clean and real rows are left in peace, mended files are clean."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace

import planted
import pytest

from tunelet.data import doctor, formats
from tunelet.data.convert import write_jsonl
from tunelet.data.doctor_fix import DROPS, MENDS
from tunelet.data.doctor_tokens import cut, truncation
from tunelet.data.examples import Chat, Message, Origin, Text, Tokens
from tunelet.data.scripts import mismatch, mojibake, unscramble
from tunelet.errors import TuneletError

HERE = Origin("a", 1)


def chat(*turns, tools=(), line=1) -> Chat:
    roles = ("user", "assistant")
    messages = tuple(t if isinstance(t, Message) else Message(roles[n % 2], t) for n, t in enumerate(turns))
    return Chat(messages, Origin("rows.jsonl", line), tools)


def kinds(*examples, **options) -> set[str]:
    return {finding.kind for finding in doctor.check(examples, **options) if finding.severity != "info"}


@pytest.fixture(scope="module", params=[0, 1])
def corpus(request, tmp_path_factory):
    lines, plan = planted.corpus(seed=request.param)
    path = tmp_path_factory.mktemp("planted") / "planted.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    loaded = formats.load([str(path)])
    return path, plan, loaded, [*loaded.findings, *doctor.check(loaded.examples)]


def test_planted_faults_are_found_by_their_names(corpus):
    path, plan, loaded, findings = corpus
    assert loaded.counts.rows_in >= 2000 and len({kind for kind, _ in plan.values()}) >= 40
    assert loaded.counts.rows_in == len(path.read_bytes().splitlines())
    found = defaultdict(set)
    for finding in findings:
        assert finding.origin is not None and finding.message and finding.severity in ("error", "warning", "info")
        if finding.severity != "info":
            assert finding.fix, finding
            found[finding.origin.line].add(finding.kind)
    missed = [(line, kind) for line, (kind, good) in plan.items() if not good & found[line]]
    assert len(missed) <= 0.05 * len(plan), missed
    false = {line: names for line, names in found.items() if line not in plan}
    assert len(false) <= 0.01 * (loaded.counts.rows_in - len(plan)), false


def test_a_mended_file_is_clean_and_the_source_untouched(corpus, tmp_path):
    path, plan, loaded, _ = corpus
    before = path.read_bytes()
    rows, notes = doctor.fix(loaded.examples, loaded.counts.dropped)
    write_jsonl(rows, tmp_path / "clean.jsonl")
    again = formats.load([str(tmp_path / "clean.jsonl")])
    assert not [finding for finding in again.findings if finding.severity == "error"]
    assert not [finding for finding in doctor.check(again.examples) if finding.severity != "info"]
    assert path.read_bytes() == before
    # clean rows are all kept, as they were
    clean = [example for example in loaded.examples if example.origin.line not in plan]
    kept = {example.origin.line: example for example in rows}
    assert [example for example in clean if kept.get(example.origin.line) != example] == []
    # and the notes account for every row that is gone
    gone = sum(
        int(note.message.split()[1]) for note in notes if "dropped" in note.message or "left out" in note.message
    )
    assert gone == loaded.counts.rows_in - len(rows)


def test_every_rule_of_mending_is_reached_and_says_what_it_did(corpus):
    _, _, loaded, _ = corpus
    _, notes = doctor.fix(loaded.examples, loaded.counts.dropped)
    assert {note.kind for note in notes} >= {"html", "whitespace", "mojibake", "duplicate", "broken_json", "no_answer"}
    assert not set(MENDS) & set(DROPS)
    assert all(note.severity == "info" and note.kind in note.message for note in notes)


@pytest.mark.parametrize(
    "name,columns,known",
    [
        # dolly's answers are really cut: 'Lollapalooza is one of the'
        ("inst-gsm8k", {}, set()),
        ("inst-koreanchat", {}, {"duplicate"}),
        ("inst-dolly", {"prompt": "instruction", "completion": "text"}, {"cut_answer", "duplicate"}),
        ("eval-commonsense", {}, {"duplicate"}),
        ("inst-selfinstruct", {}, set()),
        ("text-tinystories", {}, set()),
    ],
)
def test_real_rows_raise_few_false_alarms(shared, name, columns, known):
    examples = formats.load([str(shared / name)], columns=columns).examples
    flagged = {f.origin for f in doctor.check(examples) if f.severity != "info" and f.kind not in known}
    assert len(flagged) <= 0.01 * len(examples), sorted(map(str, flagged))[:10]


def test_real_faults_in_the_shared_data(shared):
    def count(name, kind, **options):
        examples = formats.load([str(shared / name)], **options).examples
        return sum(finding.kind == kind for finding in doctor.check(examples)), len(examples)

    placeholders, rows = count("fmt-llamafactory/identity.json", "placeholder")
    assert placeholders > 0.9 * rows
    english, rows = count("inst-kullm", "language")  # Korean questions, English answers
    assert english > 0.6 * rows
    assert count("inst-koreanchat", "duplicate")[0] == 73
    assert count("inst-dolly", "cut_answer", columns={"prompt": "instruction", "completion": "text"})[0] > 100


@pytest.mark.parametrize(
    "answer,kind",
    [
        ("Use `<p>` and `<br>` for that, as the standard has it.", None),
        ("In HTML a paragraph is <p>text</p>.", None),
        ("The set {{1, 2}, {3}} has two members.", None),
        ("```jinja\nHello {{ name }}\n```", None),
        ("Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 24", None),
        ("if (a < b) { return c > d; }", None),
        ("Café, naïve, Zürich, señor, 100 €, “quoted” – and ‘so’ on…", None),
        ("한국어로 쓴 답입니다. “따옴표”도 있어요…", None),
        ("See https://example.com for more of it.", None),
        ("Dear Sir, thank you for it.\nBest regards,", None),
        ("Ha ha ha ha, that is very very funny indeed.", None),
        ("<b>Bold</b> and <i>italic</i> text.", "html"),
        ("Tom &amp; Jerry", "html"),
        ("Hello {{ user_name }}, how are you?", "placeholder"),
        ("안녕하세요 {{이름}}님", "placeholder"),
        ("It is fine.</s>", "template_tokens"),
        ("It is fine.<|eot_id|>", "template_tokens"),
        ("It’s fine".encode().decode("cp1252"), "mojibake"),
        ("안녕하세요".encode().decode("latin-1"), "mojibake"),
        ("안녕하세요".encode("euc-kr").decode("latin-1"), "mojibake"),
        ("??? ???? ??? ??.", "mojibake"),
        ("fine\ufffd", "replacement_character"),
        ("bell\x07", "control_character"),
        ("https://example.com/a https://example.com/b", "url_only"),
        ("I am sorry, but as an AI language model, I have no feelings.", "refusal"),
        ("저는 AI 언어 모델이기 때문에 할 수 없습니다.", "refusal"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("Sorry, there is no pool here that I could turn on.", None),
        ("Use f-strings such as `{name}` there.", None),
        ("The fraction is \\frac{name}{x}.", None),
        ("Dear {name}, it was nice to meet you.", "placeholder"),
        ("The id is AKIA" + "A1" * 8, "secret"),
        ("Fi\u200bne.", "invisible_character"),
        ("N/A", "no_content"),
        ("...", "no_content"),
        ("<think>hm", "unclosed_thinking"),
        ("Fine.\nUser: and then?", "role_prefix"),
        ("The three most important things to know about it are the", "cut_answer"),
    ],
)
def test_fine_lines_between_fault_and_no_fault(answer, kind):
    assert kinds(chat("안녕, code?", answer)) == ({kind} if kind else set())


def test_tools():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"required": ["x"]}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = ("Do it.", Message("assistant", "", tool_calls=(call, call)), Message("tool", "1"), Message("tool", "2"))
    assert kinds(chat(*turns, Message("assistant", "Done."), tools=(tool,))) == set()
    assert kinds(chat(*turns, Message("assistant", "Done."))) == {"unknown_tool"}
    assert kinds(chat(*turns, tools=(tool,))) == {"ends_with_tool"}
    assert kinds(chat("Do it.", Message("tool", "1"), Message("assistant", "Done."))) == {"result_without_call"}


def test_preferences_are_judged_by_their_better_answer(shared):
    examples = formats.load([str(shared / "pref-ultrafeedback")], want="preference").examples
    bad = examples[0].rejected[0]
    spoiled = [replace(examples[0], rejected=(replace(bad, content=bad.content + " &amp; as an AI model, N/A"),))]
    assert kinds(*spoiled) == kinds(examples[0]) == set()
    good = examples[0].chosen[0]
    spoiled = [replace(examples[0], chosen=(replace(good, content=good.content + "<|im_end|>"),))]
    assert kinds(*spoiled) == {"template_tokens"}
    fixed, _ = doctor.fix([*spoiled, *spoiled])
    assert len(fixed) == 1 and fixed[0].chosen[0].content == good.content.strip()
    labelled = formats.load([str(shared / "pref-square-ko")], want="labelled").examples
    flagged = {f.origin for f in doctor.check(labelled) if f.severity != "info"}
    assert len(flagged) <= 0.01 * len(labelled), flagged


def test_languages():
    assert mismatch("서울의 날씨는 어떤가요?", "The weather in Seoul is nice today.") == ("Korean", "Latin letters")
    assert mismatch("What is the weather like in Seoul?", "오늘 서울은 맑고 바람이 조금 붑니다.") == (
        "Latin letters",
        "Korean",
    )
    assert mismatch("영어로 번역해 주세요: 안녕하세요", "Hello, nice to meet you.") is None
    assert mismatch("How do you say hello in Korean?", "안녕하세요라고 말하면 됩니다.") is None
    assert mismatch("거실 불 켜 줘", '{"action": "turn_on", "device": "light", "room": "living room"}') is None
    assert mismatch("파이썬 코드로 보여 줘", "print('hello world, this is python')") is None


def test_mojibake_leaves_sound_text_alone():
    for text in ("Ünïcödé façade", "£10 – “ok”…", "한글과 日本語", "Ãlvaro", "°C ± 2", "São Tomé é lindo"):
        assert mojibake(text) is None and unscramble(text) == text
    assert unscramble("caf\u00c3\u00a9 and na\u00c3\u00afve") == "café and naïve"


def test_duplicates_keep_the_first_and_patterns_are_not_duplicates():
    rows = [
        chat(f"Turn on the light at {n} pm in the kitchen, and keep it on for a while.", f"On at {n}.", line=n)
        for n in range(1, 9)
    ]
    assert kinds(*rows) == set()
    rows += [chat(rows[2].messages[0].content, rows[2].messages[1].content, line=99)]
    assert [f.origin.line for f in doctor.check(rows) if f.kind == "duplicate"] == [99]
    fixed, notes = doctor.fix(rows)
    assert fixed == rows[:-1] and len(notes) == 1


def test_answers_cut_at_one_length_by_their_source():
    words = "alpha beta gamma delta omega sigma kappa lambda theta zeta " * 30
    rows = [
        chat(f"Tell me about number {n}.", f"{n} " + words[n : n + 60 + 5 * n] + " done.", line=n) for n in range(30)
    ]
    rows += [
        chat(f"Tell me of thing {n}.", (f"{n} " + words[n:])[:256].rstrip("., ").ljust(256, "x"), line=n)
        for n in range(30, 60)
    ]
    found = {f.origin.line for f in doctor.check(rows) if f.kind == "cut_answer"}
    assert found == set(range(30, 60))


# With a tokenizer --------------------------------------------------------------------------------------------------


@pytest.fixture
def renderer(tiny_tokenizer):
    from tunelet.data.render import Renderer

    return Renderer(tiny_tokenizer)


def test_truncation_is_told_apart(renderer):
    short, long_answer = chat("Hi?", "Hello."), chat("Hi?", "word " * 200, line=2)
    long_prompt = chat("word " * 200, "Hello.", line=3)
    found = {(f.kind, f.severity, f.origin.line) for f in doctor.check([short, long_answer, long_prompt], renderer, 64)}
    assert {("cut_short", "warning", 2), ("truncated_answer", "error", 3)} <= found
    assert not [item for item in found if item[2] == 1]
    fixed, _ = doctor.fix([short, long_answer, long_prompt], renderer=renderer, max_length=64)
    assert fixed == [short]


def test_cut_keeps_spans_and_finds_what_is_lost():
    row = Tokens(
        (1, 2, 3, 4, 5), (False, False, False, True, True), ((0, 3, "user"), (3, 5, "assistant")), Origin("a", 1)
    )
    short = cut(row, 4)
    assert short.ids == (1, 2, 3, 4) and short.spans == ((0, 3, "user"), (3, 4, "assistant"))
    assert truncation(row, short, 4).kind == "cut_short"
    assert truncation(row, cut(row, 3), 3).kind == "truncated_answer"
    assert truncation(row, row, 5) is None and cut(row, 5) is row


def test_tokenizer_and_template_faults(tiny_tokenizer):
    import copy

    from tunelet.data.render import Renderer

    row = chat("Hi?", "Hello.")
    assert kinds(row, renderer=Renderer(tiny_tokenizer)) == set()
    padded = copy.deepcopy(tiny_tokenizer)
    padded.pad_token = padded.eos_token
    assert kinds(row, renderer=Renderer(padded)) == {"pad_is_eos"}
    bare = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    assert kinds(row, renderer=Renderer(tiny_tokenizer, bare)) == {"template"}
    in_letters = "{% for m in messages %}{{ m.role + ': ' + m.content + ' [END OF TURN]\n' }}{% endfor %}"
    assert kinds(row, renderer=Renderer(tiny_tokenizer, in_letters)) == {"no_stop_token"}
    with_bos = "{{ bos_token }}" + tiny_tokenizer.chat_template
    assert "double_bos" not in kinds(row, renderer=Renderer(tiny_tokenizer, with_bos))
    twice = "{{ bos_token }}{{ bos_token }}" + tiny_tokenizer.chat_template
    assert "double_bos" in kinds(row, renderer=Renderer(tiny_tokenizer, twice))
    assert "template_tokens" in kinds(chat("Hi? <|pad|>", "Hello."), renderer=Renderer(tiny_tokenizer))
    assert doctor.check([Text("Once upon a time.", Origin("a", 1))], Renderer(tiny_tokenizer)) == []


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "a.jsonl").write_text("kept")
    with pytest.raises(TuneletError, match="is there already"):
        write_jsonl([chat("Hi?", "Hello.")], tmp_path / "a.jsonl")
    with pytest.raises(TuneletError, match="cannot be written"):
        write_jsonl([chat("Hi?", "Hello.")], tmp_path / "no" / "a.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert write_jsonl([chat("안녕?", "네.")], tmp_path / "b.jsonl") == 1
    assert json.loads((tmp_path / "b.jsonl").read_text(encoding="utf-8"))["messages"][0]["content"] == "안녕?"
