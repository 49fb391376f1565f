"""ChatYuan's dialogue template."""

from chatyuan.text.templates import CODECS, dialogue_prompt, split_dialogue


def test_prompt():
    history = [("你好", "您好！"), ("你是谁？", "我是小元。")]
    assert dialogue_prompt(" 你好 ") == "用户：你好\n小元："
    prompt = dialogue_prompt("再见", history)
    assert (
        prompt == "用户：你好\n小元：您好！\n用户：你是谁？\n小元：我是小元。\n用户：再见\n小元："
    )
    assert history == [("你好", "您好！"), ("你是谁？", "我是小元。")]


def test_old_turns_are_dropped_whole_and_the_question_never():
    history = [(f"问{n}", f"答{n}") for n in range(9)]
    assert dialogue_prompt("新", history, max_turns=1) == "用户：问8\n小元：答8\n用户：新\n小元："
    assert dialogue_prompt("新", history, max_turns=0) == "用户：新\n小元："
    assert dialogue_prompt("新", history).count("用户：") == 6
    assert dialogue_prompt("新", history, max_turns=None).count("用户：") == 10


def test_a_dialogue_can_be_read_back():
    text = dialogue_prompt("再见", [("写首诗", "床前明月光\n疑是地上霜")])
    assert split_dialogue(text) == [
        ("user", "写首诗"),
        ("assistant", "床前明月光\n疑是地上霜"),
        ("user", "再见"),
        ("assistant", ""),
    ]
    assert split_dialogue("没有模板") == [("user", "没有模板")]


def test_codecs_undo_themselves():
    for name, codec in CODECS.items():
        assert codec.name == name
        assert codec.unescape(codec.escape("用户：一\n小元：二")) == "用户：一\n小元：二"
    assert CODECS["chatyuan"].escape("a\nb\tc") == "a\\nb\\tc"
