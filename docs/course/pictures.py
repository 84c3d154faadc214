"""The pictures of the reading course and of the how-to: `python docs/course/pictures.py` draws them next to their pages.

A picture is 360 units wide, as a small phone, and has its own background, light or dark as the reader's system is. Where
there is room it is shown 540 pixels wide.
"""
from __future__ import annotations

import math
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH = 360
SHOWN = 540
STYLE = """
.paper{fill:#fbfbf8}.ink{fill:#1d1d1f}.soft{fill:#5c5c66}.line{stroke:#1d1d1f;fill:none}.edge{stroke:#1d1d1f}
.q{fill:#bcd7f5}.k{fill:#f7d7a8}.v{fill:#c9e7b9}.s{fill:#e3d0f0}.o{fill:#f5c4c4}.none{fill:#ececea}
@media (prefers-color-scheme: dark){
.paper{fill:#1c1d21}.ink{fill:#f0f0f2}.soft{fill:#b4b4be}.line{stroke:#f0f0f2;fill:none}.edge{stroke:#f0f0f2}
.q{fill:#234d7a}.k{fill:#7a5a1c}.v{fill:#31662a}.s{fill:#5c3f76}.o{fill:#7d3434}.none{fill:#33343a}}
""".strip().replace("\n", "")


class Picture:
    """Boxes, words and arrows on a sheet `height` units high.

    Parameters
    ----------
    height
        In units, of which the width has 360.
    title, description
        For those who do not see the picture.
    """

    def __init__(self, height: int, title: str, description: str) -> None:
        self.height, self.parts = height, list[str]()
        self.head = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
        self.text(12, 22, title, 14, bold=True)

    def text(self, x: float, y: float, words: str, size: float = 12, anchor: str = "start", soft: bool = False, bold: bool = False) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(f'<text class="{"soft" if soft else "ink"}" x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}"'
                          f'{weight}>{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, label: str = "", size: float = 12) -> None:
        """kind: q k v s o or none, which is the colour."""
        self.parts.append(f'<rect class="{kind} edge" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>')
        if label:
            self.text(x + width / 2, y + height / 2 + size / 3, label, size, "middle")

    def arrow(self, x0: float, y0: float, x1: float, y1: float) -> None:
        angle = math.atan2(y1 - y0, x1 - x0)
        ends = [(x1 - 7 * math.cos(angle + turn), y1 - 7 * math.sin(angle + turn)) for turn in (0.4, -0.4)]
        barbs = " ".join(f"M{x:.1f} {y:.1f}L{x1:g} {y1:g}" for x, y in ends)
        self.parts.append(f'<path class="line" d="M{x0:g} {y0:g}L{x1:g} {y1:g} {barbs}"/>')

    def svg(self) -> str:
        body = "\n".join(self.parts)
        return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{SHOWN}" '
                f'height="{self.height * SHOWN // WIDTH}" role="img" '
                f'font-family="system-ui, sans-serif">{self.head}<style>{STYLE}</style>\n'
                f'<rect class="paper" width="{WIDTH}" height="{self.height}" rx="8"/>\n{body}\n</svg>\n')


# ---------------------------------------------------------------- one function a page
def formula() -> Picture:
    p = Picture(220, "All of S in memory",
                "Q times K transposed is a square S of seqlen by seqlen numbers. Softmax makes P of it, as large. P "
                "times V is O. S and P go through memory.")
    p.box(14, 76, 34, 110, "q", "Q")
    p.box(66, 40, 110, 26, "k", "K transposed")
    p.box(66, 76, 110, 110, "s", "S, then P")
    p.box(230, 76, 34, 110, "v", "V")
    p.box(312, 76, 34, 110, "o", "O")
    p.text(203, 136, "x", 14, "middle")
    p.text(288, 136, "=", 14, "middle")
    p.text(14, 206, "seqlen x seqlen numbers, four times through memory", 11, soft=True)
    return p


