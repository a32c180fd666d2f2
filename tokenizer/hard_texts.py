"""Texts on which two implementations of one tokenizer come apart, if they ever do."""

import random
from collections.abc import Callable, Sequence

_FIXED = (
    "",
    " ",
    "\n",
    "\r",
    "\r\n",
    "a\rb\r\rc\r\n\r\nd",
    "   leading, trailing   ",
    "tabs\tand\x0bvertical\x0cfeeds \x1c\x1d\x1e\x1f\x85 next\u2028line\u2029paragraph",
    "no-break\xa0space\u3000ideographic\u2003em\u200bzero\ufeffmark\u180e",
    "\x00\x01\x02\x7f control \x1b[0m",
    "I'm you're he'S WE'LL they'd o'clock ’s ’t 'ſ 'K x'ſt 'RE'VE'D'M",
    "0 1 12 123 1234 12345678901234567890 ０１２３ ٣٤٥ ½²³ Ⅷ ㊿ 一二三 3.14159e-10 15.5MPa",
    'def f(x):\n    return x  # y\n\n\n\tif (a!=b) {c+=1;}\r\n<div class="x">&nbsp;</div>\n',
    "e\u0301 e\u0323\u0301 e\u0301\u0323 \u1e69 s\u0323\u0307 \u212b \u2126 \ufb01 \u01c5 ẞß İı ΐ",
    "\u0301 starts with a mark \u0338= =\u0338 \u1100\u1161\u11a8 각 가\u11a8 \u0340\u0344\u2adc",
    "核电站一回路压力约为15.5兆帕，温度３２５℃。（ＤＮＢＲ≥1.3）「安全壳」——《导则》…",
    "在1号机组（PWR）中，稳压器的压力由DNBR≥1.3限制；“安全壳”是第3道屏障。\n其次，\r\n  中国 核电",
    "核\x00电a核1核\n核\t核，核“核”的<核>一's核's不't是'的\u3000了~在 有\x1c人\x7f这",
    "核" * 300 + "电站" * 200 + "，" * 50,
    "aaaaaaaa" * 100 + "!" * 200 + " " * 150 + "=" * 80 + "\n" * 70 + "ab" * 100,
    "👩\u200d👩\u200d👧 🇨🇳🇫🇷 👍🏽 ☢️ ⚛️ 1️⃣ 🌬☀️ ❤\ufe0f\u200d🔥",
    "𠀀𪜀𫝀 龘 㐀 ﷺ ｶﾞ ㍿ 豈 〇々〆 ゛ かが カガ ｱ",
    "Привет мир ёЁ Ελλάδα Ἀ שָׁלוֹם العَرَبِيَّة हिन्दी ไทย தமிழ் ខ្មែរ 한국어 བོད་",
    "\ufffd\ufffe\uffff\U0010ffff\ue000\U000f0000",
    "<|endoftext|> <|end_of_text|> <|im_start|>user\n<|im_end|> <s></s> [INST] <pad> <unk> <|",
    "https://example.com/a?b=c&d=%E6%A0%B8#x user@example.com C:\\dir\\file.txt 2024-01-31T00:00",
    # Letters of every version of Unicode from 4 to 15: both sides must know them.
    " ".join(f"{letter}'t{letter} x{letter}" for letter in "ȡɎꞀꟈࢠ鿌鿕鿪鿼𑄃𞤀𐴀𛲀𞀰𑂾𐺀ꟊ𱍐𪛝𞓐"),
)

_KINDS: tuple[Callable[[random.Random], str], ...] = (
    lambda r: chr(r.randrange(0x4E00, 0x9FA6)),
    lambda r: chr(r.randrange(32, 127)),
    lambda r: r.choice("abcdefgXYZ"),
    lambda r: r.choice(" \t\n\r\u3000\xa0\u2028\u200b\x85\x0b\x0c"),
    lambda r: r.choice(("  ", "\n\n", "\r\n", "\n    ", " \n ")),
    lambda r: chr(r.randrange(0x300, 0x350)),
    lambda r: "".join(
        r.choices("的一是不了在有人这中大国上个核电站安全压力温度系统运行一回路", k=3)
    ),
    lambda r: r.choice("éüñçÅßøæėẹ"),
    lambda r: chr(r.randrange(0, 32)),
    lambda r: r.choice("0123456789０１２３٣²½Ⅷ"),
    lambda r: r.choice("'’") + r.choice(("s", "T", "re", "VE", "ll", "ſ", "K")),
    lambda r: chr(r.randrange(0x1F300, 0x1F600)) + r.choice(("", "\u200d", "\ufe0f")),
    lambda r: r.choice("，。、；：！？（）《》「」—…·"),
    lambda r: chr(r.randrange(0xFF01, 0xFF5F)),
    lambda r: chr(r.randrange(0xAC00, 0xD7A4)),
    lambda r: chr(r.randrange(0x1100, 0x1113)) + chr(r.randrange(0x1161, 0x1176)),
    lambda r: r.choice("aàαаאعกक가あア核"),
    lambda r: r.choice(("def ", "return ", "();\n", "://", "==", "{}", "</p>", "\\n")),
)


def hard_texts(added_tokens: Sequence[str], *, count: int = 250) -> list[str]:
    """Make the texts; always the same for the same tokenizer.

    Args:
        added_tokens: Added tokens of the tokenizer, special ones too. Each is tried whole, cut
            short and between characters that could join it.
        count: How many random mixtures to add to the fixed texts.

    Returns:
        Some 60 KiB of texts.
    """
    texts = list(_FIXED)
    tokens = [*added_tokens[:20], *added_tokens[-20:]]
    texts += [f"a{t}b {t}{t}\u0338 \u0301{t[:-1]} {t[1:]}\n{t}\r\n核{t}电" for t in tokens]
    source = random.Random(20_261_123)
    for _ in range(count):
        kinds = source.sample(_KINDS, source.randint(1, 6))
        pieces = (
            source.choice(kinds)(source) * source.choice((1, 1, 1, 1, 1, 2, 3, 30))
            for _ in range(source.randint(1, 50))
        )
        text = "".join(pieces)
        if tokens and source.random() < 0.2:
            text += source.choice(tokens) + text[:10]
        texts.append(text)
    return texts
