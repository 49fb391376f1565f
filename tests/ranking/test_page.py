"""The page in a headless browser: keys, mouse, languages, hostile texts, saving and resuming."""

import json
import threading

import browser as driven
import pytest
from desks import write_rows

from chatyuan.ranking import store
from chatyuan.ranking.items import read_items
from chatyuan.ranking.server import Server
from chatyuan.text.files import Skipped

HOSTILE = [
    "<script>window.owned = 1</script>好",
    '<img src=x onerror="window.owned = 1">',
    "</li></ol><style>*{display:none}</style>&lt;b&gt; \u202e ' \" `",
]
PROMPTS = [
    {"prompt": "第一问？\n<b>两行</b>", "answers": HOSTILE},
    {"prompt": "第二问？", "answers": ["甲", "乙", "丙", "丁"]},
    {"prompt": "第三问？", "answers": ["长。" * 3000, "短。"]},
]
CARDS = "document.querySelectorAll('.answer').length"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    path = driven.program()
    if path is None:
        pytest.skip(f"no browser is installed ({', '.join(driven.PROGRAMS)})")
    try:
        opened = driven.Browser(path, tmp_path_factory.mktemp("profile"))
    except OSError as error:
        pytest.skip(f"{path} does not start here: {error}")
    yield opened
    opened.close()


@pytest.fixture
def page(chromium, tmp_path, desk_of):
    """(browser on the page, server) of a fresh desk; scripts must raise nothing."""
    server = Server("127.0.0.1", 0)
    items, _ = read_items([str(write_rows(tmp_path / "d.jsonl", PROMPTS))], 9, 0, Skipped())
    taxonomy = ["闲聊", "知识", "<i>其他</i>"]
    server.desk = desk_of(tmp_path, items, overlap_period=2, taxonomy=taxonomy)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    chromium.errors.clear()
    chromium.open(server.url)  # a port of its own, so nothing is remembered from other tests
    chromium.wait("document.querySelector('#name-dialog')?.open")
    yield chromium, server
    assert chromium.errors == []
    chromium.open("about:blank")
    server.shutdown()
    thread.join()
    server.server_close()


def begin(browser, name="小王"):
    browser.type(name)
    browser.press("Enter")
    browser.wait(f"{CARDS} == 3")


def keys(browser, *names):
    for name in names:
        browser.press(name.removeprefix("shift+"), shift=name.startswith("shift+"))


def cards(browser):
    """Letter and rank of each card as shown, from top to bottom; the selected one has a star."""
    return browser.value(
        "[...document.querySelectorAll('.answer')].map(c => c.querySelector('.letter').innerText +"
        " (c.querySelector('.rank').innerText.match(/[0-9]/)?.[0] ?? '-') +"
        " (c === document.activeElement ? '*' : '')).join(' ')"
    )


def saved(server):
    """(item, annotator) -> annotation as the file has it."""
    found, _, _ = store.read_annotations(server.desk.log.path)
    return {(a.item, a.annotator): a for a in found}


def texts(browser):
    return browser.value("[...document.querySelectorAll('.answer .text')].map(t => t.textContent)")


def test_keys_alone_rank_save_and_finish(page):
    browser, server = page
    begin(browser)
    shown = texts(browser)
    keys(browser, "2", "1", "2")
    assert cards(browser) == "B1 A2 C2*"
    keys(browser, "Enter")  # which first asks for the category
    browser.wait("document.querySelector('#chooser').open")
    keys(browser, "2")
    browser.wait(f"{CARDS} == 4")
    first = saved(server)[server.desk.items[0].key, "小王"]
    assert first.answers == tuple(shown)
    assert first.ranks == (1, 0, 1) and first.category == "知识" and first.seconds > 0
    keys(browser, "c", "ArrowDown", "ArrowDown", "Enter")  # arrows and Enter choose as well
    assert "<i>其他</i>" in browser.text("#category")
    keys(browser, "1", "2", "3", "4", "Enter")
    browser.wait(f"{CARDS} == 2")
    keys(browser, "s")
    browser.wait("document.querySelector('#chooser').open")
    keys(browser, "1")
    browser.wait("!document.querySelector('#done').hidden")
    third = saved(server)[server.desk.items[2].key, "小王"]
    assert (third.ranks, third.skipped) == (None, "all_bad")
    assert "2 / 3" in browser.text("#bar-text")
    assert "1" in browser.text("#done-text")
    keys(browser, "Enter")  # looks for more; there is nothing
    browser.wait("document.querySelector('#message').textContent == ''")
    assert browser.value("!document.querySelector('#done').hidden")
    keys(browser, "z")
    browser.wait(f"{CARDS} == 2")
    assert "所有回答都不可用" in browser.text("#message")