def online_softmax() -> Picture:
    p = Picture(236, "One panel of rows, tile after tile",
                "A panel of query rows meets one tile of keys after the other. It keeps a running maximum, a running "
                "sum and the output so far. When the maximum grows, sum and output are rescaled.")
    for n in range(4):
        p.box(66 + 62 * n, 36, 58, 24, "k" if n < 3 else "none", f"K, V {n}")
        p.box(66 + 62 * n, 70, 58, 40, "s" if n == 2 else "none", "S, P" if n == 2 else "done" if n < 2 else "later")
    p.box(14, 70, 44, 40, "q", "Q")
    p.arrow(219, 112, 219, 142)
    p.text(228, 131, "max, exp, sum")
    p.box(66, 146, 92, 26, "none", "row_max")
    p.box(162, 146, 92, 26, "none", "row_sum")
    p.box(258, 146, 88, 26, "o", "O")
    p.text(66, 194, "new maximum: row_sum and O times")
    p.text(66, 212, "exp(old row_max - new row_max)")
    return p


def simt() -> Picture:
    p = Picture(250, "A thread block and its tile",
                "A thread block has a tile of query rows. Its threads form a grid. Each owns every sixteenth key of "
                "its rows of S and every sixteenth column of O, in registers.")
    p.box(14, 40, 150, 120, "s")
    p.box(196, 40, 150, 120, "o")
    for y in (46, 106):
        for n in range(3):
            p.box(20 + 48 * n, y, 14, 14, "q")
            p.box(202 + 48 * n, y, 14, 14, "q")
    p.text(89, 92, "S: 16 threads a row", 12, "middle")
    p.text(271, 92, "O: the same threads", 12, "middle")
    p.arrow(166, 100, 194, 100)
    p.text(180, 176, "marked: what one thread has in registers", 11, "middle", soft=True)
    p.box(14, 192, 80, 26, "q", "Q slice")
    p.box(98, 192, 80, 26, "k", "K or V")
    p.box(182, 192, 80, 26, "s", "P")
    p.box(266, 192, 80, 26, "none", "alive")
    p.text(14, 236, "shared memory: copied by all, then a barrier", 11, soft=True)
    return p


def sm80() -> Picture:
    p = Picture(262, "Warps of rows, copies in flight",
                "Each of four warps has its own query rows and all keys of a step. S, P and O stay in registers. "
                "While a step computes, cp.async brings the next K and V into the other stage.")
    for n in range(4):
        p.box(14, 40 + 30 * n, 60, 28, "q", f"warp {n}")
        p.box(78, 40 + 30 * n, 110, 28, "s", "S -> P")
        p.box(192, 40 + 30 * n, 60, 28, "o", "O")
    p.text(260, 72, "rows of one", 11)
    p.text(260, 88, "warp: softmax", 11)
    p.text(260, 104, "needs no other", 11)
    p.text(260, 120, "warp", 11)
    p.text(14, 186, "stage 0", 12)
    p.box(70, 172, 84, 22, "k", "K, V of n")
    p.text(164, 187, "read by mma.sync now", 11)
    p.text(14, 218, "stage 1", 12)
    p.box(70, 204, 84, 22, "none", "n - 1")
    p.arrow(214, 215, 158, 215)
    p.text(220, 219, "cp.async, in flight", 11)
    p.text(14, 248, "one barrier a step", 11, soft=True)
    return p


def sm90() -> Picture:
    p = Picture(286, "One producer, a ring, two consumers",
                "One thread of warpgroup 0 issues the TMA loads of K and V into a ring of stages. Warpgroups 1 and 2 "
                "compute with wgmma, 64 query rows each. A full barrier says that bytes have arrived, an empty "
                "barrier that a slot may be overwritten.")
    p.box(14, 40, 332, 34, "none", "warpgroup 0: one thread issues TMA loads")
    for n in range(2):
        p.box(60 + 130 * n, 112, 110, 44, "k", f"slot {n}: K, V")
        p.arrow(100 + 130 * n, 76, 100 + 130 * n, 110)
        p.arrow(132 + 130 * n, 110, 132 + 130 * n, 76)
        p.arrow(100 + 130 * n, 158, 100 + 130 * n, 192)
        p.arrow(132 + 130 * n, 192, 132 + 130 * n, 158)
    p.text(68, 97, "load", 11, "middle")
    p.text(164, 97, "EMPTY", 11, "middle")
    p.text(68, 180, "FULL", 11, "middle")
    p.text(168, 180, "release", 11, "middle")
    p.box(14, 196, 162, 34, "q", "warpgroup 1: 64 rows")
    p.box(184, 196, 162, 34, "q", "warpgroup 2: 64 rows")
    p.text(14, 252, "consumers wait for FULL, the producer for EMPTY;", 11, soft=True)
    p.text(14, 268, "nobody waits for the whole block", 11, soft=True)
    return p


