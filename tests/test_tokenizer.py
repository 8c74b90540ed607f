"""Text <-> ids, incremental detokenizing and chat templates, against transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, processors

import qwen_moe
from qwen_moe.detokenizer import Detokenizer
from qwen_moe.engine import EMBEDDED
from qwen_moe.tokenizer import read_eos_token_ids

# A template that uses what the published ones use.
AGENT = Path(__file__).parent / "data" / "agent_chat_template.jinja"

TOKENIZER = qwen_moe.Tokenizer(EMBEDDED)
REFERENCE = transformers.PreTrainedTokenizerFast.from_pretrained(EMBEDDED)
# A few ids past the end: models may have more rows than the tokenizer has tokens.
IDS = st.lists(st.integers(0, TOKENIZER.vocab_size + 3), max_size=40)
ONE_BYTE = {
    token_bytes[0]: token_id
    for token_id in range(TOKENIZER.vocab_size)
    if len(token_bytes := TOKENIZER.token_bytes(token_id)) == 1
}


def pushed(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


# --- Encoding -----------------------------------------------------------------


@given(
    st.text() | st.sampled_from(["<|im_start|>user\nhi<|im_end|>", "<think>x</think>", " a  b\n"])
)
def test_text_is_encoded_as_transformers_encodes_it(text: str) -> None:
    assert TOKENIZER.encode(text) == REFERENCE.encode(text, add_special_tokens=False)


@given(st.text())
def test_text_comes_back_from_its_ids(text: str) -> None:
    normal = REFERENCE.backend_tokenizer.normalizer.normalize_str(text)
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=False) == normal


def test_nothing_is_added_to_a_text(tmp_path: Path) -> None:
    with_template(tmp_path / "t", "")
    raw = RawTokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A",
        special_tokens=[("<|im_start|>", TOKENIZER.encode("<|im_start|>")[0])],
    )
    raw.enable_truncation(3)
    raw.enable_padding(length=9)
    raw.save(str(tmp_path / "t" / "tokenizer.json"))
    text = "Here are more than three tokens"
    assert qwen_moe.Tokenizer(tmp_path / "t").encode(text) == TOKENIZER.encode(text)


@pytest.mark.parametrize("text", ["\ud800", b"bytes", 3, None], ids=repr)
def test_what_is_no_text_is_refused(text: object) -> None:
    with pytest.raises(qwen_moe.InvalidArgument):
        TOKENIZER.encode(text)


# --- Incremental detokenizing -------------------------------------------------


@given(IDS)
def test_pieces_together_equal_decoding_at_once(ids: list[int]) -> None:
    assert "".join(pushed(TOKENIZER.detokenizer(), ids)) == TOKENIZER.decode(ids)


@given(st.binary(max_size=20))
def test_bytes_that_are_not_utf8_become_what_full_decoding_makes_of_them(data: bytes) -> None:
    ids = [ONE_BYTE[byte] for byte in data]
    assert "".join(pushed(TOKENIZER.detokenizer(), ids)) == TOKENIZER.decode(ids)
    assert TOKENIZER.decode(ids) == data.decode(errors="replace")


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_no_piece_ends_in_half_a_character(text: str) -> None:
    pieces = pushed(TOKENIZER.detokenizer(), [ONE_BYTE[byte] for byte in text.encode()])
    # A character appears as a whole, with its last byte.
    whole = [character for piece in pieces for character in piece]
    assert whole == list(text)
    assert all(len(piece) <= 1 for piece in pieces)


def test_half_a_character_at_the_end_is_held_until_the_end() -> None:
    detokenizer = TOKENIZER.detokenizer()
    first, second, third = (ONE_BYTE[byte] for byte in "€".encode())
    assert [detokenizer.push(first), detokenizer.push(second)] == ["", ""]
    assert detokenizer.copy().finish() == "\ufffd"
    assert detokenizer.push(third) == "€"
    assert detokenizer.finish() == ""


def test_special_tokens_are_not_shown_and_other_added_tokens_are() -> None:
    ids = TOKENIZER.encode("a<|im_end|><think>b")
    assert "".join(pushed(TOKENIZER.detokenizer(), ids)) == "a<think>b"


def test_added_tokens_outside_the_byte_alphabet_are_shown_as_they_are(tmp_path: Path) -> None:
    with_template(tmp_path / "t", "")
    raw = RawTokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    raw.add_tokens(["<two words>", "\N{EURO SIGN}uro"])
    raw.save(str(tmp_path / "t" / "tokenizer.json"))
    other = qwen_moe.Tokenizer(tmp_path / "t")
    ids = other.encode("a<two words>\N{EURO SIGN}urob")
    assert len(ids) == 4
    assert "".join(pushed(other.detokenizer(), ids)) == other.decode(ids)
    assert other.decode(ids) == "a<two words>\N{EURO SIGN}urob"


def cut_before_stop(text: str, stop: Sequence[str]) -> str:
    """The definition: the stop text that is complete first counts, then the longer one."""
    for end in range(1, len(text) + 1):
        begins = [end - len(s) for s in stop if text[:end].endswith(s)]
        if begins:
            return text[: min(begins)]
    return text


@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_is_cut_before_a_stop_text_wherever_tokens_end(
    tokens: list[str], stop: list[str]
) -> None:
    detokenizer = Detokenizer(lambda index: tokens[index].encode(), stop)
    emitted, longest = "", max(map(len, stop))
    for index in range(len(tokens)):
        emitted += detokenizer.push(index)
        text = "".join(tokens[: index + 1])
        assert cut_before_stop(text, stop).startswith(emitted), "emitted what it had to hold back"
        assert detokenizer.stopped == (cut_before_stop(text, stop) != text)
        if not detokenizer.stopped:
            assert len(text) - len(emitted) < longest, "held back more than a stop text could need"
    assert emitted + detokenizer.finish() == cut_before_stop("".join(tokens), stop)


def test_what_only_looked_like_a_stop_text_is_emitted() -> None:
    tokens = ["x", "END", " of", "EN"]
    detokenizer = Detokenizer(lambda index: tokens[index].encode(), ["ENDED"])
    assert pushed(detokenizer, range(4)) == ["x", "", "END of", "", "EN"]
    assert not detokenizer.stopped


def test_a_copy_goes_its_own_way() -> None:
    tokens = ["a", "ST", "OP", "AY"]
    detokenizer = Detokenizer(lambda index: tokens[index].encode(), ["STOP"])
    assert detokenizer.push(0) + detokenizer.push(1) == "a"
    twin = detokenizer.copy()
    assert (detokenizer.push(2), detokenizer.stopped) == ("", True)
    assert (twin.push(3), twin.stopped) == ("STAY", False)


# --- Chat templates -----------------------------------------------------------

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Weather of a <place> & its "surroundings" è oggi',
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CALL = {"function": {"name": "weather", "arguments": {"place": "Zürich", "days": [1, 2], "n": 3}}}
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": " Hi, ünïcode & <b> \n"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "several turns": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n2"},
        {"role": "user", "content": "And 2 + 2?"},
    ],
    "reasoning": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2", "reasoning_content": "easy"},
    ],
    "tools": [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "ask",
            "tool_calls": [CALL, CALL],
        },
        {"role": "tool", "content": '{"sun": true}'},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Both."},
        {"role": "user", "content": "Thanks"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}],
}


def with_template(path: Path, template: str) -> qwen_moe.Tokenizer:
    shutil.copytree(EMBEDDED, path, ignore=shutil.ignore_patterns("*.safetensors"))
    (path / "chat_template.jinja").write_text(template)
    return qwen_moe.Tokenizer(path)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> qwen_moe.Tokenizer:
    return with_template(tmp_path_factory.mktemp("agent") / "t", AGENT.read_text())


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, [WEATHER, WEATHER]], ids=["plain", "tools"])
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}], ids=str)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_agent_template_renders_as_in_transformers(
    agent: qwen_moe.Tokenizer,
    name: str,
    tools: list | None,
    options: dict,
    add_generation_prompt: bool,
) -> None:
    settings = {"tools": tools, "add_generation_prompt": add_generation_prompt, **options}
    want = REFERENCE.apply_chat_template(
        CONVERSATIONS[name], chat_template=AGENT.read_text(), tokenize=False, **settings
    )
    assert agent.apply_chat_template(CONVERSATIONS[name], **settings) == want


@pytest.mark.parametrize("name", ["one turn", "system", "several turns", "parts"])
def test_the_embedded_template_renders_as_in_transformers(name: str) -> None:
    want = REFERENCE.apply_chat_template(
        CONVERSATIONS[name], tokenize=False, add_generation_prompt=True
    )
    assert TOKENIZER.apply_chat_template(CONVERSATIONS[name]) == want


EXTRAS = (
    "{% if true %}\n  {% if true %}\n  x\n  {% endif %}\n{% endif %}\n"
    "{% for m in messages %}{% if m.content == 'skip' %}{% continue %}{% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}"
    "{{ strftime_now('%Y') | length }}{{ {'b': 'é', 'a': 1} | tojson(indent=1) }}"
)


def test_what_templates_in_the_wild_use_is_there(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "skip"}, {"role": "user", "content": "keep"}]
    got = with_template(tmp_path / "t", EXTRAS).apply_chat_template(messages)
    assert got == '  x\nkeep<|im_end|>4{\n "b": "é",\n "a": 1\n}'
    assert got == REFERENCE.apply_chat_template(messages, chat_template=EXTRAS, tokenize=False)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no messages"),
        (
            [{"role": "nobody", "content": "x"}, {"role": "user", "content": "x"}],
            "unknown role nobody",
        ),
        (["hello"], "mapping"),
    ],
    ids=str,
)
def test_messages_that_the_template_refuses_are_refused_with_its_words(
    agent: qwen_moe.Tokenizer, messages: list, words: str
) -> None:
    with pytest.raises(qwen_moe.InvalidArgument, match=words):
        agent.apply_chat_template(messages)


def test_a_template_is_sandboxed(tmp_path: Path) -> None:
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}{{ messages.append(1) }}"
    with pytest.raises(qwen_moe.InvalidArgument):
        with_template(tmp_path / "t", escape).apply_chat_template(CONVERSATIONS["one turn"])


def test_a_template_that_does_not_compile_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(qwen_moe.FormatError, match=r"chat_template\.jinja"):
        with_template(tmp_path / "t", "{% for %}")


@pytest.mark.parametrize("named", [False, True])
def test_a_template_may_lie_in_tokenizer_config(tmp_path: Path, named: bool) -> None:
    with_template(tmp_path / "t", "")
    (tmp_path / "t" / "chat_template.jinja").unlink()
    with pytest.raises(qwen_moe.FormatError, match="no chat template"):
        qwen_moe.Tokenizer(tmp_path / "t").apply_chat_template(CONVERSATIONS["one turn"])
    template: object = "{{ messages[0].content }}!"
    if named:
        template = [{"name": "tool_use", "template": ""}, {"name": "default", "template": template}]
    settings = tmp_path / "t" / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": template}))
    got = qwen_moe.Tokenizer(tmp_path / "t").apply_chat_template([{"role": "u", "content": "x"}])
    assert got == "x!"


# --- Files --------------------------------------------------------------------


def test_end_of_text_ids_come_from_the_first_file_that_names_some(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with_template(path, "")
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    (path / "config.json").write_text('{"text_config": {"eos_token_id": 5}}')
    assert qwen_moe.Tokenizer(path).eos_token_ids == (7, 9)
    (path / "generation_config.json").write_text("{}")
    assert qwen_moe.Tokenizer(path).eos_token_ids == (5,)
    (path / "config.json").unlink()
    assert read_eos_token_ids(path) == ()
    assert qwen_moe.Tokenizer(path).eos_token_ids == (TOKENIZER.encode("<|im_end|>")[0],)
    (path / "generation_config.json").write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(qwen_moe.FormatError, match=r"generation_config\.json"):
        qwen_moe.Tokenizer(path)


@pytest.mark.parametrize("content", [None, "", "{}", '{"model": 3}', "[]"], ids=repr)
def test_a_missing_or_broken_tokenizer_names_the_file(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(qwen_moe.FormatError, match=r"tokenizer\.json"):
        qwen_moe.Tokenizer(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path) -> None:
    other = RawTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    other.decoder = decoders.Metaspace()
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(qwen_moe.FormatError, match="Metaspace"):
        qwen_moe.Tokenizer(tmp_path)