def test_moves_ties_and_undo(page):
    browser, server = page
    begin(browser)
    assert cards(browser) == "A-* B- C-"
    keys(browser, "ArrowDown", "shift+ArrowUp")
    assert cards(browser) == "B1* A- C-"
    keys(browser, "ArrowDown", "ArrowDown", "shift+ArrowUp")
    assert cards(browser) == "B1 C2* A-"
    keys(browser, "shift+ArrowUp")
    assert cards(browser) == "C1* B2 A-"
    keys(browser, "ArrowDown", "=")
    assert cards(browser) == "B1* C1 A-"
    keys(browser, "shift+ArrowDown")  # out of the tie
    assert cards(browser) == "C1 B2* A-"
    keys(browser, "Enter")
    assert cards(browser) == "C1 B2 A-*", "nothing is saved before all have a rank"
    assert "1" in browser.text("#message") and not saved(server)
    keys(browser, "z")
    assert cards(browser) == "B1* C1 A-"
    keys(browser, "z", "z", "z", "z")
    assert cards(browser) == "A- B-* C-"
    keys(browser, "z")
    browser.wait("document.querySelector('#message').innerText == '没有可撤销的。'")
    keys(browser, "ArrowUp", "1", "2", "9")
    assert cards(browser) == "A1 B2 C-*", "there is no ninth rank of three"
    keys(browser, "3", "ArrowUp", "0")
    assert cards(browser) == "A1 C3 B-*"


def test_going_back_over_a_saved_item_replaces_it(page):
    browser, server = page
    begin(browser)
    keys(browser, "1", "2", "3", "c", "1", "Enter")
    browser.wait(f"{CARDS} == 4")
    keys(browser, "z")
    browser.wait(f"{CARDS} == 3")
    assert cards(browser) == "A1* B2 C3" and "闲聊" in browser.text("#category")
    keys(browser, "shift+ArrowDown", "Enter")
    browser.wait(f"{CARDS} == 4")
    (annotation,) = saved(server).values()
    assert annotation.ranks == (1, 0, 2)


def test_the_mouse_orders_and_ties(page):
    browser, _ = page
    begin(browser)

    def drag(letter, onto, share):
        boxes = {
            name: browser.box(f".answer[data-answer='{'ABC'.index(name)}'] .grip")
            for name in (letter, onto)
        }
        left, top, width, height = boxes[letter]
        start = (left + width / 2, top + height / 2)
        left, top, width, height = boxes[onto]
        end = (left + width / 2, top + height * share)
        browser.mouse(start, (start[0], (start[1] + end[1]) / 2), end)

    drag("C", "A", 0.1)
    assert cards(browser) == "C1* A- B-"
    drag("B", "C", 0.1)
    assert cards(browser) == "B1* C2 A-"
    drag("A", "C", 0.5)
    assert cards(browser) == "B1 A2* C2"
    drag("B", "C", 0.9)
    assert cards(browser) == "A1 C1 B2*"
    left, top, width, height = browser.box(".answer[data-answer='0'] .text")
    browser.mouse((left + width / 2, top + height / 2), (left + width / 2, top + height / 2))
    assert cards(browser) == "A1* C1 B2"


def test_texts_stay_texts(page):
    browser, _ = page
    begin(browser, "<b>x</b>")
    assert sorted(texts(browser)) == sorted(HOSTILE)
    assert browser.text("#prompt") == PROMPTS[0]["prompt"]
    assert browser.text("#who") == "<b>x</b>"
    keys(browser, "c")
    assert "<i>其他</i>" in browser.text("#choices")
    assert browser.value("window.owned") is None
    assert browser.value("document.querySelectorAll('main img, main b, main script').length") == 0


