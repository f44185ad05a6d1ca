"""What the chat page says, in English and Korean. A test checks that both say the same things.

Not for what the command line or the API says.
"""

from __future__ import annotations

LANGUAGES = {"en": "English", "ko": "한국어"}

WORDS: dict[str, dict[str, str]] = {
    "en": {
        "title": "Chat",
        "model": "Model",
        "new": "New chat",
        "settings": "Settings",
        "system": "System message",
        "temperature": "Temperature",
        "temperature_help": "0 always takes the likeliest token",
        "max_tokens": "Longest answer, in tokens",
        "max_tokens_help": "empty: as long as the model reads",
        "placeholder": "Write a message",
        "send": "Send",
        "stop": "Stop",
        "copy": "Copy",
        "copied": "Copied",
        "retry": "Try again",
        "you": "You",
        "assistant": "Model",
        "keys": "Enter sends, Shift+Enter begins a line, Esc stops an answer.",
        "empty": "What you write stays between this page and the server that gave it. A new chat or closing the page "
        "forgets it.",
        "key_title": "This server asks for a key",
        "key_label": "Key",
        "key_note": "It is kept until this tab is closed.",
        "key_wrong": "That key is not the one.",
        "key_save": "Go on",
        "writing": "writing …",
        "waiting": "waiting for the first word …",
        "stopped": "stopped",
        "cut": "cut off: the longest answer is reached",
        "figures": "{tokens} tokens, {seconds} s",
        "failed": "The server said: {why}",
        "away": "The server can't be reached. Is it still running?",
        "busy": "The server is busy. Try again in {seconds} s.",
        "language": "Language",
    },
    "ko": {
        "title": "대화",
        "model": "모델",
        "new": "새 대화",
        "settings": "설정",
        "system": "시스템 메시지",
        "temperature": "온도(temperature)",
        "temperature_help": "0이면 항상 가장 그럴듯한 토큰을 고릅니다",
        "max_tokens": "답의 최대 길이(토큰)",
        "max_tokens_help": "비워 두면 모델이 읽을 수 있는 데까지 씁니다",
        "placeholder": "메시지를 입력하세요",
        "send": "보내기",
        "stop": "멈추기",
        "copy": "복사",
        "copied": "복사했습니다",
        "retry": "다시 시도",
        "you": "나",
        "assistant": "모델",
        "keys": "Enter로 보내고, Shift+Enter로 줄을 바꾸고, Esc로 답을 멈춥니다.",
        "empty": "여기에 쓴 내용은 이 페이지와 이 페이지를 보내 준 서버 밖으로 나가지 않습니다. 새 대화를 시작하거나 "
        "페이지를 닫으면 사라집니다.",
        "key_title": "이 서버를 쓰려면 키가 필요합니다",
        "key_label": "키",
        "key_note": "이 탭을 닫을 때까지만 보관합니다.",
        "key_wrong": "키가 맞지 않습니다.",
        "key_save": "계속",
        "writing": "쓰는 중 …",
        "waiting": "첫 단어를 기다리는 중 …",
        "stopped": "멈췄습니다",
        "cut": "답의 최대 길이에 닿아 끊겼습니다",
        "figures": "{tokens}토큰, {seconds}초",
        "failed": "서버의 응답: {why}",
        "away": "서버에 연결할 수 없습니다. 서버가 실행 중인지 확인하세요.",
        "busy": "서버가 바쁩니다. {seconds}초 뒤에 다시 시도하세요.",
        "language": "언어",
    },
}


def language(asked: str, accepted: str) -> str:
    """asked: ?lang=; accepted: Accept-Language, whose first language that is here counts; else English."""
    for part in (asked, *accepted.split(",")):
        name = part.split(";")[0].strip().lower().split("-")[0]
        if name in WORDS:
            return name
    return "en"