def overlap() -> Picture:
    p = Picture(262, "Softmax hidden behind MMAs",
                "Two warpgroups take turns. While one issues S = Q K transposed and O += P V, the other computes its "
                "softmax. Inside a warpgroup the softmax of a block overlaps with P V of the block before.")
    p.text(14, 44, "time", 11, soft=True)
    p.arrow(44, 40, 340, 40)
    for row, (name, shift) in enumerate((("warpgroup 1", 0), ("warpgroup 2", 1))):
        y = 62 + 70 * row
        p.text(14, y, name, 12)
        kinds = ("MMAs", "softmax") if not shift else ("softmax", "MMAs")
        for n in range(4):
            what = kinds[n % 2]
            p.box(14 + 83 * n, y + 8, 81, 30, "k" if what == "MMAs" else "s", what)
    p.text(14, 212, "MMAs of a turn: S of block n, P V of block n + 1", 11)
    p.text(14, 230, "(blocks go from last to first). So the softmax", 11)
    p.text(14, 248, "of n overlaps with P V of its own warpgroup, too", 11)
    return p


def backward() -> Picture:
    p = Picture(262, "A tile of keys, all its queries",
                "A thread block owns a tile of keys and loops over blocks of queries. It computes S and P again, then "
                "dP and dS. dK and dV stay with the block. dQ is owned by other blocks: a kernel of its own, or sums "
                "in memory.")
    p.box(14, 50, 50, 132, "k", "K, V")
    for n in range(3):
        p.box(74 + 64 * n, 50, 60, 132, "s" if n == 1 else "none", "S, P" if n == 1 else "done" if n == 0 else "later")
        p.box(74 + 64 * n, 30, 60, 16, "q", "Q, dO", 11)
    p.arrow(268, 116, 290, 116)
    p.box(292, 50, 54, 62, "o", "dK")
    p.box(292, 120, 54, 62, "o", "dV")
    p.text(74, 202, "scores transposed: rows are keys", 11, soft=True)
    p.text(14, 226, "P = exp(S - lse)")
    p.text(184, 226, "dS = P (dP - delta)")
    for n, words in enumerate(("dV += P' dO", "dK += dS' Q", "dQ += dS K")):
        p.text(14 + 114 * n, 246, words)
    return p


def sm90_backward() -> Picture:
    p = Picture(280, "One step of a consumer warpgroup",
                "From top to bottom: S is issued together with dQ of the block before. P is computed. dK of the block "
                "before is issued. dQ goes to shared memory and TMA adds it to float32 sums. dP and dV are issued. dS "
                "is stored.")
    rows = (("S = K Q'", ""), ("dQ of the block before", ""), ("", "P = exp2(S - lse)"), ("dK of the block before", ""),
            ("", "dQ to shared memory"), ("dP = V dO'", ""), ("dV += P' dO", "dS = P (dP - delta)"), ("", "dS to shared memory"))
    p.text(94, 44, "MMAs issued", 12, "middle")
    p.text(265, 44, "meanwhile", 12, "middle")
    for n, (left, right) in enumerate(rows):
        p.box(14, 54 + 25 * n, 160, 22, "k" if left else "none", left, 11)
        p.box(184, 54 + 25 * n, 162, 22, "s" if right else "none", right, 11)
    p.text(14, 268, "an MMA is issued before arithmetic it does not feed", 11, soft=True)
    return p


def change() -> Picture:
    p = Picture(262, "The way of a score feature",
                "A feature goes through the call's options, the Problem, the reference, then the GPU's Spec and "
                "Arguments, and ends as two lines of make_score. Engines that lack it refuse.")
    stations = (("options.py", "a number, read once", "q"), ("problem.py", "a field of Score", "q"),
                ("reference.py", "the specification", "v"), ("spec.py", "flag in Spec, number in Arguments", "k"),
                ("tile/scalar.py", "if DECAY: one line", "s"), ("unfit, supports", "a reason, until it is there", "none"))
    for n, (name, what, kind) in enumerate(stations):
        y = 38 + 36 * n
        p.box(14, y, 116, 26, kind, name)
        p.text(140, y + 17, what, 11)
        if n < 5:
            p.arrow(72, y + 27, 72, y + 35)
    return p


def pages() -> Picture:
    p = Picture(262, "Two requests, five pages",
                "Request 0 has 20 keys and request 1 has 17. Their rows of the block table are 3, 8 and 3, 5. Pages hold 16 keys. Page 3 "
                "holds the first 16 keys of both, page 8 the last four of request 0 and page 5 the last one of request 1.")
    p.text(14, 46, "block_table", 12)
    for b, (name, entries) in enumerate((("request 0", (3, 8)), ("request 1", (3, 5)))):
        y = 54 + 30 * b
        p.text(14, y + 17, name, 12)
        for n, entry in enumerate((*entries, -1)):
            p.box(84 + 34 * n, y, 34, 26, "q" if entry >= 0 else "none", str(entry), 12)
        p.text(204, y + 17, f"cache_seqlens {(20, 17)[b]}", 12)
    p.text(14, 140, "k_cache, v_cache: pages of page_size rows", 12)
    for n, (page, rows) in enumerate(((3, 4), (4, 0), (5, 1), (7, 0), (8, 1))):
        x = 14 + 68 * n
        p.text(x + 28, 160, f"page {page}", 11, "middle")
        for row in range(4):
            p.box(x, 166 + 15 * row, 56, 15, "k" if row < rows else "none")
    p.text(14, 246, "page 3 belongs to both requests", 11, soft=True)
    return p


def ranks() -> Picture:
    p = Picture(300, "Two ranks, zigzag",
                "A sequence is cut into four chunks. Rank 0 owns chunks 0 and 3, rank 1 chunks 1 and 2. Of a causal mask both have "
                "the same number of pairs. Rank 0 receives the keys of chunks 1 and 2, rank 1 those of chunk 0.")
    p.text(14, 46, "rows of the sequence, and who owns them", 12)
    for n, rank in enumerate((0, 1, 1, 0)):
        p.box(14 + 83 * n, 54, 83, 26, "k" if rank else "q", f"{n}: rank {rank}", 12)
    p.text(14, 102, "pairs of rows and keys that each computes", 12)
    for row, rank in enumerate((0, 1, 1, 0)):
        for key in range(4):
            p.box(24 + 30 * key, 112 + 30 * row, 30, 30, "none" if key > row else "k" if rank else "q", "" if key > row else str(key), 11)
    p.text(162, 128, "rank 0 holds keys 0, 3", 11)
    p.text(162, 146, "and receives 1, 2", 11)
    p.text(162, 172, "rank 1 holds keys 1, 2", 11)
    p.text(162, 190, "and receives 0", 11)
    p.text(162, 216, "dk and dv of keys that", 11)
    p.text(162, 234, "were received go back", 11)
    p.text(14, 254, "rows down, keys across", 11, soft=True)
    p.text(14, 286, "the squares on the diagonal count half: 5 pairs each", 11, soft=True)
    return p


PICTURES = (formula, online_softmax, simt, sm80, sm90, overlap, backward, sm90_backward, change)
FOLDERS = {"": PICTURES, "../howto/": (pages, ranks)}         # from this one: the pictures of its pages


def draw() -> dict[str, str]:
    """File name -> SVG text of each picture."""
    return {f"{folder}{make.__name__.replace('_', '-')}.svg": make().svg() for folder, makers in FOLDERS.items() for make in makers}


if __name__ == "__main__":
    for file, text in draw().items():
        (Path(__file__).parent / file).write_text(text)
