"""Five household manuals, three in English and two in Korean, for the tests of the domain project."""

from __future__ import annotations

from pathlib import Path

MANUALS = {
    "washer.md": """# Washing machine

## Before the first wash
Remove all **transport bolts** at the back with a 13 mm wrench. Keep them for the next move.
Run the programme Cotton at 60 degrees without laundry once, with 20 ml of detergent.

## Care
- Clean the **lint filter** every 4 weeks.
- Leave the door open for 2 hours after the last wash, so that the drum dries.
- Descale the machine twice a year with **citric acid**, never with vinegar.

## Error codes
The display shows E18 when the pump is blocked. Close the tap, drain the water through the **drain hose**, and
clean the pump.
The display shows F21 when no water comes in. Open the tap and wait 3 minutes.
""",
    "heating/thermostat.md": """# Thermostat

## Daily use
The **comfort temperature** is set to 21 degrees when the thermostat leaves the factory.
Night mode begins at 22:30 and lowers the temperature by 4 degrees.
Press the **dial** for 5 seconds to lock it against children.

## Batteries
The two batteries last about 18 months. Replace both when the display shows a **battery symbol**.
After a change of batteries the **valve adjustment** takes 90 seconds. Do not touch the thermostat meanwhile.

## Frost
Below 6 degrees the thermostat opens the valve by itself, to keep the pipes from freezing.
""",
    "smoke_detector.md": """# Smoke detector

## Where it belongs
Mount the detector on the ceiling, at least 50 cm from the wall and from any lamp.
A room of up to 60 square metres needs one detector.

## Test
Press the **test button** once a month. The signal must sound within 10 seconds.
Vacuum the **air openings** every 6 months.

## End of life
Replace the whole detector after 10 years. A short beep every 48 seconds means that the **lithium battery** is weak.
""",
    "rice_cooker.ko.md": """# 전기밥솥

## 밥 짓기
쌀을 씻은 뒤 30분 동안 불려 주세요. 백미는 눈금 3까지 물을 부으면 됩니다.
**압력 추**를 닫고 취사 버튼을 누르면 약 25분 뒤에 밥이 됩니다.
취사가 끝나면 자동으로 **보온 기능**이 켜집니다. 보온은 12시간을 넘기지 마세요.

## 청소
**내솥**은 부드러운 수세미로 닦아 주세요. 철 수세미를 쓰면 코팅이 벗겨집니다.
**고무 패킹**은 1년마다 바꾸어 주세요.
물 150 밀리리터를 넣고 자동 세척을 누르면 20분 뒤에 끝납니다.
""",
    "air_purifier.ko.md": """# 공기청정기

## 설치
벽에서 30 센티미터 이상 떨어진 곳에 두세요. 사용 면적은 45 제곱미터입니다.

## 필터
**집진 필터**는 12개월마다 바꾸고, **탈취 필터**는 6개월마다 바꾸어 주세요.
**프리필터**는 2주마다 미지근한 물로 씻어 그늘에서 24시간 말립니다.
필터를 바꾼 뒤에는 **초기화 버튼**을 3초 동안 눌러 주세요.

## 수면 모드
수면 모드에서는 소음이 22 데시벨 아래로 내려가고 표시등이 10초 뒤에 꺼집니다.
""",
}


def write(folder: Path) -> Path:
    """The manuals as files below `folder`."""
    for name, text in MANUALS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder
