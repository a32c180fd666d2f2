"""Which ideographs and pairs of letters are in everyday use: see ``quality.py``."""

from collections.abc import Iterator
from functools import cache

import numpy as np
import numpy.typing as npt

# Elements and isotopes, groups of organic chemistry, and units as older documents write them: a
# list of nuclides has few others.
_OF_TRADES = (
    "氢氦锂铍硼碳氮氧氟氖钠镁铝硅磷硫氯氩钾钙钪钛钒铬锰铁钴镍铜锌镓锗砷硒溴氪铷锶钇锆铌钼锝钌铑钯银镉铟锡锑碲碘"
    "氙铯钡镧铈镨钕钷钐铕钆铽镝钬铒铥镱镥铪钽钨铼锇铱铂金汞铊铅铋钋砹氡钫镭锕钍镤铀镎钚镅锔锫锎锿镄钔锘铹氕氘氚"
    "烷烯炔烃醇醛酮酯醚酚苯萘蒽胺酰肼脲羟羧羰腈肟胍嘌呤吡啶嘧铵铌焓熵"
    "瓩瓧瓰瓱瓲瓸兛兙兝兞浬呎吋哩唡糎粍粁釐壹贰叁肆伍陆柒捌玖拾佰仟萬"
)

# The pairs of letters that make up most of English: Norvig, English Letter Frequency Counts, 2012.
# Other languages in Latin letters share enough of them.
_BIGRAMS = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io "
    "le ve co me de hi ri ro ic ne ea ra ce li ch ll be ma si om ur ca el ta la ns di fo ho "
    "pe ec pr no ct us ac ot il tr ly nc et ut ss so rs un lo wa ge ie wh ee wi em ad ol rt "
    "po we na ul ni ts mo ow pa im mi ai sh ir su id os iv ia am fi ci vi pl ig tu ev ld ry "
    "mp fe bl ab gh ty op wo sa ay ex ke fr oo av ag if ap gr od bo sp rd do uc bu ei ov by "
    "rm ep tt oc fa ef cu rn sc gi da yo cr cl du ga qu ue ff ba ey ls va um pp ua up lu go "
    "ht ru ug ds lt pi rc rr eg au ck ew mu br bi pt ak pu"
).split()


@cache
def han_table() -> npt.NDArray[np.bool_]:
    """Mark the 3,755 characters of GB 2312's first level, the 5,401 of Big5's, and those of trades.

    The former are the standards' own choice of the characters in frequent use, for simplified and
    for traditional Chinese.
    """
    table = np.zeros(0x110000, np.bool_)
    table[[ord(character) for character in (*_level_one(), *_OF_TRADES)]] = True
    return table


def _level_one() -> Iterator[str]:
    for codec, leads, trails in (
        ("gb2312", range(0xB0, 0xD8), (range(0xA1, 0xFF),)),
        ("big5", range(0xA4, 0xC7), (range(0x40, 0x7F), range(0xA1, 0xFF))),
    ):
        for lead in leads:
            for trail in (trail for part in trails for trail in part):
                yield from bytes((lead, trail)).decode(codec, "ignore")[:1]


@cache
def bigram_table() -> npt.NDArray[np.bool_]:
    """Mark common pairs of small letters, 26 times the first plus the second: `[676]`."""
    table = np.zeros(26 * 26, np.bool_)
    table[[26 * (ord(pair[0]) - ord("a")) + ord(pair[1]) - ord("a") for pair in _BIGRAMS]] = True
    return table