def test_both_languages_say_everything(page):
    browser, server = page
    english, chinese = (
        browser.value(f"import('/words.js').then(m => m.WORDS.{name})") for name in ("en", "zh")
    )
    assert english.keys() == chinese.keys()
    for key, text in chinese.items():
        fields = [sorted(part.split("}")[0] for part in t.split("{")[1:])
                  for t in (text, english[key])]  # fmt: skip
        assert fields[0] == fields[1], key
    begin(browser)
    for reason in server.desk.start()["reasons"]:
        assert reason in chinese
    assert browser.value("document.documentElement.lang") == "zh-CN"
    keys(browser, "l", "?")
    assert browser.value("document.documentElement.lang") == "en"
    whole = browser.text("header") + browser.text("footer") + browser.text("#help")
    whole += browser.text("#panel")
    for own in ("小王", "中文", "提示"):
        whole = whole.replace(own, "")
    assert whole.isascii() or not [c for c in whole if "\u4e00" <= c <= "\u9fff"]
    browser.press("Escape")
    browser.open(server.url)  # the name and the language are remembered
    browser.wait(f"typeof document.querySelector('#who') == 'object' && {CARDS} == 3")
    assert browser.text("#who") == "小王" and browser.text("#prompt-title") == "Prompt"


def test_two_annotators_agree_on_the_panel(page):
    browser, server = page
    begin(browser)
    keys(browser, "1", "2", "3", "Enter")
    browser.wait("document.querySelector('#chooser').open")
    keys(browser, "1")
    browser.wait(f"{CARDS} == 4")
    ours = texts(browser)
    keys(browser, "1", "2", "3", "4", "c", "1", "Enter")
    browser.wait(f"{CARDS} == 2")
    browser.value("document.querySelector('#who').click()")
    browser.type("小李")
    browser.press("Enter")
    browser.wait(f"{CARDS} == 4")
    for text in texts(browser):  # the same ranks, in another order of answers
        keys(browser, str(1 + ours.index(text)))
    keys(browser, "c", "1", "Enter")
    browser.wait(f"{CARDS} == 2")  # which 小王 has left to others
    figures = browser.text("#figures")
    assert "100.0%" in figures and "1.00" in figures
    assert server.desk.progress()["agreement"]["tau"] == pytest.approx(1.0)


def test_a_failed_save_keeps_the_order(page, monkeypatch):
    browser, server = page
    begin(browser)
    keys(browser, "c", "1", "3", "1", "2")
    before = cards(browser)

    def full(annotation):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server.desk.log, "append", full)
    keys(browser, "Enter")
    browser.wait("document.querySelector('#message').className == 'error'")
    assert "No space left on device" in browser.text("#message")
    assert cards(browser) == before
    monkeypatch.undo()
    keys(browser, "Enter")
    browser.wait(f"{CARDS} == 4")
    browser.errors[:] = [e for e in browser.errors if "507" not in e]  # the browser logs it


def test_it_can_be_used_by_ear_and_on_a_narrow_screen(page):
    browser, _ = page
    begin(browser)
    unnamed = browser.value(
        "[...document.querySelectorAll('button, input, progress, .answer')].filter(e =>"
        " e.offsetParent && !(e.innerText || e.labels?.length || e.getAttribute('aria-label')))"
        ".map(e => e.outerHTML)"
    )
    assert unnamed == []
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    names = {node.get("name", {}).get("value", "") for node in tree if not node["ignored"]}
    assert any(name.startswith("回答 A，未排，共 3 个") for name in names), json.dumps(list(names))
    browser.press("1")
    keys(browser, "2", "3", "c", "1", "Enter")
    browser.wait(f"{CARDS} == 4")
    keys(browser, "1", "2", "3", "4", "c", "1", "Enter")
    browser.wait(f"{CARDS} == 2")  # with an answer of 6,000 characters
    browser.resize(400, 700)
    try:
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")
        keys(browser, "ArrowDown")
        top = browser.value("document.activeElement.getBoundingClientRect().top")
        assert 0 <= top < 700
    finally:
        browser.resize(1280, 900)
